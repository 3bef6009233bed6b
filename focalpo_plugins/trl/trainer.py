"""TRL's DPO trainer with another pairwise loss; nothing else changes."""

from __future__ import annotations

import inspect
import logging
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from torch import nn
from trl import DPOTrainer

from ..errors import InvalidValue, RunError
from ..guards import pairs, texts
from ..guards.faults import Fault
from ..guards.messages import say
from ..hf_models import same_weights
from ..hf_sequences import PairSequences
from .arguments import by_name, check_arguments
from .config import FocalPOConfig, OfConfig
from .conversations import rendered
from .data import check_data, largest_id, sampled_columns, sequences_of
from .exchange import check_host, smoothing_of
from .fused_step import FusedStepMixin
from .pairwise import PairwiseBase
from .parts import check_fused_parts, embeddings_of

# Settings of a reference that follows the policy.
_OF_SYNCING = ("ref_model_mixup_alpha", "ref_model_sync_steps")
_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")  # columns of a prepared data set


class PairwiseLossMixin(PairwiseBase, FusedStepMixin):
    """Exchanges a TRL DPO trainer's loss.

    It comes before the trainer in the list of bases, and trains nothing before :meth:`set_loss` is
    called.
    """

    _own_loss, _trainer = "DPO", DPOTrainer
    _train_data_seen = False
    _fused_by_trl = ""  # the key that asked for the fused path of a TRL that has its own
    # Whether a given reference is kept for data that `evaluate()` may get later.
    _keeps_reference = True
    _kept_reference: Any = None
    _reference_freed = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_host()
        given = by_name(self._trainer, args, kwargs)
        config = given.get("args")
        if config is not None:
            asked = self._fused_key or ("focalpo_fused" * getattr(config, "focalpo_fused", False))
            self._fused_key = check_arguments(config, self._fused_key)
            self._fused_by_trl = asked if self._fused_key is None else ""
            if self._fused_key is not None:
                check_fused_parts(given, config, self._fused_key)
            self._ask(given, config)
        self._starts_as_reference = same_weights(given.get("model"), given.get("ref_model"))
        self._embeddings = _embeddings(given)
        check_data(given, self._host)
        super().__init__(*args, **kwargs)
        if self.precompute_ref_logps and self.ref_model is not None:
            self._set_reference_aside()

    def _in_loss(self) -> dict[str, Any]:
        args: Any = self.args
        synced = {key: getattr(args, key) if args.sync_ref_model else None for key in _OF_SYNCING}
        # Before 1.9 TRL has no such coefficient.
        experts = self.router_aux_loss_coef if getattr(self, "aux_loss_enabled", False) else None
        return {
            "margin": "dpo",
            "beta": self.beta,
            "label_smoothing": self.label_smoothing,
            "loss_type": list(self.loss_types),
            "loss_weights": list(self.loss_weights),
            "ld_alpha": self.ld_alpha,
            "use_weighting": self.use_weighting,
            "router_aux_loss_coef": experts,
            "sync_ref_model": args.sync_ref_model,
            **synced,
            "max_length": args.max_length,
            "truncation_mode": getattr(args, "truncation_mode", None),
        }

    def _notes(self) -> list[str]:
        if not self._fused_by_trl:
            return []
        return [
            f"{self._fused_by_trl} changes nothing: TRL {version('trl')} has a fused path of its "
            "own, and always takes it."
        ]

    def _said_of_host(self) -> str:
        return f"beta={self.beta}{' path=fused' * self._fused}{self._said_of_batches()}"

    def _sequences(self) -> PairSequences | None:
        args: Any = self.args
        keep_end = getattr(args, "truncation_mode", None) == "keep_end"
        return sequences_of(self.train_dataset, *_IDS, limit=args.max_length, keep_end=keep_end)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        if self._fused and return_outputs:
            raise RunError(
                f"{self._fused_key} can't be combined with predict(), got return_outputs=True: it "
                f"never holds all logits. Set {self._fused_key} to false."
            )
        self._batch = inputs
        with self._running().one_step(), self._prompts_shared(len(inputs["input_ids"]) // 2):
            if self._fused:
                return self._fused_step(model, inputs)
            return super().compute_loss(model, inputs, return_outputs, *args, **kwargs)

    def _compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        smoothing = smoothing_of(self.loss_types, self.label_smoothing)
        asked = f"loss_type {list(self.loss_types)}"
        with self._exchanged(smoothing, asked, DPOTrainer):
            return super()._compute_loss(*args, **kwargs)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, *more: Any, **named: Any
    ) -> Any:
        """The host's own preparation, and a check of its result.

        The training data come first, before a reference is precomputed.  Images are prepared later,
        and not checked.

        Raises:
            ValueError: more than half of the training data has the same fault.
        """
        first: dict[str, Any] = next(iter(dataset), {})
        with _counted_mismatches():
            prepared = super()._prepare_dataset(dataset, processing_class, args, *more, **named)
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        evaluation, self._train_data_seen = self._train_data_seen, True
        self._check_embeddings(tokenizer, partial(largest_id, prepared, _IDS), evaluation)
        shared = "prompt" not in first and isinstance(first.get("chosen"), str)
        cutting = pairs.Cutting(
            self._host.key("max_length"),
            # TRL's collator cuts to this length; before 1.0 its step did.
            args.max_length,
            keep_end=getattr(args, "truncation_mode", None) == "keep_end",
            shared=shared,
            marker=self._marker,
        )
        rows = sampled_columns(prepared, _IDS)
        self._check_faults(lambda: pairs.find(rows, tokenizer, cutting, evaluation))
        self._check_faults(lambda: self._faults(prepared, tokenizer, evaluation))
        return prepared

    def _faults(self, dataset: Any, tokenizer: Any, evaluation: bool) -> list[Fault]:
        return texts.find(
            rendered(dataset, tokenizer),
            host="TRL",
            of_sides="TRL takes each answer with its own turns",
            of_cut="TRL cuts it off at the length of the prompt, and with this template the row's "
            "rendering doesn't begin with the prompt's. Use another template, or set "
            "chat_template_kwargs, such as enable_thinking, so that they agree",
            evaluation=evaluation,
        )

    def _set_reference_aside(self) -> None:
        """Remove the reference from the trainer: its log-probs are in the data now.

        It is freed, or kept for data that ``evaluate()`` may get later: in the CPU's memory, or in
        its place if DeepSpeed or FSDP has it in parts.
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
            raise InvalidValue(
                f"eval_dataset must be given to {type(self).__name__}, got one in evaluate(): with "
                "precompute_ref_log_probs the reference is freed once the trainer is built. Pass "
                "it to the trainer, or set precompute_ref_log_probs to false."
            )
        back = new_data and self._kept_reference is not None
        with self._reference_back() if back else nullcontext():
            return super().evaluate(eval_dataset, *args, **kwargs)


class FocalPOTrainer(OfConfig, PairwiseLossMixin, DPOTrainer):
    """TRL's ``DPOTrainer`` with FocalPO's loss; takes a :class:`FocalPOConfig` as ``args``.

    Raises:
        TypeError: ``args`` is a plain ``DPOConfig``, which has no gamma.
        ValueError: the config asks for something that the loss can't be combined with.
        RuntimeError: the installed TRL computes its loss elsewhere.
    """

    _config = FocalPOConfig

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
        super().__init__(model, ref_model, args, *more, **kwargs)

    __init__.__signature__ = inspect.signature(DPOTrainer.__init__)  # type: ignore[attr-defined]


def _embeddings(given: dict[str, Any]) -> dict[str, int | None]:
    """How many embeddings policy and reference have, from a trainer's arguments by name."""
    policy: Any = given.get("model")
    reference = given.get("ref_model")
    found = {"policy": embeddings_of(policy)}
    whole = isinstance(policy, nn.Module) and not is_peft_model(policy)
    adapted = given.get("peft_config") is not None
    precomputed = getattr(given.get("args"), "precompute_ref_log_probs", False)
    if reference is None and whole and not adapted and not precomputed:
        # TRL loads it from where the policy came from, without what was changed since.
        reference = getattr(policy.config, "_name_or_path", "")
    if reference:
        found["reference"] = embeddings_of(reference)
    return found


class _Mismatches(logging.Filter):
    """Counts and drops TRL's warnings about a prompt whose tokens change before an answer."""

    def __init__(self) -> None:
        super().__init__()
        # Shared, because TRL may tokenize in processes that are forked off this one.
        self.count = multiprocessing.Value("q")

    def filter(self, record: logging.LogRecord) -> bool:
        if "Mismatch between tokenized prompt" not in str(record.msg):
            return True
        with self.count.get_lock():
            self.count.value += 1
        return False


@contextmanager
def _counted_mismatches() -> Iterator[None]:
    """Inside, TRL's warning for each answer becomes one line at the end.

    The newest releases warn only once themselves, with other words.
    """
    logger, mismatches = logging.getLogger(DPOTrainer.__module__), _Mismatches()
    logger.addFilter(mismatches)
    try:
        yield
    finally:
        logger.removeFilter(mismatches)
        if mismatches.count.value:
            say(
                f"warning: {mismatches.count.value} answers change the tokens at the end of their "
                "prompt. TRL cuts these answers by the prompt's own number of tokens, so their "
                "first characters may be lost or doubled. End the prompts at the end of a token, "
                "as a chat template does, or remove white space from their ends."
            )


def _moved(model: Any, device: Any) -> Any:
    """``model`` on ``device``; not moved if its layers can't be, such as 8-bit layers."""
    try:
        return model.to(device)
    except (ValueError, RuntimeError):
        return model
