"""What a config says of our loss: the loss with its options, its margin, and the fused path."""

from __future__ import annotations

from typing import Any

from ..guards.messages import named
from ..registry import BoundLoss, PairwiseLoss, get_loss
from . import FUSED, MARGIN, RL_AS_WRITTEN


def requested_loss(cfg: Any) -> BoundLoss | None:
    """Our loss that a rewritten config asks for; None if it asks for none."""
    name = cfg.get(RL_AS_WRITTEN)
    return None if name is None else bind(cfg, get_loss(name))


def bind(cfg: Any, loss: PairwiseLoss) -> BoundLoss:
    """The loss with the options that the config gives.

    Raises:
        ValueError: an option's value is out of range.
    """
    given = {}
    for option, default in loss.options.items():
        value = cfg.get(f"{loss.name}_{option}")
        if value is not None:
            # A default of None doesn't tell the option's type.
            number = default is None or isinstance(default, float)
            given[option] = as_number(value) if number else value
    with named(f"{loss.name}_", loss.options, ": true"):
        return loss.bind(**given)


def margin(cfg: Any) -> str:
    """The margin that our loss is computed from, as a key of :data:`~.MARGINS`."""
    return cfg.get(MARGIN) or "dpo"


def fused_key(cfg: Any) -> str | None:
    """The key that asks for the fused path; None if no key does."""
    return next((key for key in (FUSED, "dpo_use_liger_kernel") if cfg.get(key)), None)


def as_number(value: Any) -> Any:
    """``value`` as a float if it can be read as one: YAML reads ``5e-2`` as a string."""
    try:
        return value if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return value
