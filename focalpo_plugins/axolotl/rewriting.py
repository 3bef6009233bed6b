"""Turns a config that asks for one of our losses into one that Axolotl can train.

Axolotl accepts only its own values of ``rl``.  So its ``validate_config`` gets a copy of the config
with ``rl: dpo``, our ``trainer_cls``, and the loss in ``focalpo_rl``.  If ``focalpo_margin`` asks
for another margin, ``rl`` is ``simpo`` or ``orpo`` instead.  The user's own object is not changed.
Everything that the trainer needs is in the validated config, which reaches Ray's workers too.
"""

from __future__ import annotations

import copy
from typing import Any

from axolotl.integrations.base import PluginManager, load_plugin

from ..guards import hub, last_line
from ..registry import losses
from . import MARGINS, PLUGIN, RL_AS_WRITTEN, TRAINERS, data, flags
from .keys import margin, requested_loss
from .refusals import check, check_rl


def rewritten(cfg: Any) -> Any:
    """A copy that Axolotl can train, if the config asks for one of our losses; else the config.

    Ray's workers get a config that is already rewritten: it is checked and returned.

    Raises:
        ValueError: the config asks for something that can't be trained; the message names the key.
        RuntimeError: the installed TRL computes its loss elsewhere.
    """
    name = cfg.get("rl")
    ours = (isinstance(name, str) and name in losses()) or cfg.get(RL_AS_WRITTEN) is not None
    written = copy.deepcopy(cfg)  # validation puts its own objects into the config

    def reason(error: BaseException) -> str | None:
        if not ours:
            return None
        return data.explain(written, error) or hub.explain(error, data.remote_names(written))

    last_line.install(reason)
    flags.check_arrived(cfg)
    check_rl(name)
    of_margins = {rl for rl, _ in MARGINS.values()}
    if name in of_margins and cfg.get("trainer_cls") in TRAINERS and requested_loss(cfg):
        _use_plugin(cfg)
        return cfg
    check(cfg)
    if name is None or name not in losses():
        return cfg
    _check_trl(cfg)
    cfg = copy.deepcopy(cfg)
    cfg["rl"], cfg["trainer_cls"] = MARGINS[margin(cfg)]
    cfg[RL_AS_WRITTEN] = name
    _use_plugin(cfg)
    return cfg


def _check_trl(cfg: Any) -> None:
    """Refuse a TRL that computes its loss elsewhere, and loss types that ours can't replace."""
    from ..trl import check_host, check_loss_types

    if margin(cfg) == "dpo":
        check_host()
    else:
        from ..trl.reference_free import CPOLossMixin, ORPOLossMixin

        (ORPOLossMixin if margin(cfg) == "orpo" else CPOLossMixin).check_host()
    types = cfg.get("dpo_loss_type")
    if types is not None:
        check_loss_types(types if isinstance(types, list) else [types], "dpo_loss_type")


def _use_plugin(cfg: Any) -> None:
    """List the plugin in a config that we may change, and register it with Axolotl."""
    if PLUGIN not in (cfg.get("plugins") or []):
        cfg["plugins"] = [*(cfg.get("plugins") or []), PLUGIN]
    # Not PluginManager.register, which swallows errors: the run would continue without our loss.
    plugins = PluginManager.get_instance().plugins
    if PLUGIN not in plugins:
        plugins[PLUGIN] = load_plugin(PLUGIN)
