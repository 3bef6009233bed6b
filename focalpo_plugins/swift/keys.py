"""Our losses in ms-swift's arguments: which one is asked for, and with which options."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from ..registry import losses
from ..yaml_keys import (
    ALLOW_CHANGED,
    ALLOW_DATA,
    BALANCED,
    PRECOMPUTE,
    PRECOMPUTE_DIR,
    SHARED,
    Asked,
    Keys,
    value_of,
)

KEYS = Keys(
    host="ms-swift",
    common=(SHARED, BALANCED, PRECOMPUTE, PRECOMPUTE_DIR, ALLOW_CHANGED, ALLOW_DATA),
    asks="loss_type {} with rlhf_type dpo",
    on=" true",
)


def types_of(args: Any) -> list[str]:
    """The types in ``loss_type``, which is a string, a list or None."""
    types = args.loss_type
    return [types] if isinstance(types, str) else list(types or ())


@functools.cache
def types_of_host() -> frozenset[str]:
    """The types that ms-swift's own DPO knows.

    They are compared in one method, so they are among its constants, with a few other words.
    """
    from swift.rlhf_trainers import DPOTrainer

    constants = DPOTrainer.dpo_loss.__code__.co_consts
    return frozenset(word for word in constants if isinstance(word, str) and word.isidentifier())


def asked_types(args: Any) -> list[str]:
    """The names of our losses in ``loss_type``."""
    return ours_among(types_of(args))


def ours_among(types: Iterable[str]) -> list[str]:
    """The names of our losses among these; a name that ms-swift has itself is its own."""
    ours = [name for name in types if name in losses()]
    return [name for name in ours if name not in types_of_host()]


def requested(args: Any) -> Asked | None:
    """What the arguments ask of this package; None if they train a loss of ms-swift.

    Raises:
        ValueError: an option's value is out of range.
    """
    names = asked_types(args) if args.rlhf_type == "dpo" else []
    if not names:
        return None
    given = value_of(args)
    return KEYS.asked(KEYS.bind(losses()[names[0]], given), given)


def starts_as_reference(args: Any) -> bool:
    """Whether every margin of the first step should be 0.

    Args:
        args: ms-swift's arguments, in which it has filled in ``ref_model``.
    """
    if args.ld_alpha is not None:  # it weighs the policy's tokens only
        return False
    if args.tuner_type == "full" and args.ref_model != args.model:
        return False
    return list(args.adapters or ()) == list(args.ref_adapters or ())
