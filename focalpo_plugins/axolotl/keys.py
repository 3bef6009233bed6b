"""What a config asks for: the loss with its options, its margin, and the fused path."""

from __future__ import annotations

from typing import Any

from ..registry import BoundLoss, PairwiseLoss, bind_keys, get_loss
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
    return bind_keys(loss, cfg.get, ": true")


def margin(cfg: Any) -> str:
    """The margin that our loss is computed from, as a key of :data:`~.MARGINS`."""
    return cfg.get(MARGIN) or "dpo"


def fused_key(cfg: Any) -> str | None:
    """The key that asks for the fused path; None if no key does."""
    return next((key for key in (FUSED, "dpo_use_liger_kernel") if cfg.get(key)), None)
