"""LLaMA-Factory's DPO trainer with another pairwise loss."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llamafactory.train.dpo import trainer as host_module
from llamafactory.train.dpo import workflow
from llamafactory.train.dpo.trainer import CustomDPOTrainer

from ..guards import pairs
from ..guards.faults import Fault
from ..hf_models import same_weights
from ..hf_reference import PrecomputedReference
from ..hf_sequences import PairSequences
from ..run import Host
from ..trl.data import sequences_of
from ..trl.exchange import calls_logsigmoid, loss_exchanged
from ..trl.pairwise import PairwiseBase
from ..trl.parts import check_balanced_parts, check_shared_parts, embeddings_of
from ..trl.shared_step import SharedStepMixin
from . import ALLOW_CHANGED, ALLOW_DATA, BALANCED, MARGIN, SHARED
from .arguments import Asked
from .data import SIDES, answers, cut_prompts

#: How messages name LLaMA-Factory and its settings.
LLAMA_FACTORY = Host(
    "LLaMA-Factory",
    packages=("llamafactory", "trl", "torch"),
    separator="_",
    allow_changed=f"{ALLOW_CHANGED}: true",
    allow_data=f"{ALLOW_DATA}: true",
    keys={
        "margin": MARGIN,
        "beta": "pref_beta",
        "label_smoothing": "dpo_label_smoothing",
        "max_length": "cutoff_len",
    },
)
# For each margin, the method in which it becomes a loss.
_METHODS = {"dpo": "dpo_loss", "simpo": "simpo_loss", "orpo": "odds_ratio_loss"}


@functools.cache
def install() -> None:
    """Have ``run_dpo`` build our trainer for arguments with our loss, and the host's for others."""
    host_module.CustomDPOTrainer = _built
    if hasattr(workflow, "CustomDPOTrainer"):  # before 0.9.4 it was imported there
        workflow.CustomDPOTrainer = _built


def _built(*args: Any, **kwargs: Any) -> Any:
    asks = getattr(kwargs["finetuning_args"], "focalpo", None) is not None
    return (LlamaFactoryPairwiseTrainer if asks else CustomDPOTrainer)(*args, **kwargs)


class LlamaFactoryPairwiseTrainer(PairwiseBase, SharedStepMixin, CustomDPOTrainer):
    """Trains the loss that LLaMA-Factory's arguments ask for."""

    _host = LLAMA_FACTORY
    _own_loss = "DPO"
    _host_saves = True

    def __init__(
        self, model: Any, ref_model: Any, finetuning_args: Any, processor: Any, **kwargs: Any
    ) -> None:
        self._asked: Asked = finetuning_args.focalpo
        asked, args = self._asked, kwargs["args"]
        self._check_method()
        # The image processor is the only one of the two that tells of images.
        given = {"model": model, "processing_class": processor or kwargs["tokenizer"]}
        if SHARED in asked.on:
            self._shared_key = SHARED
            check_shared_parts(given, args, SHARED)
        if BALANCED in asked.on:
            self._balanced_key = BALANCED
            check_balanced_parts(given, args, BALANCED)
        self._allow_changed = ALLOW_CHANGED in asked.on
        self._allow_data = ALLOW_DATA in asked.on
        of_reference = asked.margin == "dpo" and finetuning_args.ld_alpha is None
        of_reference = of_reference and not asked.continues
        self._starts_as_reference = of_reference and same_weights(model, ref_model)
        self._embeddings = {"policy": embeddings_of(model)}
        if ref_model is not None:
            self._embeddings["reference"] = embeddings_of(ref_model)
        super().__init__(model, ref_model, finetuning_args, processor, **kwargs)
        if asked.margin != "dpo":
            self.loss_type = asked.margin  # which divides the log-probabilities by the lengths
        self._check_data(kwargs["tokenizer"])
        self.set_loss(asked.loss)
        if asked.reference_folder is not None:
            shared = self._shared_key is not None
            self._precomputed = PrecomputedReference(
                self, self._of_reference, asked.reference_folder, shared
            )

    def _check_method(self) -> None:
        """Refuse a release of the host that computes its loss elsewhere."""
        method = _METHODS[self._asked.margin]
        if not calls_logsigmoid(_owner(method), method):
            why = f"its {method} does not call F.logsigmoid"
            raise self._host.moved(why, self._asked.loss.name)

    def _check_data(self, tokenizer: Any) -> None:
        """Refuse training data with a fault in most pairs, and warn of such evaluation data."""
        evaluated = self.eval_dataset
        named = evaluated if isinstance(evaluated, dict) else {"": evaluated}
        sets = [(self.train_dataset, False), *((each, True) for each in named.values())]
        for dataset, evaluation in sets:
            if dataset is not None:
                self._check_embeddings(dataset, tokenizer, SIDES)
                faults = functools.partial(self._pair_faults, dataset, tokenizer, evaluation)
                self._check_faults(faults)

    def _pair_faults(self, dataset: Any, tokenizer: Any, evaluation: bool) -> list[Fault]:
        limit = self._asked.data_args.cutoff_len
        found = list(answers(dataset))
        cutting = pairs.Cutting(self._host.key("max_length"), limit)
        collator: Any = self.data_collator
        return [
            *pairs.find(found, tokenizer, cutting, evaluation),
            *cut_prompts(found, tokenizer, collator.template, limit, evaluation),
        ]

    def _in_loss(self) -> dict[str, Any]:
        margin = self._asked.margin
        return {
            "margin": margin,
            "beta": self.beta,
            "label_smoothing": self.label_smoothing,
            "simpo_gamma": self.simpo_gamma if margin == "simpo" else None,
            "pref_ftx": self.ftx_gamma,
            "ld_alpha": self.ld_alpha,
            "template": self._asked.data_args.template,
            "max_length": self._asked.data_args.cutoff_len,
        }

    def _said_of_host(self) -> str:
        margin = self._asked.margin
        shown = {
            "margin": None if margin == "dpo" else margin,
            "label_smoothing": self.label_smoothing or None,
            "pref_ftx": self.ftx_gamma or None,
        }
        words = "".join(f" {name}={value}" for name, value in shown.items() if value is not None)
        return f"beta={self.beta}{words}{self._said_of_batches()}"

    def _sequences(self) -> PairSequences | None:
        return sequences_of(self.train_dataset, None, *SIDES)

    def get_batch_loss_metrics(self, model: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        self._batch = dict(batch)  # the host takes the labels out of its own
        with self._running().one_step(), self._prompts_shared(len(batch["input_ids"]) // 2):
            return super().get_batch_loss_metrics(model, batch, *args, **kwargs)

    def _of_reference(self, batch: Any) -> Any:
        """The reference's log-probabilities of both sides, by the host's own forward pass."""
        with self._prompts_shared(len(batch["input_ids"]) // 2):
            return super().compute_reference_log_probs(self.model, batch)

    def compute_reference_log_probs(self, model: Any, batch: Any) -> Any:
        if self._precomputed is not None:
            return self._precomputed(batch)
        return super().compute_reference_log_probs(model, batch)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        # The host's model card has a row for each evaluation, and fails unless all have the same
        # columns; a group of pairs that is empty has no margin.
        for group in ("margin_correct", "margin_incorrect"):
            output.metrics.setdefault(f"{metric_key_prefix}_{self._asked.loss.name}/{group}", 0.0)
        return output

    def dpo_loss(self, *args: Any, **kwargs: Any) -> Any:
        # The second log-sigmoid, of -z, is multiplied by the label smoothing.
        with self._exchanged([0.0, 0.0 if self.label_smoothing else None]):
            return super().dpo_loss(*args, **kwargs)

    def simpo_loss(self, *args: Any, **kwargs: Any) -> Any:
        with self._exchanged([0.0]):
            return super().simpo_loss(*args, **kwargs)

    def odds_ratio_loss(self, *args: Any, **kwargs: Any) -> Any:
        with self._exchanged([0.0]):
            return super().odds_ratio_loss(*args, **kwargs)

    @contextmanager
    def _exchanged(self, smoothing: list[float | None]) -> Iterator[None]:
        """Inside, the host's log-sigmoid is our loss; its margins are counted after that."""
        loss, margin = self._running().loss, self._asked.margin
        asked = f"pref_loss: {loss.name}"
        with loss_exchanged(loss, smoothing, asked, _owner(_METHODS[margin])) as margins:
            yield
        self._count(margins[0])


def _owner(method: str) -> type:
    """The class that defines the host's method, whose module has the ``F`` that it looks up."""
    classes = CustomDPOTrainer.__mro__
    found: type = next((each for each in classes if method in vars(each)), CustomDPOTrainer)
    return found
