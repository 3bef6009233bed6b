"""Makes ``rl: focalpo`` known to Axolotl's ``validate_config``."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from _focalpo_plugins_autoload import may_ask


def patch(config_module: ModuleType) -> None:
    """Wrap ``axolotl.utils.config.validate_config`` in every module that has imported it.

    Every command calls it once with the whole config, and continues with the copy that it returns.
    ``patch`` is called as soon as that module is imported, or else by the plugin in a ``plugins:``
    line.
    """
    validate_config = config_module.validate_config
    if hasattr(validate_config, "_of_focalpo_plugins"):
        return

    @functools.wraps(validate_config)
    def with_our_losses(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        return validate_config(_rewritten(cfg), *args, **kwargs)

    with_our_losses._of_focalpo_plugins = True  # type: ignore[attr-defined]
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get("validate_config") is validate_config:
            module.validate_config = with_our_losses  # type: ignore[attr-defined]


def _rewritten(cfg: Any) -> Any:
    """A copy that Axolotl can train, if the config asks for one of our losses; else the config."""
    if cfg.get("inference") and cfg.get("rl") is None:  # `axolotl inference` takes rl out
        return cfg
    try:
        if not (names_us(cfg) or may_ask(cfg)):
            return cfg
        from .rewriting import rewritten
    except Exception:
        if names_us(cfg):
            raise
        return cfg
    return rewritten(cfg)


def names_us(cfg: Mapping[str, Any]) -> bool:
    from axolotl.utils.schemas.enums import RLType

    is_hosts = cfg.get("rl") in (None, *(rl.value for rl in RLType))
    return not is_hosts or any("focalpo" in str(word) for word in (*cfg, cfg.get("trainer_cls")))
