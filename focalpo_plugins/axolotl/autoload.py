"""Makes ``rl: focalpo`` work without a ``plugins:`` line; called once in an Axolotl process."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from . import PLUGIN


def patch(config_module: ModuleType) -> None:
    """Wrap ``axolotl.utils.config.validate_config``, which every command calls once the plugins
    of the ``plugins:`` line are registered, so that ours is registered where it is asked for."""
    validate_config = config_module.validate_config

    @functools.wraps(validate_config)
    def with_focalpo(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        _ensure_plugin(cfg)
        return validate_config(cfg, *args, **kwargs)

    config_module.validate_config = with_focalpo  # type: ignore[attr-defined]


def _ensure_plugin(cfg: Any) -> None:
    from axolotl.utils.schemas.enums import RLType

    # Our own modules are imported only where the config asks for them: a broken one must not
    # stop a run that has nothing to do with us.
    is_hosts = cfg.get("rl") in (None, *(rl.value for rl in RLType))
    if is_hosts and not any(str(key).startswith("focalpo_") for key in cfg):
        return
    from axolotl.integrations.base import PluginManager

    from .plugin import FocalPOPlugin

    if PLUGIN not in (cfg.get("plugins") or []):
        cfg["plugins"] = [*(cfg.get("plugins") or []), PLUGIN]
    # Not PluginManager.register, which swallows errors and would go on without us.
    plugins = PluginManager.get_instance().plugins
    plugins.setdefault(PLUGIN, FocalPOPlugin()).register(cfg)
