"""TRL's DPO trainer with another pairwise loss; the only change with respect to it is the loss.

``DPOTrainer._compute_loss`` has no hook for the loss, but its DPO-family branches call
``F.logsigmoid`` on the reward margin, with ``F`` a name of the trainer's module.  For the length
of that call the name stands for a proxy whose ``logsigmoid`` is minus our loss.  The calls are
counted, and a count other than the expected one stops the run: a TRL that moves its loss must
never train DPO under another loss's name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import DPOConfig, DPOTrainer

from .. import pairs
from ..diagnostics import margin_sums, means, not_finite, stop
from ..files import check_folder
from ..messages import say
from ..registry import BoundLoss, check_unchanged, get_loss, named
from .checks import check_arguments, check_host, seam, seam_module
from .fused_step import FusedStepMixin

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
        focalpo_fused: compute the loss without ever holding the logits of the batch, with or
            without a precomputed reference; Liger's package isn't needed. A TRL from 1.14 on has
            such a path of its own, and takes it anyway.
        focalpo_allow_changed: resume from a checkpoint that was trained with another loss, gamma,
            variant, beta, label smoothing or loss type, or with a loss not ours.
        focalpo_allow_data: train on data of which more than half can't be learnt from.

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
    focalpo_fused: bool = field(
        default=False, metadata={"help": "Never hold the logits of the batch."}
    )
    focalpo_allow_changed: bool = field(
        default=False, metadata={"help": "Resume a checkpoint that another loss has trained."}
    )
    focalpo_allow_data: bool = field(
        default=False, metadata={"help": "Train on data that mostly can't be learnt from."}
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


class PairwiseLossMixin(FusedStepMixin):
    """A TRL DPO trainer's loss, exchanged.  Stands before the trainer in the list of bases, and
    trains nothing before :meth:`set_loss` was called.

    Attributes:
        pairwise_loss: the loss that is trained.
    """

    pairwise_loss: BoundLoss | None = None
    _reference_freed = False
    _allow_changed = False
    _allow_data = False
    _train_data_seen = False
    _marker: str | None = None  # a text that the host renders beside an answer
    _written: Mapping[str, str] = {}  # TRL's arguments, where a config has other names for them

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_host()
        config = kwargs.get("args", args[2] if len(args) > 2 else None)
        if config is not None:
            self._fused = check_arguments(config, self._fused)
        train_dataset = kwargs.get("train_dataset", args[4] if len(args) > 4 else None)
        if train_dataset is not None and next(iter(train_dataset), None) is None:
            raise ValueError(
                "train_dataset must hold a pair, got none: it was empty, or every pair of it was "
                "dropped as too long. Look at the data, or raise Axolotl's sequence_len."
            )
        super().__init__(*args, **kwargs)
        self._margin_sums: dict[str, Tensor] = {}
        self._steps_recorded = 0
        if self.precompute_ref_logps and self.ref_model is not None:
            self._free_reference()

    def set_loss(self, loss: BoundLoss, packages: Sequence[str] = ("trl", "torch")) -> None:
        """Train with ``loss`` from now on, and say so in one line on the main process.

        Args:
            loss: a registered loss, bound to its options.
            packages: whose versions the line names.
        """
        self.pairwise_loss = loss
        self.add_callback(_Record(self._record_of_loss(loss)))
        is_focalpo = loss.name == "focalpo"
        self._name, self._paper = ("FocalPO", _PAPER) if is_focalpo else (loss.name, {})
        self._tag_names: list[str] = [*self._tag_names, loss.name]
        self.model.add_model_tags([loss.name])
        if self.accelerator.is_main_process:
            versions = " ".join(
                f"{name}={version(name)}" for name in ("focalpo_plugins", *packages)
            )
            say(
                f"active. {loss.describe()} beta={self.beta} "
                f"{'path=fused ' if self._fused else ''}trainer={type(self).__name__} {versions}"
            )

    def _record_of_loss(self, loss: BoundLoss) -> dict[str, Any]:
        return loss.record(
            "_",
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            loss_type=list(self.loss_types),
        )

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """TRL's own.

        Raises:
            ValueError: the checkpoint to resume from was trained with another loss, or checkpoints
                can't be written where they are asked for.
        """
        if self.args.should_save and self.args.save_strategy != "no":
            check_folder(Path(self.args.output_dir), "output_dir")
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(str(self.args.output_dir))
        ours = self.pairwise_loss is not None and not self._allow_changed
        if folder and ours and Path(folder).is_dir():  # else the host says so itself
            assert self.pairwise_loss is not None
            asked = self._record_of_loss(self.pairwise_loss)
            allow = "focalpo_allow_changed: true"
            check_unchanged(_recorded(Path(folder)), asked, str(folder), allow, self._written)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        if self.pairwise_loss is None:
            raise RuntimeError(
                f"{type(self).__name__} has no pairwise loss yet, and would train DPO: call "
                "set_loss() before training."
            )
        if self._fused is not None:
            if return_outputs:
                raise RuntimeError(
                    f"{self._fused} has no outputs to return: the logits are never there as a "
                    f"whole. Remove {self._fused}."
                )
            return self._fused_step(model, inputs)
        recorded = self._steps_recorded
        result = super().compute_loss(model, inputs, return_outputs, **kwargs)
        if self._steps_recorded != recorded + 1:
            raise RuntimeError(
                f"trl {version('trl')} computed the loss in a way that focalpo_plugins "
                f"{version('focalpo_plugins')} does not know, and this step would not have trained "
                f"{self.pairwise_loss.name}. Use a trl release that the README lists."
            )
        return result

    def _compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = self.pairwise_loss
        assert loss is not None  # compute_loss
        smoothing = [self.label_smoothing if own else 0.0 for own in seam(self.loss_types)]
        margins: list[Tensor] = []

        def logsigmoid(z: Tensor) -> Tensor:
            margins.append(z)
            if len(margins) > len(smoothing):
                return z  # the count below stops the run
            return -loss(z, smoothing[len(margins) - 1])

        with _logsigmoid_replaced(seam_module(), logsigmoid):
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

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, *more: Any, **named: Any
    ) -> Any:
        """The host's own, and a look at what it made; the training data come first, and before a
        reference is precomputed.  Images are prepared later, and not looked at.

        Raises:
            ValueError: most of the training data can't be learnt from.
        """
        first: dict[str, Any] = next(iter(dataset), {})
        prepared = super()._prepare_dataset(dataset, processing_class, args, *more, **named)
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        shared = "prompt" not in first and isinstance(first.get("chosen"), str)
        self._check_pairs(prepared, tokenizer, args, shared)
        self._train_data_seen = True
        return prepared

    def _check_pairs(self, dataset: Any, tokenizer: Any, args: Any, shared: bool) -> None:
        """Refuse token ids that nothing can be learnt from; on each rank, of the same rows."""
        columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
        if isinstance(dataset, Dataset):
            rows = pairs.places(len(dataset))
            found = dataset.select_columns(columns).select(rows)
        else:
            rows, found = range(pairs.FIRST), dataset.take(pairs.FIRST)
        pairs.check(
            ((row, *map(pair.get, columns)) for row, pair in zip(rows, found, strict=False)),
            tokenizer,
            key="max_length",
            # As TRL's collator cuts, and before 1.0 its step.
            limit=args.max_length,
            keep_end=getattr(args, "truncation_mode", None) == "keep_end",
            shared=shared,
            marker=self._marker,
            allow="focalpo_allow_data: true",
            allowed=self._allow_data,
            say=args.process_index == 0,
            evaluation=self._train_data_seen,
        )

    def _free_reference(self) -> None:
        """Its log-probs are in the data now, and nothing else is asked of it."""
        reference = self.accelerator.unwrap_model(self.ref_model)
        models = self.accelerator._models
        self.accelerator._models = [model for model in models if model is not reference]
        self.ref_model = None
        self._reference_freed = True

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> Any:
        if self._reference_freed and not isinstance(eval_dataset, str | None):
            raise ValueError(
                f"eval_dataset must be given to {type(self).__name__}, got one in evaluate(): with "
                "precompute_ref_log_probs the reference is gone once the trainer is built. Build "
                "the trainer with it, or set precompute_ref_log_probs to false."
            )
        return super().evaluate(eval_dataset, *args, **kwargs)

    def _record(self, margins: Tensor) -> None:
        """Add the margins of one step, from all ranks, to what is logged next."""
        assert self.pairwise_loss is not None
        # gather_for_metrics drops the rows that an uneven last batch repeats.
        rows = len(margins)
        margins = self.accelerator.gather_for_metrics(margins.detach())
        if not margins.isfinite().all():
            when = "step" if self._mode() == "train" else "evaluation before step"
            ranks = enumerate(torch.split(margins, rows))
            found = [not_finite(of_rank, rank) for rank, of_rank in ranks]
            where = [words for words in found if words]
            stop(self.pairwise_loss.name, f"{when} {self.state.global_step + 1}", where)
        sums = margin_sums(margins, self.pairwise_loss)
        mode = self._mode()
        self._margin_sums[mode] = self._margin_sums.get(mode, 0) + sums
        self._steps_recorded += 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        mode = self._mode()
        sums = self._margin_sums.pop(mode, None)
        if sums is not None and self.pairwise_loss is not None:
            prefix = "eval_" if mode == "eval" else ""
            for name, value in means(sums, self.pairwise_loss).items():
                logs[prefix + name] = value
        super().log(logs, *args, **kwargs)

    def _mode(self) -> str:
        # As TRL tells the two apart for its own metrics.
        return "train" if self.model.training else "eval"


class _Record(TrainerCallback, ExportableState):
    """Has transformers write what was trained into each checkpoint's trainer_state.json."""

    def __init__(self, record: Mapping[str, Any] | None = None) -> None:
        self.record = record

    def state(self) -> dict[str, Any]:
        return {"args": {"record": self.record}, "attributes": {}}


def _recorded(checkpoint: Path) -> dict[str, Any] | None:
    """The record in a checkpoint; None where no loss of ours has trained it."""
    path = checkpoint / TRAINER_STATE_NAME
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        found = state["stateful_callbacks"].get(_Record.__name__)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"resume_from_checkpoint must be a whole checkpoint, got {str(checkpoint)!r}: "
            f"{path.name} can't be read ({error}), as where a run was killed while it saved. "
            "Remove the folder, and resume from an earlier one."
        ) from None
    # A list where a trainer was given its loss twice.
    last = found[-1] if isinstance(found, list) else found
    return None if last is None else last["args"]["record"]


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
        self._allow_data = args.focalpo_allow_data
        super().__init__(model, ref_model, args, **kwargs)
        self._allow_changed = args.focalpo_allow_changed
        self.set_loss(args.pairwise_loss())


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
