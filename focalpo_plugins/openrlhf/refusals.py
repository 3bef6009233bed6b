"""Checks that refuse a command line with a loss of this package, before OpenRLHF begins."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from ..balanced import check_loss
from ..errors import InvalidValue, conflict
from ..guards.messages import named
from ..loss import check_beta, check_label_smoothing, check_weights
from ..registry import BoundLoss, PairwiseLoss
from ..releases import install
from . import data
from .names import installed_flag, versions

_PARTS = "each rank has only a part of a sequence or of its heads"
_GRAPHS = "each batch would be compiled anew"
# Numbers that OpenRLHF divides or slices by.
_AT_LEAST_1 = ("train.batch_size", "train.micro_batch_size", "data.max_samples", "data.max_len")
# What shared prompts can't be combined with: a flag as OpenRLHF spells it, from 0.10.2 on or
# before, the value that is fine, and why another one isn't.
_CONFLICTS_OF_SHARED = (
    (("ds.ring_attn_size", "ring_attn_size"), 1, _PARTS),
    (("ds.tensor_parallel_size", "ds_tensor_parallel_size"), 1, _PARTS),
    (("ds.deepcompile", "deepcompile"), False, _GRAPHS),
)


def check(namespace: Namespace, loss: BoundLoss) -> None:
    """Refuse flags that can't be combined with the loss; ``precompute_dir`` gets its default.

    Args:
        namespace: the parsed command line, by the flags' names.

    Raises:
        ValueError: the message names the flag.
    """
    values = vars(namespace)
    _check_host_flags(values, loss.name)
    _check_precompute(values, loss.source)
    if values.get(f"{loss.name}.shared_prompts"):
        _check_shared(values, f"--{loss.name}.shared_prompts")
    if values.get(f"{loss.name}.balanced_batches"):
        _check_balanced(values, loss, f"--{loss.name}.balanced_batches")
    keys = (installed_flag(f"data.{of}_key", values) for of in ("chosen", "rejected", "prompt"))
    data.check_local(namespace, [column for key in keys if (column := values.get(key))])


def _check_host_flags(values: dict[str, Any], name: str) -> None:
    """Check OpenRLHF's own flags that go into the loss: OpenRLHF doesn't check them itself."""
    flags = {
        option: installed_flag(f"model.{option}", values)
        for option in ("beta", "label_smoothing", "ipo_enable")
    }
    for flag in flags.values():
        if flag not in values:
            raise InvalidValue(
                f"{versions()}: OpenRLHF has no flag --{flag}, which goes into the loss {name}. "
                f"{install('openrlhf')}"
            )
    for option, check in (("beta", check_beta), ("label_smoothing", check_label_smoothing)):
        with named(f"--{flags[option].removesuffix(option)}"):
            check(values[flags[option]])
    for number in _AT_LEAST_1:
        flag = installed_flag(number, values)
        if values[flag] is not None and values[flag] < 1:
            raise InvalidValue(f"--{flag} must be at least 1, got {values[flag]!r}.")
    for of in ("nll", "aux"):
        flag = installed_flag(f"model.{of}_loss_coef", values)
        check_weights(f"--{flag}", values[flag])
    if values[flags["ipo_enable"]]:
        raise InvalidValue(
            f"--{flags['ipo_enable']} must be left out with --loss {name}, got both: IPO is "
            "another loss. Remove one of the two."
        )


def _check_precompute(values: dict[str, Any], loss: PairwiseLoss) -> None:
    """``precompute_dir`` needs ``precompute_ref``; its default is OpenRLHF's output folder."""
    ref, folder = (f"{loss.name}.precompute_{of}" for of in ("ref", "dir"))
    if values.get(ref):
        values.setdefault(folder, values[installed_flag("ckpt.output_dir", values)])
    elif folder in values:
        raise InvalidValue(
            f"--{folder} needs --{ref}, got only {values[folder]!r}. Add --{ref}, or remove "
            f"--{folder}."
        )


def _check_shared(values: dict[str, Any], asked: str) -> None:
    for flags, fine, why in _CONFLICTS_OF_SHARED:
        for flag in flags:
            if values.get(flag, fine) != fine:
                raise conflict(asked, f"--{flag}", values[flag], why, "Remove one of the two")


def _check_balanced(values: dict[str, Any], loss: BoundLoss, asked: str) -> None:
    """Refuse what makes a pair's loss depend on the other pairs of its batch."""
    check_loss(loss, asked)
    flag = installed_flag("model.aux_loss_coef", values)
    if values[flag] > 0:
        why = "the routers' loss is computed from all tokens of a micro-batch"
        raise conflict(asked, f"--{flag}", values[flag], why, "Remove one of the two")
