"""Our losses in ms-swift's arguments: which one is asked for, and with which options."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..options import OF_ANY_LOSS
from ..registry import BoundLoss, PairwiseLoss, bind_keys, losses
from . import ALLOW_CHANGED, ALLOW_DATA, BALANCED, PRECOMPUTE, PRECOMPUTE_DIR, SHARED, SWITCHES


@dataclass(frozen=True)
class Asked:
    """What arguments ask of this package.

    Attributes:
        loss: the loss with its options.
        shared: whether prompts are shared.
        balanced: whether batches are balanced.
        allow_changed: whether a checkpoint of another loss may be resumed.
        allow_data: whether to train on data of which more than half has a fault.
        reference_folder: the folder of the precomputed reference's file, empty for the output
            folder; None if the reference isn't precomputed.
    """

    loss: BoundLoss
    shared: bool
    balanced: bool
    allow_changed: bool
    allow_data: bool
    reference_folder: str | None = None


@dataclass(frozen=True)
class Key:
    """A key that this package adds to ms-swift's.

    Attributes:
        kind: the type of its values, in words that argparse understands.
        help: what it does.
        loss: the loss that it belongs to; None if it belongs to each.
    """

    kind: Any
    help: str
    loss: str | None


def keys() -> dict[str, Key]:
    """Our keys by name."""
    found = {}
    for loss in losses().values():
        for option, default in loss.options.items():
            # A default of None doesn't tell the option's type.
            kind = str if default is None else type(default)
            text = loss.help.get(option, f"Option of the loss {loss.name}")
            found[f"{loss.name}_{option}"] = Key(kind, text, loss.name)
    for key in SWITCHES:
        found[key] = Key(bool, OF_ANY_LOSS[key.removeprefix("focalpo_")], None)
    found[PRECOMPUTE_DIR] = Key(str, OF_ANY_LOSS["precompute_dir"], None)
    return found


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
    on = {key: bool(getattr(args, key)) for key in SWITCHES}
    return Asked(
        bind(args, losses()[names[0]]),
        shared=on[SHARED],
        balanced=on[BALANCED],
        allow_changed=on[ALLOW_CHANGED],
        allow_data=on[ALLOW_DATA],
        reference_folder=(getattr(args, PRECOMPUTE_DIR) or "") if on[PRECOMPUTE] else None,
    )


def bind(args: Any, loss: PairwiseLoss) -> BoundLoss:
    """The loss with the options that the arguments give.

    Raises:
        ValueError: an option's value is out of range.
    """
    return bind_keys(loss, lambda key: getattr(args, key, None), " true")


def given_keys(args: Any) -> Mapping[str, Any]:
    """Our keys that have a value, with their values."""
    values = {key: getattr(args, key, None) for key in keys()}
    return {key: value for key, value in values.items() if value is not None}
