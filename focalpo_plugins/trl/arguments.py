"""Checks of TRL's arguments, before a trainer is built."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from accelerate import ParallelismConfig
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments
from trl import DPOConfig, DPOTrainer

from ..errors import InvalidValue, conflict
from ..hf_batches import check_batches
from ..loss import check_beta, check_label_smoothing, check_weights
from .exchange import check_loss_types


def by_name(trainer: type, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A trainer's arguments by name.

    Classes between our trainer and TRL's may take more arguments by name, but none by position.
    """
    names = list(inspect.signature(trainer.__init__).parameters)[1:]  # type: ignore[misc]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def check_arguments(args: DPOConfig, key: str | None = None) -> str | None:
    """Check TRL's arguments, and return the key that asks for the fused path.

    Args:
        key: a key outside of ``args`` that asks for the fused path.

    Returns:
        The key; None for TRL's plain path, or for the fused path of its own that TRL has from 1.14
        on.

    Raises:
        ValueError: they ask for something that a pairwise loss can't be combined with.
    """
    check_beta(args.beta)
    check_label_smoothing(args.label_smoothing)
    check_weights("loss_weights", *(args.loss_weights or ()))
    check_parallelism(args)
    check_batches(args)
    types = [args.loss_type] if isinstance(args.loss_type, str) else list(args.loss_type)
    check_loss_types(types)
    divergence = str(getattr(args.f_divergence_type, "value", args.f_divergence_type))
    if divergence != "reverse_kl":
        raise InvalidValue(
            f"f_divergence_type must be reverse_kl, got {divergence!r}: with another divergence "
            "the log-sigmoid's argument isn't a difference of log-ratios. Remove it."
        )
    if not hasattr(DPOTrainer, "_compute_loss_liger"):
        return None
    asking = ("focalpo_fused", "use_liger_kernel")
    key = key or next((name for name in asking if getattr(args, name, False)), None)
    if key is None:
        return None
    if hasattr(DPOTrainer, "_truncate_inputs"):
        raise InvalidValue(
            f"{key} needs trl 1.0 or later, got trl {version('trl')}, which cuts sequences inside "
            f"the step. Install a later release, or remove {key}."
        )
    if args.use_liger_kernel and find_spec("liger_kernel") is None:
        raise InvalidValue(
            "use_liger_kernel needs the package liger-kernel, which is not installed. Install it, "
            "or set focalpo_fused instead, which needs no package."
        )
    _check_fused_arguments(args, types, key)
    return key


def check_parallelism(args: TrainingArguments) -> None:
    config = getattr(args, "parallelism_config", None)
    if config is None and parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        config = ParallelismConfig()  # what accelerate's own config file asks for
    for name in ("cp_size", "sp_size"):
        size = getattr(config, name, 1)
        if size not in (None, 1):
            raise InvalidValue(
                f"parallelism_config.{name} must be 1, got {size!r}: each rank would have only a "
                "part of each sequence, but a margin needs whole sequences. Remove it; "
                "focalpo_fused and ZeRO-3 also save memory."
            )


def _check_fused_arguments(args: DPOConfig, types: Sequence[str], key: str) -> None:
    """Refuse arguments that add to the loss what the fused path does not compute."""
    wrong = {
        "loss_type": (list(types) != ["sigmoid"], "set loss_type to 'sigmoid'"),
        "loss_weights": (args.loss_weights not in (None, [1.0]), "remove loss_weights"),
        "ld_alpha": (args.ld_alpha is not None, "remove ld_alpha"),
        "use_weighting": (bool(args.use_weighting), "set use_weighting to False"),
    }
    for name, (is_wrong, instead) in wrong.items():
        if is_wrong:
            raise not_fused(key, name, getattr(args, name), instead)


def not_fused(key: str, name: str, value: Any, instead: str = "") -> InvalidValue:
    """The error for ``key``, the fused path, combined with ``name``.

    Args:
        instead: a solution other than setting ``key`` to false.
    """
    fix = f"Set {key} to false{f', or {instead}' * bool(instead)}"
    return conflict(key, name, value, "the fused path does not compute it", fix)
