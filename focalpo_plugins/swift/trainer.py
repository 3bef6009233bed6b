"""ms-swift's DPO trainer with another pairwise loss."""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import Any

from swift.rlhf_trainers import DPOTrainer

from ..guards import pairs
from ..guards.faults import Fault
from ..hf_batches import check_batches
from ..hf_trainer import RANKS
from ..run import Host
from ..trl.batch_loss import HostDPOMixin
from ..trl.exchange import smoothing_of_both
from ..yaml_keys import ALLOW_CHANGED, ALLOW_DATA, Asked
from .batches import balance
from .conversations import text_faults
from .keys import starts_as_reference
from .pairs import EncodedPairs
from .refusals import check_model

#: How messages name ms-swift and its settings.
SWIFT = Host(
    "ms-swift",
    packages=("ms-swift", "trl", "torch"),
    separator="_",
    allow_changed=f"{ALLOW_CHANGED} true",
    allow_data=f"{ALLOW_DATA} true",
    unsaved="the model was not saved, because save_strategy is no",
)
_SIGNATURE = inspect.signature(DPOTrainer.dpo_loss)


class SwiftPairwiseTrainer(HostDPOMixin, DPOTrainer):
    """Built in place of ms-swift's trainer for arguments that ask for one of our losses.

    Args:
        asked: what the arguments ask for.
        arguments: ms-swift's arguments, of which its trainer gets only a part.
    """

    _host = SWIFT
    _balance = staticmethod(balance)

    def __init__(self, *args: Any, asked: Asked, arguments: Any, **kwargs: Any) -> None:
        self._check_method(DPOTrainer, "dpo_loss", asked.loss.name)
        self._arguments, self._template = arguments, kwargs["template"]
        tokenizer = self._template.tokenizer
        given = {**kwargs, "processing_class": tokenizer}
        check_batches(given["args"])
        check_model(arguments, given["model"].model_meta.is_multimodal)
        self._prepare(asked, given, given["args"])
        free = getattr(given["args"], "reference_free", None)
        self._starts_as_reference = not free and starts_as_reference(arguments)
        self._check_sets(tokenizer, given.get("train_dataset"), given.get("eval_dataset"))
        super().__init__(*args, **kwargs)
        self._begin(asked)

    def _in_loss(self) -> dict[str, Any]:
        args: Any = self.args
        written, divergence = self._arguments, self.f_divergence_type
        return {
            "margin": "dpo",
            "beta": self.beta,
            "label_smoothing": self.label_smoothing,
            "loss_type": written.loss_type,
            "loss_weights": written.loss_weights,
            "rpo_alpha": args.rpo_alpha,
            "ld_alpha": args.ld_alpha,
            # A script can set these two in the trainer's own arguments.
            "f_divergence_type": str(getattr(divergence, "value", divergence)),
            "reference_free": self.reference_free,
            "router_aux_loss_coef": self.aux_loss_coef if self.aux_loss_enabled else None,
            "template": written.template,
            "loss_scale": written.loss_scale,
            "max_length": written.max_length,
            "truncation_strategy": written.truncation_strategy,
        }

    def _said_of_host(self) -> str:
        return f"beta={self.beta}{self._said_of_batches()}"

    @cached_property
    def _encoded(self) -> EncodedPairs:
        return EncodedPairs(self.train_dataset, self.template)

    def _sequences(self) -> Any:
        return None if self._encoded.is_stream else self._encoded

    def get_train_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        if self._balanced_key is not None and not self._encoded.is_stream:
            self._encoded.read_tokens(self._cost(), RANKS)
        return super().get_train_dataloader(*args, **kwargs)

    def _host_reference(self, batch: Any) -> Any:
        return super().compute_ref_log_probs(batch)

    def compute_ref_log_probs(self, batch: Any) -> Any:
        if self._precomputed is not None:
            return self._precomputed(batch)
        return super().compute_ref_log_probs(batch)

    def dpo_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss, given = self._running().asked.name, _SIGNATURE.bind(self, *args, **kwargs).arguments
        if given.get("loss_type") != loss:
            return super().dpo_loss(*args, **kwargs)
        given = {**given, "loss_type": "sigmoid"}
        del given["self"]
        with self._exchanged(smoothing_of_both(self.label_smoothing), loss, DPOTrainer):
            return super().dpo_loss(**given)

    def _largest_id(self, dataset: Any) -> int:
        return EncodedPairs(dataset, self._template).largest_id()

    def _pair_faults(self, dataset: Any, tokenizer: Any, evaluation: bool) -> list[Fault]:
        found = EncodedPairs(dataset, self._template)
        cutting = pairs.Cutting("max_length", self._template.max_length)
        faults = pairs.find(found.tokenized(), tokenizer, cutting, evaluation)
        return [*faults, *text_faults(found, evaluation)]
