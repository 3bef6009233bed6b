"""TRL's DPO trainer with another pairwise loss; the only change with respect to it is the loss.

``DPOTrainer._compute_loss`` has no hook for the loss, but its DPO-family branches call
``F.logsigmoid`` on the reward margin, with ``F`` a name of the trainer's module.  For the length
of that call the name stands for a proxy whose ``logsigmoid`` is minus our loss.  The calls are
counted, and a count other than the expected one stops the run: a TRL that moves its loss must
never train DPO under another loss's name.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from accelerate import ParallelismConfig
from accelerate.utils import is_peft_model, parse_flag_from_env
from datasets import Dataset
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import DPOConfig, DPOTrainer
from trl.models.utils import _ForwardRedirection, disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from .. import pairs
from ..diagnostics import margin_sums, means, not_finite, stop
from ..loss import check_beta, check_label_smoothing
from ..registry import BoundLoss, check_unchanged, get_loss, named
from .fused import IGNORED, FusedLoss, fused_logps, fused_pairwise_loss
from .head import Head, check_config, check_logits, gathered, head_of

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


# Tokens of the first sequence on which the output layer is compared with the model, once.
_TOKENS_COMPARED = 16

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
    trains nothing before :meth:`set_loss` was called.

    Attributes:
        pairwise_loss: the loss that is trained.
    """

    pairwise_loss: BoundLoss | None = None
    ref_model: Any
    # The key that asked for the fused path, None where none did.
    _fused: str | None = None
    _reference_freed = False
    _allow_changed = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_host()
        config = kwargs.get("args", args[2] if len(args) > 2 else None)
        if config is not None:
            self._fused = check_arguments(config, self._fused)
        train_dataset = kwargs.get("train_dataset", args[4] if len(args) > 4 else None)
        if isinstance(train_dataset, Dataset) and not len(train_dataset):
            raise ValueError(
                "train_dataset must hold a pair, got none: it was empty, or every pair of it was "
                "dropped as too long. Look at the data, or raise Axolotl's sequence_len."
            )
        # By identity, the models whose output layer was seen to give their logits.
        self._compared: set[int] = set()
        super().__init__(*args, **kwargs)
        self._margin_sums: dict[str, Tensor] = {}
        self._steps_recorded = 0
        if self._fused is not None:
            self._check_fused(self._fused)
        if self.precompute_ref_logps and self.ref_model is not None:
            self._free_reference()
        if isinstance(self.train_dataset, Dataset) and not self._is_vlm:
            self._check_pairs(self.train_dataset)

    # TRL asks itself whether to take Liger's path. It never does: ours stands in its place, and the
    # argument of the same name still puts Liger's layers into the model.
    @property
    def use_liger_kernel(self) -> bool:
        return False

    @use_liger_kernel.setter
    def use_liger_kernel(self, asked: bool) -> None:
        pass

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
            print(
                f"focalpo_plugins: active. {loss.describe()} beta={self.beta} "
                f"{'path=fused ' if self._fused else ''}trainer={type(self).__name__} {versions}",
                file=sys.stderr,
                flush=True,
            )

    def _record_of_loss(self, loss: BoundLoss) -> dict[str, Any]:
        """What a checkpoint was trained with, by the key or field that asks for it."""
        asked = {f"{loss.name}_{o}": v for o, v in loss.options.items() if o != "allow_reversed"}
        hosts = {"beta": self.beta, "label_smoothing": self.label_smoothing}
        return {"loss": loss.name, **asked, **hosts, "loss_type": list(self.loss_types)}

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """TRL's own.

        Raises:
            ValueError: the checkpoint to resume from was trained with another loss.
        """
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(str(self.args.output_dir))
        ours = self.pairwise_loss is not None and not self._allow_changed
        if folder and ours and Path(folder).is_dir():  # else the host says so itself
            assert self.pairwise_loss is not None
            asked = self._record_of_loss(self.pairwise_loss)
            check_unchanged(
                _recorded(Path(folder)), asked, str(folder), "focalpo_allow_changed: true"
            )
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

    def _fused_step(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """The loss of a batch by the fused path, with what TRL logs on Liger's."""
        ref_logps = None
        if self.precompute_ref_logps:
            ref_logps = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        elif self.ref_model is not None:
            ref_logps = self._inside(self.ref_model, self._fused_logps, inputs)
        result, ref_logps = self._inside(model, self._fused_loss, inputs, ref_logps)

        mode, metrics = self._mode(), self._metrics[self._mode()]
        gather = self.accelerator.gather_for_metrics
        if mode == "train":
            tokens = gather(inputs["attention_mask"].sum()).sum().item()
            self._total_train_tokens += tokens // getattr(self, "_tp_size", 1)
        metrics["num_tokens"] = [self._total_train_tokens]
        rewards = self.beta * (result.logps - ref_logps)
        counts = inputs["completion_mask"][:, 1:].sum(1)
        sides = zip(
            ("chosen", "rejected"),
            *(values.chunk(2) for values in (rewards, result.logps, result.mean_logits, counts)),
            strict=True,
        )
        for side, reward, logps, mean_logits, count in sides:
            metrics[f"rewards/{side}"].append(gather(reward).mean().item())
            metrics[f"logps/{side}"].append(gather(logps).mean().item())
            total, answers = gather(mean_logits).sum(), gather(count).sum()
            metrics[f"logits/{side}"].append((total / answers.clamp_min(1)).item())
        chosen, rejected = rewards.chunk(2)
        margins = gather(chosen - rejected)
        metrics["rewards/margins"].append(margins.mean().item())
        metrics["rewards/accuracies"].append((margins > 0).float().mean().item())
        self._record(chosen - rejected)
        loss: Tensor = result.loss
        return loss

    def _inside(self, wrapper: Any, method: Callable[..., Any], inputs: Any, *more: Any) -> Any:
        """``method(model, inputs, ...)`` in place of the forward of what ``wrapper`` wraps, so that
        what DDP, DeepSpeed and FSDP do around a forward pass happens around it."""
        model = self.accelerator.unwrap_model(wrapper)
        return _ForwardRedirection()(
            wrapper,
            model,
            # The wrappers may cast what passes through them, and some need a tensor to pass.
            lambda ids: method(model, inputs, *more),
            inputs["input_ids"],
        )

    def _fused_loss(
        self, model: Any, inputs: Mapping[str, Tensor], ref_logps: Tensor | None
    ) -> tuple[FusedLoss, Tensor]:
        loss = self.pairwise_loss
        assert loss is not None  # compute_loss
        if ref_logps is None:
            ref_logps = self._fused_logps(model, inputs)
        with self.accelerator.autocast():
            head, states, labels = self._states(model, inputs)
            with gathered(head.weight, head.bias):
                result = fused_pairwise_loss(
                    states,
                    head.weight,
                    labels,
                    ref_logps,
                    lambda margins: loss(margins, self.label_smoothing),
                    beta=self.beta,
                    bias=head.bias,
                )
        return result, ref_logps

    def _fused_logps(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """The reference's log-probs ``(2B,)``: of ``model``, with its adapters off, or its adapter
        "ref" on, where there is no reference model."""
        if self.ref_model is None and is_peft_model(model):
            adapter = use_adapter(model, "ref" if "ref" in model.peft_config else None)
        else:
            adapter = nullcontext()
        with torch.no_grad(), self._without_checkpointing(), adapter, self.accelerator.autocast():
            head, states, labels = self._states(model, inputs)
            with gathered(head.weight, head.bias):
                return fused_logps(states, head.weight, labels, bias=head.bias)

    def _states(self, model: Any, inputs: Mapping[str, Tensor]) -> tuple[Head, Tensor, Tensor]:
        """The output layer, the last hidden states, and the label of each."""
        assert self._fused is not None
        head = head_of(model, self._fused)
        ids, completion = inputs["input_ids"], inputs["completion_mask"]
        if id(head.model) not in self._compared:
            check_config(head.model.config, self._fused)
            with torch.no_grad(), self._without_checkpointing():
                few = ids[0][inputs["attention_mask"][0].bool()][:_TOKENS_COMPARED]
                check_logits(head, few, self._fused)
            self._compared.add(id(head.model))
        others = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
        arguments = {key: value for key, value in inputs.items() if key not in others}
        states = head.backbone(**arguments, use_cache=False).last_hidden_state
        labels = torch.full_like(ids, IGNORED)
        labels[:, :-1] = torch.where(completion[:, 1:].bool(), ids[:, 1:], IGNORED)
        return head, states, labels

    def _without_checkpointing(self) -> Any:
        return disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)

    def compute_ref_log_probs(self, *args: Any) -> Any:
        # TRL 0.29 has no model among the arguments.
        if self._fused is None:
            return super().compute_ref_log_probs(*args)
        model = args[0] if len(args) > 1 else self.ref_model or self.model
        return self._inside(model, self._fused_logps, args[-1]).chunk(2)

    def _check_fused(self, key: str) -> None:
        """Raise ``ValueError`` for what is known only of the built trainer: TRL checks it for its
        own Liger path alone."""
        check_config(head_of(self.accelerator.unwrap_model(self.model), key).model.config, key)
        asked = {
            "router_aux_loss_coef": self.args.router_aux_loss_coef
            if getattr(self, "aux_loss_enabled", False)
            else None,
            "compute_metrics": self.compute_metrics,
            "a vision model": type(self.processing_class).__name__ if self._is_vlm else None,
        }
        _refuse(asked, key)

    def _check_pairs(self, dataset: Dataset) -> None:
        """Refuse token ids that nothing can be learnt from; on each rank, of the same rows."""
        tokenizer: Any = getattr(self.processing_class, "tokenizer", self.processing_class)
        columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
        rows = pairs.places(len(dataset))
        found = dataset.select_columns(columns).select(rows)
        keeps_start = getattr(self.args, "truncation_mode", "keep_start") == "keep_start"
        pairs.check(
            ((row, *map(pair.get, columns)) for row, pair in zip(rows, found, strict=True)),
            bos=tokenizer.bos_token_id,
            eos=tokenizer.eos_token_id,
            decode=tokenizer.decode,
            key="max_length",
            limit=self.args.max_length if keeps_start else None,
            say=self.accelerator.is_main_process,
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
        super().__init__(model, ref_model, args, **kwargs)
        self._allow_changed = args.focalpo_allow_changed
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
    if not _seam(types):
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
    _refuse(asked, key)


def _refuse(asked: Mapping[str, Any], key: str) -> None:
    for name, value in asked.items():
        if value is not None:
            raise ValueError(
                f"{key} can't be combined with {name}, got {value!r}: the fused path has no part "
                f"for it. Set {key} to false, or remove {name}."
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
