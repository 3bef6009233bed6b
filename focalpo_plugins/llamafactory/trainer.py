"""LLaMA-Factory's DPO trainer with another pairwise loss."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any

from llamafactory.train.dpo import trainer as host_module
from llamafactory.train.dpo import workflow
from llamafactory.train.dpo.trainer import CustomDPOTrainer

from ..guards import pairs
from ..guards.faults import Fault
from ..hf_models import same_weights
from ..hf_sequences import PairSequences
from ..run import Host
from ..trl.batch_loss import HostDPOMixin
from ..trl.data import SEQUENCES, labelled_answers, largest_id, sequences_of
from ..trl.exchange import smoothing_of_both
from ..yaml_keys import ALLOW_CHANGED, ALLOW_DATA, MARGIN, Asked
from . import MARGINS
from .data import cut_prompts

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


class LlamaFactoryPairwiseTrainer(HostDPOMixin, CustomDPOTrainer):
    """Trains the loss that LLaMA-Factory's arguments ask for."""

    _host = LLAMA_FACTORY
    _host_saves = True

    def __init__(
        self, model: Any, ref_model: Any, finetuning_args: Any, processor: Any, **kwargs: Any
    ) -> None:
        self._asked: Asked = finetuning_args.focalpo
        self._data_args = finetuning_args.focalpo_data_args
        asked, method = self._asked, _METHODS[self._asked.margin]
        self._check_method(_owner(method), method, asked.loss.name)
        # Only the image processor shows that the model takes images; the tokenizer doesn't.
        processing = processor or kwargs["tokenizer"]
        given = {"model": model, "ref_model": ref_model, "processing_class": processing}
        self._prepare(asked, given, kwargs["args"])
        of_reference = asked.margin == "dpo" and finetuning_args.ld_alpha is None
        of_reference = of_reference and not finetuning_args.focalpo_continues
        self._starts_as_reference = of_reference and same_weights(model, ref_model)
        super().__init__(model, ref_model, finetuning_args, processor, **kwargs)
        # Else it would be our loss's name.  SimPO's and ORPO's divide by the answers' lengths.
        self.loss_type = MARGINS[asked.margin]
        self._check_sets(kwargs["tokenizer"], self.train_dataset, self.eval_dataset)
        self._begin(asked)

    def _largest_id(self, dataset: Any) -> int:
        return largest_id(dataset, SEQUENCES)

    def _pair_faults(self, dataset: Any, tokenizer: Any, evaluation: bool) -> list[Fault]:
        limit = self._data_args.cutoff_len
        found = list(labelled_answers(dataset))
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
            "template": self._data_args.template,
            "max_length": self._data_args.cutoff_len,
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
        return sequences_of(self.train_dataset, None, *SEQUENCES)

    def _host_reference(self, batch: Any) -> Any:
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
        with self._exchanged_in("dpo_loss", smoothing_of_both(self.label_smoothing)):
            return super().dpo_loss(*args, **kwargs)

    def simpo_loss(self, *args: Any, **kwargs: Any) -> Any:
        with self._exchanged_in("simpo_loss", [0.0]):
            return super().simpo_loss(*args, **kwargs)

    def odds_ratio_loss(self, *args: Any, **kwargs: Any) -> Any:
        with self._exchanged_in("odds_ratio_loss", [0.0]):
            return super().odds_ratio_loss(*args, **kwargs)

    def _exchanged_in(
        self, method: str, smoothing: list[float | None]
    ) -> AbstractContextManager[None]:
        return self._exchanged(smoothing, f"pref_loss: {self._asked.loss.name}", _owner(method))


def _owner(method: str) -> type:
    """The class that defines the host's method, whose module has the ``F`` that it looks up."""
    classes = CustomDPOTrainer.__mro__
    found: type = next((each for each in classes if method in vars(each)), CustomDPOTrainer)
    return found
