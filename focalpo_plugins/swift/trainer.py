"""ms-swift's DPO trainer with another pairwise loss."""

from __future__ import annotations

import inspect
from functools import cached_property, partial
from typing import Any

import torch.nn.functional as F
from swift.rlhf_trainers import DPOTrainer

from ..errors import RunError
from ..guards import embeddings, pairs
from ..guards.faults import Fault
from ..guards.ranks import together
from ..hf_batches import check_batches
from ..hf_reference import PrecomputedReference
from ..hf_trainer import RANKS
from ..run import Host
from ..trl.exchange import loss_exchanged
from ..trl.pairwise import PairwiseBase
from ..trl.parts import embeddings_of
from ..trl.shared_step import SharedStepMixin
from . import ALLOW_CHANGED, ALLOW_DATA, BALANCED, SHARED
from .batches import balance
from .conversations import text_faults
from .keys import Asked
from .pairs import EncodedPairs
from .refusals import check_model

#: How messages name ms-swift and its settings.
SWIFT = Host(
    "ms-swift",
    packages=("ms-swift", "trl", "torch"),
    separator="_",
    allow_changed=f"{ALLOW_CHANGED} true",
    allow_data=f"{ALLOW_DATA} true",
)
_SIGNATURE = inspect.signature(DPOTrainer.dpo_loss)


class SwiftPairwiseTrainer(PairwiseBase, SharedStepMixin, DPOTrainer):
    """Built in place of ms-swift's trainer for arguments that ask for one of our losses.

    Args:
        asked: what the arguments ask for.
        arguments: ms-swift's arguments, of which its trainer gets only a part.
    """

    _host = SWIFT
    _own_loss = "DPO"
    _balance = staticmethod(balance)

    def __init__(self, *args: Any, asked: Asked, arguments: Any, **kwargs: Any) -> None:
        _check_host(asked.loss.name)
        self._arguments = arguments
        self._allow_changed, self._allow_data = asked.allow_changed, asked.allow_data
        self._balanced_key = BALANCED if asked.balanced else None
        self._shared_key = SHARED if asked.shared else None
        given = {**kwargs, "processing_class": kwargs["template"].tokenizer}
        check_batches(given["args"])
        check_model(arguments, given["model"].model_meta.is_multimodal)
        self._ask(given, given["args"])
        free = getattr(given["args"], "reference_free", None)
        self._starts_as_reference = not free and _starts_as_reference(arguments)
        models = {"policy": given["model"], "reference": given.get("ref_model")}
        self._embeddings = {
            name: embeddings_of(model) for name, model in models.items() if model is not None
        }
        self._check_data(given, given["template"])
        super().__init__(*args, **kwargs)
        self.set_loss(asked.loss)
        if asked.reference_folder is not None:
            shared = self._shared_key is not None
            self._precomputed = PrecomputedReference(
                self, self._of_reference, asked.reference_folder, shared
            )

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

    def get_batch_loss_metrics(self, model: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        self._batch = batch
        with self._running().one_step(), self._prompts_shared(len(batch["input_ids"]) // 2):
            return super().get_batch_loss_metrics(model, batch, *args, **kwargs)

    def _of_reference(self, batch: Any) -> Any:
        """The reference's log-probabilities of both sides, by the host's own forward pass."""
        with self._prompts_shared(len(batch["input_ids"]) // 2):
            return super().compute_ref_log_probs(batch)

    def compute_ref_log_probs(self, batch: Any) -> Any:
        if self._precomputed is not None:
            return self._precomputed(batch)
        return super().compute_ref_log_probs(batch)

    def dpo_loss(self, *args: Any, **kwargs: Any) -> Any:
        run, given = self._running(), _SIGNATURE.bind(self, *args, **kwargs).arguments
        if given.get("loss_type") != run.asked.name:
            return super().dpo_loss(*args, **kwargs)
        given = {**given, "loss_type": "sigmoid"}
        del given["self"]
        # ms-swift computes both log-sigmoids, and multiplies the second by label_smoothing.
        smoothing = [0.0, 0.0 if self.label_smoothing else None]
        try:
            with loss_exchanged(run.loss, smoothing, run.asked.name, DPOTrainer) as margins:
                result = super().dpo_loss(**given)
        except RunError as error:
            raise self._host.moved(str(error), run.asked.name) from None
        self._count(margins[0])
        return result

    def _check_data(self, given: dict[str, Any], template: Any) -> None:
        """Refuse data with a fault in most pairs, on all ranks together."""
        for name in ("train_dataset", "eval_dataset"):
            if given.get(name) is not None:
                found = EncodedPairs(given[name], template)
                together(RANKS, partial(self._check_ids, found, template.tokenizer))
                self._check_faults(partial(self._faults_of, found, template, name))

    def _check_ids(self, found: EncodedPairs, tokenizer: Any) -> None:
        embeddings.check(self._embeddings, tokenizer, found.largest_id, say=RANKS.rank == 0)

    def _faults_of(self, found: EncodedPairs, template: Any, name: str) -> list[Fault]:
        evaluation = name == "eval_dataset"
        cutting = pairs.Cutting("max_length", template.max_length)
        faults = pairs.find(found.tokenized(), template.tokenizer, cutting, evaluation)
        return [*faults, *text_faults(found, template, evaluation)]


def _check_host(loss: str) -> None:
    """Refuse a release of ms-swift that computes its loss elsewhere.

    Raises:
        RuntimeError: its method calls no log-sigmoid that could be exchanged.
    """
    module = inspect.getmodule(DPOTrainer)
    found = "logsigmoid" in DPOTrainer.dpo_loss.__code__.co_names
    if not found or getattr(module, "F", None) is not F:
        raise SWIFT.moved("its DPOTrainer.dpo_loss calls no F.logsigmoid", loss)


def _starts_as_reference(arguments: Any) -> bool:
    """Whether every margin of the first step should be 0."""
    if arguments.ld_alpha is not None:  # it weighs the policy's tokens only
        return False
    if arguments.tuner_type == "full":
        return bool(arguments.ref_model == arguments.model)
    return list(arguments.adapters or ()) == list(arguments.ref_adapters or ())
