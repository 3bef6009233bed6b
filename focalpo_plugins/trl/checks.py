"""What TRL is, and what it is asked for, before a trainer is built: ours, or refused."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch.nn.functional as F
from accelerate import ParallelismConfig
from accelerate.utils import parse_flag_from_env
from trl import DPOConfig, DPOTrainer

from ..loss import check_beta, check_label_smoothing

# For each TRL loss type that a pairwise loss can take the place of, the log-sigmoids it calls,
# each with whether our label smoothing goes in: `robust` does its own, with a second log-sigmoid.
_SEAM: Mapping[str, Sequence[bool]] = {
    "sigmoid": (True,),
    "sigmoid_norm": (True,),
    "robust": (False, False),
    "sft": (),
}

_WHY_NOT = {
    "nca_pair": "its log-sigmoids are of each reward, not of the margin",
    "bco_pair": "its log-sigmoids are of each reward, not of the margin",
    "exo_pair": "its log-sigmoid is one term of a divergence, not the loss",
    "discopop": "its log-sigmoid is blended with an exponential",
    "aot": "it sorts the batch, and a sorted margin belongs to no pair",
    "aot_unpaired": "it sorts the batch, and a sorted margin belongs to no pair",
    "hinge": "it has no log-sigmoid of the margin",
    "ipo": "it has no log-sigmoid of the margin",
    "sppo_hard": "it has no log-sigmoid of the margin",
    "apo_zero": "it has no log-sigmoid of the margin",
    "apo_down": "it has no log-sigmoid of the margin",
}


def check_host() -> None:
    """Raise ``RuntimeError`` unless the installed TRL computes its loss where we exchange it."""
    method = inspect.unwrap(getattr(DPOTrainer, "_compute_loss", check_host))
    names = method.__code__.co_names
    if "logsigmoid" not in names or getattr(seam_module(), "F", None) is not F:
        raise RuntimeError(
            f"focalpo_plugins {version('focalpo_plugins')} does not know where trl "
            f"{version('trl')} computes its DPO loss: it must call F.logsigmoid in "
            "DPOTrainer._compute_loss, as trl 0.29 to 1.16 do. Install one of these."
        )


def check_arguments(args: DPOConfig, fused: str | None = None) -> str | None:
    """Check TRL's arguments, and say which key asks for the fused path.

    Args:
        fused: a key that asks for it beside those of ``args``.

    Returns:
        The key; None where the loss is to be TRL's plain path, or the fused one of its own that TRL
        has from 1.14 on.

    Raises:
        ValueError: they ask for what a pairwise loss can't be part of.
    """
    check_beta(args.beta)
    check_label_smoothing(args.label_smoothing)
    _check_parallelism(args)
    types = [args.loss_type] if isinstance(args.loss_type, str) else list(args.loss_type)
    check_loss_types(types)
    divergence = str(getattr(args.f_divergence_type, "value", args.f_divergence_type))
    if divergence != "reverse_kl":
        raise ValueError(
            f"f_divergence_type must be reverse_kl, got {divergence!r}: with another divergence "
            "the log-sigmoid's argument is no difference of log-ratios. Remove it."
        )
    if not hasattr(DPOTrainer, "_compute_loss_liger"):
        return None
    for key in ("focalpo_fused", "use_liger_kernel"):
        if getattr(args, key, False):
            fused = fused or key
    if fused is not None:
        if hasattr(DPOTrainer, "_truncate_inputs"):
            raise ValueError(
                f"{fused} needs trl 1.0 or a later one, got trl {version('trl')}: it cuts "
                f"sequences in the step itself. Install a later one, or remove {fused}."
            )
        if args.use_liger_kernel and find_spec("liger_kernel") is None:
            raise ValueError(
                "use_liger_kernel needs the package liger-kernel, which is not installed. Install "
                "it, or set focalpo_fused in its place, which needs nothing."
            )
        _check_fused_arguments(args, types, fused)
    return fused


def _check_parallelism(args: DPOConfig) -> None:
    config = getattr(args, "parallelism_config", None)
    if config is None and parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        config = ParallelismConfig()  # what accelerate's own config file asks for
    for name in ("cp_size", "sp_size"):
        size = getattr(config, name, 1)
        if size not in (None, 1):
            raise ValueError(
                f"parallelism_config.{name} must be 1, got {size!r}: each rank then has a part of "
                "a sequence and its logits, and a margin is of whole sequences. Remove it; "
                "focalpo_fused and ZeRO-3 save memory too."
            )


def check_loss_types(types: Sequence[str], key: str = "loss_type") -> None:
    """Raise ``ValueError`` unless each of TRL's loss types is one that a pairwise loss can stand in
    for, and one at least is not ``sft``."""
    for loss_type in types:
        if str(loss_type) not in _SEAM:
            why = _WHY_NOT.get(str(loss_type), "it is not known to be a log-sigmoid of the margin")
            raise ValueError(
                f"{key} must be of {', '.join(_SEAM)}, got {loss_type!r}: {why}. Remove it; "
                "'sigmoid' is the default."
            )
    if not seam(types):
        raise ValueError(
            f"{key} must hold one of sigmoid, sigmoid_norm, robust, got {list(types)}: there is no "
            "preference loss in it. Put 'sigmoid' beside 'sft'."
        )


def _check_fused_arguments(args: DPOConfig, types: Sequence[str], key: str) -> None:
    asked = {
        "loss_type": list(types) if list(types) != ["sigmoid"] else None,
        "loss_weights": args.loss_weights if args.loss_weights not in (None, [1.0]) else None,
        "ld_alpha": args.ld_alpha,
        "use_weighting": args.use_weighting or None,
    }
    refuse(asked, key)


def refuse(asked: Mapping[str, Any], key: str) -> None:
    """Raise ``ValueError`` if one has a value: ``key`` can't be combined with it."""
    for name, value in asked.items():
        if value is not None:
            raise ValueError(
                f"{key} can't be combined with {name}, got {value!r}: the fused path has no part "
                f"for it. Set {key} to false, or remove {name}."
            )


def seam(types: Sequence[str]) -> list[bool]:
    """For each log-sigmoid that TRL calls for them, whether our label smoothing goes in."""
    return [own for loss_type in types for own in _SEAM[loss_type]]


def seam_module() -> ModuleType:
    """Where TRL's trainer looks up the name ``F``, ours for the length of its loss method."""
    return sys.modules[DPOTrainer.__module__]
