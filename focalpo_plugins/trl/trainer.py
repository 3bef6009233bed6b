"""TRL's DPO trainer with another pairwise loss; the only change with respect to it is the loss."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from transformers.trainer_utils import get_last_checkpoint
from trl import DPOTrainer

from ..diagnostics import MARGINS, margin_sums, means
from ..guards import pairs
from ..guards.folders import check_folder
from ..guards.margins import not_finite, stop
from ..guards.messages import say
from ..guards.resume import check_unchanged
from ..guards.start import check_first_margins
from ..registry import BoundLoss
from .checks import check_arguments, check_fused_parts, check_shared_parts
from .config import FocalPOConfig
from .fused_step import FusedStepMixin
from .record import Record, recorded
from .seam import check_host, exchanged

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


class PairwiseLossMixin(FusedStepMixin):
    """A TRL DPO trainer's loss, exchanged.  Stands before the trainer in the list of bases, and
    trains nothing before :meth:`set_loss` was called.

    Attributes:
        pairwise_loss: the loss that is trained.
    """

    pairwise_loss: BoundLoss | None = None
    _packages: Sequence[str] = ("trl", "torch")  # whose versions the start-up line names
    _said_active = False
    _allow_changed = False
    _allow_data = False
    _train_data_seen = False
    _marker: str | None = None  # a text that the host renders beside an answer
    # Whether a reference that was given is kept for data that `evaluate()` is given later on.
    _keeps_reference = True
    _kept_reference: Any = None
    _reference_freed = False
    _written: Mapping[str, str] = {}  # TRL's arguments, where a config has other names for them

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_host()
        # The trainers between this one and TRL's may take more by name, and nothing by position.
        names = list(inspect.signature(DPOTrainer.__init__).parameters)[1:]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        config = given.get("args")
        if config is not None:
            self._fused_key = check_arguments(config, self._fused_key)
            if self._fused_key is not None:
                check_fused_parts(given, config, self._fused_key)
            if self._shared_key is None and getattr(config, "focalpo_shared_prompts", False):
                self._shared_key = "focalpo_shared_prompts"
            if self._shared_key is not None:
                check_shared_parts(given, config, self._shared_key)
        self._starts_as_reference = _same_weights(given.get("model"), given.get("ref_model"))
        train_dataset = given.get("train_dataset")
        if train_dataset is not None and next(iter(train_dataset), None) is None:
            raise ValueError(
                "train_dataset must hold a pair, got none: it was empty, or every pair of it was "
                "dropped as too long. Look at the data, or raise Axolotl's sequence_len."
            )
        super().__init__(*args, **kwargs)
        self._margin_sums: dict[str, Tensor] = {}
        self._steps_recorded = 0
        self._window: set[int] = set()  # the steps that the next log is of
        if self.precompute_ref_logps and self.ref_model is not None:
            self._set_reference_aside()

    def set_loss(self, loss: BoundLoss) -> None:
        """Train with ``loss`` from now on.

        Args:
            loss: a registered loss, bound to its options.
        """
        self.pairwise_loss = loss
        self._said_active = False
        self.add_callback(Record(self._record_of_loss(loss)))
        is_focalpo = loss.name == "focalpo"
        self._name, self._paper = ("FocalPO", _PAPER) if is_focalpo else (loss.name, {})
        self._tag_names: list[str] = [*self._tag_names, loss.name]
        model: Any = self.model
        model.add_model_tags([loss.name])

    def _say_active(self) -> None:
        """Say what is trained, once, on the main process; nothing refuses the run any more."""
        if self.pairwise_loss is None or self._said_active:
            return
        self._said_active = True
        if self.accelerator.is_main_process:
            versions = " ".join(
                f"{name}={version(name)}" for name in ("focalpo_plugins", *self._packages)
            )
            sharing = self._sharing
            shared = "" if sharing is None else sharing.describe(self.accelerator.device)
            say(
                f"active. {self.pairwise_loss.describe()} beta={self.beta} "
                f"{'path=fused ' if self._fused else ''}{shared}"
                f"trainer={type(self).__name__} {versions}"
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
        self._all_together(lambda: self._check_before_training(resume_from_checkpoint))
        self._say_active()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _check_before_training(self, resume_from_checkpoint: str | bool | None) -> None:
        if self.args.should_save and self.args.save_strategy != "no":
            check_folder(Path(str(self.args.output_dir)), "output_dir")
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(str(self.args.output_dir))
        if folder:
            self._starts_as_reference = False
        if self.pairwise_loss is None or self._allow_changed or not folder:
            return
        if Path(folder).is_dir():  # else the host says so itself
            asked = self._record_of_loss(self.pairwise_loss)
            allow = "focalpo_allow_changed: true"
            check_unchanged(recorded(Path(folder)), asked, str(folder), allow, self._written)

    def _all_together(self, check: Callable[[], None]) -> None:
        """Run ``check`` on every rank, and raise on all where it raises on one.

        A rank that ended alone would leave the others waiting for it.

        Raises:
            ValueError: what the first rank that found something found.
        """
        problem = ""
        try:
            check()
        except ValueError as error:
            problem = str(error)
        for found in gather_object([problem]):
            if found:
                raise ValueError(found)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        if self.pairwise_loss is None:
            raise RuntimeError(
                f"{type(self).__name__} has no pairwise loss yet, and would train DPO: call "
                "set_loss() before training."
            )
        if self._fused:
            if return_outputs:
                raise RuntimeError(
                    f"{self._fused_key} has no outputs to return, as predict() asks for: the "
                    f"logits are never there as a whole. Set {self._fused_key} to false."
                )
            with self._prompts_shared(inputs):
                return self._fused_step(model, inputs)
        recorded = self._steps_recorded
        with self._prompts_shared(inputs):
            result = super().compute_loss(model, inputs, return_outputs, *args, **kwargs)
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
        with exchanged(loss, self.loss_types, self.label_smoothing) as margins:
            result = super()._compute_loss(*args, **kwargs)
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

    def _set_reference_aside(self) -> None:
        """Its log-probs are in the data now, and no step asks anything else of it.

        It is freed, or kept for data that ``evaluate()`` is given later on: in the CPU's memory, or
        where DeepSpeed or FSDP have it in parts.
        """
        reference = self.accelerator.unwrap_model(self.ref_model)
        models = self.accelerator._models
        self.accelerator._models = [model for model in models if model is not reference]
        if not self._keeps_reference:
            self._reference_freed = True
        elif self.is_deepspeed_enabled or self.is_fsdp_enabled:
            self._kept_reference = self.ref_model
        else:
            self._kept_reference = _moved(reference, "cpu")
        self.ref_model = None

    @contextmanager
    def _reference_back(self) -> Iterator[None]:
        self.ref_model = self._kept_reference
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if not sharded:
            self.ref_model = _moved(self.ref_model, self.accelerator.device)
        try:
            yield
        finally:
            if not sharded:
                _moved(self.ref_model, "cpu")
            self.ref_model = None

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> Any:
        new_data = not isinstance(eval_dataset, str | None)
        if new_data and self._reference_freed:
            raise ValueError(
                f"eval_dataset must be given to {type(self).__name__}, got one in evaluate(): with "
                "precompute_ref_log_probs the reference is freed once the trainer is built. Build "
                "the trainer with it, or set precompute_ref_log_probs to false."
            )
        back = new_data and self._kept_reference is not None
        with self._reference_back() if back else nullcontext():
            return super().evaluate(eval_dataset, *args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The host's own; the diagnostics of its pairs join its metrics, under its own prefix.

        So each named evaluation set has its own, and so has ``predict()``.
        """
        self._say_active()
        self._margin_sums.pop("eval", None)  # of a loop that was interrupted
        output: Any = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        sums = self._margin_sums.pop("eval", None)
        if sums is not None and self.pairwise_loss is not None:
            for name, value in means(sums, self.pairwise_loss).items():
                output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def _record(self, margins: Tensor) -> None:
        """Add the margins ``(B,)`` of this rank's pairs, and those of the others, to what is logged
        next: in training of every row that is trained, in evaluation of each pair once."""
        loss, mode, margins = self.pairwise_loss, self._mode(), margins.detach()
        assert loss is not None
        if mode == "train":
            # Not gather_for_metrics: transformers fetches all batches of an update ahead, and in
            # the last update of an epoch each would be cut to what is left of the last one.
            tokens = self._tokens_of_step()
            self._window.add(self.state.global_step)
            sums = self.accelerator.reduce(margin_sums(margins, loss, tokens), "sum")
        else:
            # It drops the rows that the sampler repeats so that the last batches are even.
            sums = margin_sums(self.accelerator.gather_for_metrics(margins), loss)
        if not sums[MARGINS].isfinite().all():
            when = "step" if mode == "train" else "evaluation before step"
            found = gather_object([not_finite(margins, self.accelerator.process_index)])
            where = [words for words in found if words]
            stop(loss.name, f"{when} {self.state.global_step + 1}", where)
        if mode == "train" and self._starts_as_reference:
            self._starts_as_reference = False
            self._check_first(margins)
        self._margin_sums[mode] = self._margin_sums.get(mode, 0) + sums
        self._steps_recorded += 1

    def _check_first(self, margins: Tensor) -> None:
        largest = self.accelerator.gather(margins.abs().max()).max().item()
        if self.accelerator.is_main_process:
            model: Any = self.model
            narrow = any(weight.dtype.itemsize < 4 for weight in model.parameters())
            narrow = narrow or self.accelerator.mixed_precision != "no"
            check_first_margins(largest, self.beta, narrow)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's own, which names the base model where that is a model hub's.

        A local folder is named as text here: it is no link, and a hub refuses it as `base_model`.
        """
        super().create_model_card(*args, **kwargs)
        if not self.is_world_process_zero():
            return
        path = Path(str(self.args.output_dir)) / "README.md"
        card = path.read_text(encoding="utf-8")
        model: Any = self.model
        base = getattr(model.config, "_name_or_path", "")
        named = f"`{base}`, a local folder" if base else "a model that was given without a name"
        card = card.replace("[None](https://huggingface.co/None)", named, 1)
        card = card.replace('model="None"', f"model={json.dumps(str(self.args.output_dir))}", 1)
        path.write_text(card, encoding="utf-8")

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        sums = self._margin_sums.pop("train", None) if self._mode() == "train" else None
        if sums is not None and self.pairwise_loss is not None:
            logs.update(means(sums, self.pairwise_loss, len(self._window)))
            self._window.clear()
        super().log(logs, *args, **kwargs)

    def _mode(self) -> str:
        # As TRL tells the two apart for its own metrics.
        model: Any = self.model
        return "train" if model.training else "eval"


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
        *more: Any,
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
            args = FocalPOConfig(f"{Path(name).name}-FocalPO")
        if not isinstance(args, FocalPOConfig):
            raise TypeError(
                f"args must be a FocalPOConfig, got {type(args).__name__}: FocalPOConfig takes the "
                "same arguments, and focalpo_gamma and focalpo_variant besides."
            )
        self._allow_data = args.focalpo_allow_data
        super().__init__(model, ref_model, args, *more, **kwargs)
        self._allow_changed = args.focalpo_allow_changed
        self.set_loss(args.pairwise_loss())

    __init__.__signature__ = inspect.signature(DPOTrainer.__init__)  # type: ignore[attr-defined]


def _same_weights(policy: Any, reference: Any) -> bool:
    """Whether both start with the same weights, as far as is known: TRL makes the reference of the
    policy, or both were loaded from one place."""
    if reference is None:
        return True
    places = [
        model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
        for model in (policy, reference)
    ]
    return bool(places[0]) and places[0] == places[1]


def _moved(model: Any, device: Any) -> Any:
    """``model`` on ``device``; where it was if its layers can't be moved, as 8-bit ones can't."""
    try:
        return model.to(device)
    except (ValueError, RuntimeError):
        return model
