"""TRL's DPO trainer with another pairwise loss; the only change with respect to it is the loss.

``DPOTrainer._compute_loss`` has no hook for the loss, but its DPO-family branches call
``F.logsigmoid`` on the reward margin, with ``F`` a name of the trainer's module.  For the length
of that call the name stands for a proxy whose ``logsigmoid`` is minus our loss.  The calls are
counted, and a count other than the expected one stops the run: a TRL that moves its loss must
never train DPO under another loss's name.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor
from trl import DPOConfig, DPOTrainer

from ..diagnostics import margin_sums, means
from ..loss import check_beta, check_label_smoothing
from ..registry import BoundLoss, get_loss, named

if TYPE_CHECKING:
    # What the mixin's super() is, in its place in the list of bases.
    from trl import DPOTrainer as _Host
else:
    _Host = object

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


# What TRL's model card says of the method.
_PAPER = {
    "title": "FocalPO: Enhancing Preference Optimizing by Focusing on Correct Preference Rankings",
    "id": "2501.06645",
    "citation": """\
@inproceedings{liu2025focalpo,
    title = {{FocalPO: Enhancing Preference Optimizing by Focusing on Correct Preference Rankings}},
    author = {Tong Liu and Xiao Yu and Wenxuan Zhou and Jindong Gu and Volker Tresp},
    booktitle = {ACL (Short Papers)},
    year = 2025
}""",
}


@dataclass
class FocalPOConfig(DPOConfig):
    """TRL's ``DPOConfig`` with FocalPO's knobs.

    Args:
        focalpo_gamma: focusing parameter gamma of Eq. 4, the paper's 0.05 by default.
        focalpo_variant: ``correct`` (Eq. 4), ``correct_exact`` (Eq. 3) or ``incorrect``.
        focalpo_allow_reversed: accept a gamma from which on training runs backwards.
        focalpo_loss: the registered loss; another package's name trains that loss, with its
            options at their defaults.

    Raises:
        ValueError: a ``focalpo_*`` value is out of range.
    """

    focalpo_gamma: float = field(
        default=0.05, metadata={"help": "Focusing parameter gamma; 0 is DPO."}
    )
    focalpo_variant: str = field(
        default="correct",
        metadata={"help": "Modulating factor: correct, correct_exact or incorrect."},
    )
    focalpo_allow_reversed: bool = field(
        default=False, metadata={"help": "Accept a gamma that trains backwards."}
    )
    focalpo_loss: str = field(
        default="focalpo", metadata={"help": "Name of the registered pairwise loss."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pairwise_loss()

    def pairwise_loss(self) -> BoundLoss:
        """The loss that the ``focalpo_*`` fields ask for.

        Raises:
            ValueError: a field is out of range; the message names it.
        """
        options = {
            "gamma": self.focalpo_gamma,
            "variant": self.focalpo_variant,
            "allow_reversed": self.focalpo_allow_reversed,
        }
        with named("focalpo_"):
            loss = get_loss(self.focalpo_loss)
            if loss.name == "focalpo":
                return loss.bind(**options)
            for name, default in get_loss("focalpo").options.items():
                if options[name] != default:
                    raise ValueError(
                        f"{name} is an option of focalpo alone, got {options[name]!r} with "
                        f"focalpo_loss={loss.name!r}: remove it."
                    )
            return loss.bind()


class PairwiseLossMixin(_Host):
    """A TRL DPO trainer's loss, exchanged.  Stands before the trainer in the list of bases, and
    trains nothing before :meth:`set_loss` was called."""

    _pairwise_loss: BoundLoss | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_host()
        config = kwargs.get("args", args[2] if len(args) > 2 else None)
        if config is not None:
            check_arguments(config)
        super().__init__(*args, **kwargs)
        self._margin_sums: dict[str, Tensor] = {}
        self._steps_recorded = 0

    def set_loss(self, loss: BoundLoss, packages: Sequence[str] = ("trl", "torch")) -> None:
        """Train with ``loss`` from now on, and say so in one line on the main process.

        Args:
            loss: a registered loss, bound to its options.
            packages: whose versions the line names.
        """
        self._pairwise_loss = loss
        is_focalpo = loss.name == "focalpo"
        self._name, self._paper = ("FocalPO", _PAPER) if is_focalpo else (loss.name, {})
        self._tag_names: list[str] = [*self._tag_names, loss.name]
        self.model.add_model_tags([loss.name])
        if hasattr(self, "liger_loss"):
            from .liger import FusedPairwiseLoss

            self.liger_loss = FusedPairwiseLoss(
                loss, beta=self.beta, label_smoothing=self.label_smoothing, record=self._record
            )
        if self.accelerator.is_main_process:
            versions = " ".join(
                f"{name}={version(name)}" for name in ("focalpo_plugins", *packages)
            )
            print(
                f"focalpo_plugins: active. {loss.describe()} beta={self.beta} "
                f"trainer={type(self).__name__} {versions}",
                file=sys.stderr,
                flush=True,
            )

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        if self._pairwise_loss is None:
            raise RuntimeError(
                f"{type(self).__name__} has no pairwise loss yet, and would train DPO: call "
                "set_loss() before training."
            )
        recorded = self._steps_recorded
        result = super().compute_loss(*args, **kwargs)
        if self._steps_recorded != recorded + 1:
            raise RuntimeError(
                f"trl {version('trl')} computed the loss in a way that focalpo_plugins "
                f"{version('focalpo_plugins')} does not know, and this step would not have trained "
                f"{self._pairwise_loss.name}. Use a trl release that the README lists."
            )
        return result

    def _compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = self._pairwise_loss
        assert loss is not None  # compute_loss
        smoothing = [self.label_smoothing if own else 0.0 for own in _seam(self.loss_types)]
        margins: list[Tensor] = []

        def logsigmoid(z: Tensor) -> Tensor:
            margins.append(z)
            if len(margins) > len(smoothing):
                return z  # the count below stops the run
            return -loss(z, smoothing[len(margins) - 1])

        with _logsigmoid_replaced(_seam_module(), logsigmoid):
            result = super()._compute_loss(*args, **kwargs)
        if len(margins) != len(smoothing):
            raise RuntimeError(
                f"trl {version('trl')} called logsigmoid {len(margins)} times for loss_type "
                f"{list(self.loss_types)}, where focalpo_plugins {version('focalpo_plugins')} "
                f"expects {len(smoothing)}: its loss has moved, and this step would not have "
                f"trained {loss.name}. Use a trl release that the README lists."
            )
        self._record(margins[0])
        return result

    def _record(self, margins: Tensor) -> None:
        """Add the margins of one step, from all ranks, to what is logged next."""
        assert self._pairwise_loss is not None
        # gather_for_metrics drops the rows that an uneven last batch repeats.
        margins = self.accelerator.gather_for_metrics(margins.detach())
        sums = margin_sums(margins, self._pairwise_loss)
        mode = self._mode()
        self._margin_sums[mode] = self._margin_sums.get(mode, 0) + sums
        self._steps_recorded += 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        mode = self._mode()
        sums = self._margin_sums.pop(mode, None)
        if sums is not None and self._pairwise_loss is not None:
            prefix = "eval_" if mode == "eval" else ""
            for name, value in means(sums, self._pairwise_loss).items():
                logs[prefix + name] = value
        super().log(logs, *args, **kwargs)

    def _mode(self) -> str:
        # As TRL tells the two apart for its own metrics.
        return "train" if self.model.training else "eval"


class FocalPOTrainer(PairwiseLossMixin, DPOTrainer):
    """TRL's ``DPOTrainer`` with FocalPO's loss; takes a :class:`FocalPOConfig` as ``args``.

    Raises:
        TypeError: ``args`` is a plain ``DPOConfig``, which has no gamma.
        ValueError: the config asks for something that the loss can't be composed with.
        RuntimeError: the installed TRL computes its loss elsewhere.
    """

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: FocalPOConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            args = FocalPOConfig()
        if not isinstance(args, FocalPOConfig):
            raise TypeError(
                f"args must be a FocalPOConfig, got {type(args).__name__}: FocalPOConfig takes the "
                "same arguments, and focalpo_gamma and focalpo_variant besides."
            )
        super().__init__(model, ref_model, args, **kwargs)
        self.set_loss(args.pairwise_loss())


def check_host() -> None:
    """Raise ``RuntimeError`` unless the installed TRL computes its loss where we exchange it."""
    method = inspect.unwrap(getattr(DPOTrainer, "_compute_loss", check_host))
    names = method.__code__.co_names
    if "logsigmoid" not in names or getattr(_seam_module(), "F", None) is not F:
        raise RuntimeError(
            f"focalpo_plugins {version('focalpo_plugins')} does not know where trl "
            f"{version('trl')} computes its DPO loss: it must call F.logsigmoid in "
            "DPOTrainer._compute_loss, as trl 0.29 to 1.16 do. Install one of these."
        )


def check_arguments(args: DPOConfig) -> None:
    """Raise ``ValueError`` where TRL's arguments ask for what a pairwise loss can't be part of."""
    check_beta(args.beta)
    check_label_smoothing(args.label_smoothing)
    types = [args.loss_type] if isinstance(args.loss_type, str) else list(args.loss_type)
    check_loss_types(types)
    divergence = str(getattr(args.f_divergence_type, "value", args.f_divergence_type))
    if divergence != "reverse_kl":
        raise ValueError(
            f"f_divergence_type must be reverse_kl, got {divergence!r}: with another divergence "
            "the log-sigmoid's argument is no difference of log-ratios. Remove it."
        )
    if args.use_liger_kernel and hasattr(DPOTrainer, "_compute_loss_liger"):
        _check_liger(args, types)


def check_loss_types(types: Sequence[str], key: str = "loss_type") -> None:
    """Raise ``ValueError`` unless each of TRL's loss types is one that a pairwise loss can stand in
    for, and one at least is not ``sft``."""
    for loss_type in types:
        if loss_type not in _SEAM:
            why = _WHY_NOT.get(loss_type, "it is not known to be a log-sigmoid of the margin")
            raise ValueError(
                f"{key} must be of {', '.join(_SEAM)}, got {loss_type!r}: {why}. Remove it; "
                "'sigmoid' is the default."
            )
    if not _seam(types):
        raise ValueError(
            f"{key} must hold one of sigmoid, sigmoid_norm, robust, got {list(types)}: there is no "
            "preference loss in it. Put 'sigmoid' beside 'sft'."
        )


def _check_liger(args: DPOConfig, types: Sequence[str]) -> None:
    """TRL's fused path reads none of these, and would drop them without a word."""
    asked = {
        "loss_type": list(types) if list(types) != ["sigmoid"] else None,
        "loss_weights": args.loss_weights if args.loss_weights not in (None, [1.0]) else None,
        "ld_alpha": args.ld_alpha,
        "use_weighting": args.use_weighting or None,
    }
    for name, value in asked.items():
        if value is not None:
            raise ValueError(
                f"use_liger_kernel can't be combined with {name}, got {value!r}: TRL's fused loss "
                f"would ignore it. Set use_liger_kernel to false, or remove {name}."
            )


def _seam(types: Sequence[str]) -> list[bool]:
    return [own for loss_type in types for own in _SEAM[loss_type]]


def _seam_module() -> ModuleType:
    return sys.modules[DPOTrainer.__module__]


@contextmanager
def _logsigmoid_replaced(
    module: ModuleType, logsigmoid: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    functional = module.F
    module.F = _Functional(functional, logsigmoid)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.F = functional  # type: ignore[attr-defined]


class _Functional:
    """``torch.nn.functional`` with another ``logsigmoid``."""

    def __init__(self, functional: ModuleType, logsigmoid: Callable[[Tensor], Tensor]) -> None:
        self._functional = functional
        self.logsigmoid = logsigmoid

    def __getattr__(self, name: str) -> Any:
        return getattr(self._functional, name)
