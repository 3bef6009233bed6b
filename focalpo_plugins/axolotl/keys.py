"""What a config asks for: the loss with its options, its margin, and the fused path."""

from __future__ import annotations

from typing import Any

from ..registry import BoundLoss, get_loss
from ..yaml_keys import ALLOW_CHANGED, ALLOW_DATA, BALANCED, FUSED, MARGIN, SHARED, Keys
from . import MARGINS, RL_AS_WRITTEN

KEYS = Keys(
    host="Axolotl",
    common=(FUSED, SHARED, BALANCED, ALLOW_CHANGED, ALLOW_DATA, MARGIN),
    asks="rl: {}",
    on=": true",
    margins=MARGINS,
)


def requested_loss(cfg: Any) -> BoundLoss | None:
    """Our loss that a rewritten config asks for; None if it asks for none.

    Raises:
        ValueError: an option's value is out of range.
    """
    name = cfg.get(RL_AS_WRITTEN)
    return None if name is None else KEYS.bind(get_loss(name), cfg.get)


def betas(cfg: Any) -> dict[str, Any]:
    """The betas that a config gives, by their keys, in the order of Axolotl's own choice."""
    found = {
        "trl.beta": (cfg.get("trl") or {}).get("beta"),
        "rl_beta": cfg.get("rl_beta"),
        "orpo_alpha": cfg.get("orpo_alpha"),
    }
    return {key: beta for key, beta in found.items() if beta is not None}


def margin(cfg: Any) -> str:
    """The margin that our loss is computed from, as a key of :data:`~.MARGINS`."""
    return cfg.get(MARGIN) or "dpo"


def fused_key(cfg: Any) -> str | None:
    """The key that asks for the fused path; None if no key does."""
    return next((key for key in (FUSED, "dpo_use_liger_kernel") if cfg.get(key)), None)
