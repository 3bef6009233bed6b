"""What arguments are refused for, before ms-swift loads anything."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ..balanced import MEAN_OF_TOKENS
from ..errors import InvalidValue, conflict
from ..loss import check_beta, check_label_smoothing
from ..registry import get_loss, losses
from . import BALANCED, SHARED, SWITCHES, data
from .keys import asked_types, bind, given_keys, keys, types_of, types_of_host

_NEAR = 0.7  # how alike a misspelt name of a loss is to its name

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
    """Refuse what arguments ask for and can't be trained with, or what would be dropped.

    Args:
        args: ms-swift's arguments as the user gave them.
        of_host: the names of ms-swift's own keys.

    Raises:
        ValueError: the message names the key.
    """
    _check_type(args)
    names = asked_types(args)
    _check_given(args, names)
    if not names:
        return
    name, *more = names
    _check_beside(args, name, more)
    loss = get_loss(name)
    taken = [key for option in loss.options if (key := f"{name}_{option}") in of_host]
    if taken:
        raise InvalidValue(
            f"loss_type must be a loss whose keys ms-swift doesn't have itself, got {name!r} of "
            f"the package {loss.package}, which brings {', '.join(taken)}. The package has to "
            "rename them."
        )
    if name == "focalpo" and args.focalpo_gamma is None:
        raise InvalidValue(
            "focalpo_gamma must be given with loss_type focalpo, got nothing: so that ms-swift "
            "refuses the command where this package isn't installed. The paper uses 0.05; 0 is DPO."
        )
    bind(args, loss)
    for key in SWITCHES:
        if not isinstance(getattr(args, key), bool | None):
            raise InvalidValue(f"{key} must be true or false, got {getattr(args, key)!r}.")
    folder = args.focalpo_precompute_dir
    if folder is not None and not args.focalpo_precompute_ref:
        raise InvalidValue(
            f"focalpo_precompute_dir goes with focalpo_precompute_ref true, got {folder!r} alone. "
            "Set focalpo_precompute_ref as well, or remove focalpo_precompute_dir."
        )
    if args.beta is not None:
        check_beta(args.beta)
    check_label_smoothing(args.label_smoothing)
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
        near = difflib.get_close_matches(name.lower(), ours, n=1, cutoff=_NEAR)
        if name not in ours and near and name not in types_of_host():
            raise InvalidValue(f"unknown loss_type, got {name!r}; did you mean {near[0]!r}?")


def _check_given(args: Any, names: list[str]) -> None:
    """Refuse our keys without the loss that they belong to."""
    given, known = given_keys(args), keys()
    for key, value in given.items():
        loss = known[key].loss
        if loss is None and names:
            continue
        owner = loss or "focalpo"
        if args.rlhf_type == "dpo" and owner in names:
            continue
        got = f"{value!r} with rlhf_type {args.rlhf_type} and loss_type {args.loss_type}"
        if owner in types_of(args) and args.rlhf_type == "dpo":
            raise InvalidValue(
                f"{key} belongs to a loss that has the name of one of ms-swift's own, got {got}: "
                f"ms-swift would train its own {owner}. The package {get_loss(owner).package} has "
                "to rename its loss."
            )
        raise InvalidValue(
            f"{key} belongs to loss_type {owner} with rlhf_type dpo, got {got}. Set these, or "
            f"remove {key}."
        )


def _check_beside(args: Any, name: str, more: list[str]) -> None:
    """Refuse what stands beside our loss in ``loss_type``, except ``sft``."""
    if args.rlhf_type != "dpo":
        raise InvalidValue(
            f"loss_type {name} goes with rlhf_type dpo, got rlhf_type {args.rlhf_type}. Set "
            "rlhf_type to dpo."
        )
    others = [each for each in types_of(args) if each not in (name, "sft")]
    twice = types_of(args).count(name) > 1
    if more or others or twice:
        raise InvalidValue(
            f"loss_type {name} goes alone or with sft, got {types_of(args)}: other terms were not "
            "tried beside it. Remove them."
        )


def _check_conflicts(
    args: Any, asked: str, fix: str, table: Mapping[str, tuple[_Wrong, str]]
) -> None:
    for key, (wrong, why) in table.items():
        value = getattr(args, key, None)
        if wrong(value):
            raise conflict(asked, key, value, why, fix)


def check_model(args: Any, multimodal: bool) -> None:
    """Refuse the two switches for a model of more than text.

    Raises:
        ValueError: the message names the switch.
    """
    for key in (SHARED, BALANCED):
        if multimodal and getattr(args, key):
            why = "a pair's images are not among its tokens"
            raise conflict(key, "a multimodal model", args.model, why, f"Set {key} to false")
