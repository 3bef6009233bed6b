"""Checks that refuse arguments before ms-swift loads anything."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from ..balanced import MEAN_OF_TOKENS
from ..errors import InvalidValue, conflict
from ..loss import check_beta, check_label_smoothing, check_weights
from ..registry import get_loss, losses
from ..yaml_keys import BALANCED, SHARED, loss_meant_by, value_of
from . import data
from .keys import KEYS, asked_types, types_of, types_of_host

_PARTS = "each rank has a part of a sequence, and a margin is of whole sequences"
_ONE_ROW = (
    "it puts a batch's sequences into one row, for which ms-swift needs FlashAttention, and this "
    "package was not tested with that"
)
_CHOOSES = "both choose which pairs share a micro-batch"
_NOT_KNOWN = "the lengths of its pairs are not known in advance"

_Wrong = Callable[[Any], bool]


def _above_1(value: Any) -> bool:
    return value is not None and int(value) > 1


# For a loss of this package, and for each of the two switches, the settings of ms-swift that it
# can't be combined with: whether a value is one of these, and why it can't.
_OF_LOSS: Mapping[str, tuple[_Wrong, str]] = {
    "packing": (bool, _ONE_ROW),
    "padding_free": (bool, _ONE_ROW),
    "sequence_parallel_size": (_above_1, _PARTS),
    "deepspeed_autotp_size": (_above_1, _PARTS),
}
_OF_BALANCED: Mapping[str, tuple[_Wrong, str]] = {
    "group_by_length": (bool, _CHOOSES),
    "streaming": (bool, _NOT_KNOWN),
    "rpo_alpha": (bool, f"its term {MEAN_OF_TOKENS}"),
}


def check(args: Any, of_host: Collection[str]) -> None:
    """Refuse arguments that can't be trained with, or that would be dropped.

    Args:
        args: ms-swift's arguments as the user gave them.
        of_host: the names of ms-swift's own keys.

    Raises:
        ValueError: the message names the key.
    """
    _check_type(args)
    names = asked_types(args)
    _check_given(args, names, of_host)
    if not names:
        return
    name, *more = names
    _check_beside(args, name, more)
    loss = get_loss(name)
    KEYS.check_names(loss, of_host)
    why = "without this package, ms-swift refuses the command for an unknown key, before it loads"
    KEYS.check_gamma(loss, value_of(args), why)
    KEYS.bind(loss, value_of(args))
    KEYS.check_common(value_of(args))
    if args.beta is not None:
        check_beta(args.beta)
    check_label_smoothing(args.label_smoothing)
    if args.rpo_alpha is not None:
        check_weights("rpo_alpha", args.rpo_alpha)
    check_weights("loss_weights", *(args.loss_weights or ()))
    _check_conflicts(args, f"loss_type {name}", "Remove it", _OF_LOSS)
    if args.focalpo_balanced_batches:
        _check_conflicts(args, BALANCED, f"Set {BALANCED} to false", _OF_BALANCED)
    data.check_files(args)


def _check_type(args: Any) -> None:
    """Refuse a name of our loss that is misspelt, or in ``rlhf_type``; leave others to ms-swift."""
    ours = list(losses())
    if args.rlhf_type in ours:
        raise InvalidValue(
            f"rlhf_type must be dpo for a loss of this package, got {args.rlhf_type!r}. Set "
            f"rlhf_type to dpo and loss_type to {args.rlhf_type}."
        )
    if args.rlhf_type != "dpo":
        return
    for name in types_of(args):
        near = loss_meant_by(name, types_of_host())
        if near is not None:
            raise InvalidValue(f"unknown loss_type, got {name!r}; did you mean {near!r}?")


def _check_given(args: Any, names: list[str], of_host: Collection[str]) -> None:
    """Refuse our keys without the loss that they belong to."""
    given, known = KEYS.given(value_of(args), of_host), KEYS.all()
    now = f"with rlhf_type {args.rlhf_type} and loss_type {args.loss_type}"
    for key, value in given.items():
        owner = known[key].loss
        if owner in types_of(args) and owner not in names and args.rlhf_type == "dpo":
            raise InvalidValue(
                f"{key} belongs to a loss that has the name of one of ms-swift's own, got "
                f"{value!r} {now}: ms-swift would train its own {owner}. The package "
                f"{get_loss(owner).package} has to rename its loss."
            )
    KEYS.check_owners(given, names[0] if names and args.rlhf_type == "dpo" else None, now)


def _check_beside(args: Any, name: str, more: list[str]) -> None:
    """Refuse any other loss beside ours in ``loss_type``, except ``sft``."""
    if args.rlhf_type != "dpo":
        raise InvalidValue(
            f"loss_type {name} needs rlhf_type dpo, got rlhf_type {args.rlhf_type}. Set "
            "rlhf_type to dpo."
        )
    others = [each for each in types_of(args) if each not in (name, "sft")]
    twice = types_of(args).count(name) > 1
    if more or others or twice:
        raise InvalidValue(
            f"loss_type {name} can be combined only with sft, got {types_of(args)}: other terms "
            "are untested with it. Remove them."
        )


def _check_conflicts(
    args: Any, asked: str, fix: str, table: Mapping[str, tuple[_Wrong, str]]
) -> None:
    for key, (wrong, why) in table.items():
        value = getattr(args, key, None)
        if wrong(value):
            raise conflict(asked, key, value, why, fix)


def check_model(args: Any, multimodal: bool) -> None:
    """Refuse the two switches for a multimodal model.

    Raises:
        ValueError: the message names the switch.
    """
    for key in (SHARED, BALANCED):
        if multimodal and getattr(args, key, None):
            why = "a pair's images are not among its tokens"
            raise conflict(key, "a multimodal model", args.model, why, f"Set {key} to false")
