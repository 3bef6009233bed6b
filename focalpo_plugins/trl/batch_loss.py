"""Trainers whose host computes a batch's loss in ``get_batch_loss_metrics``.

TRL's DPO trainer did before 0.29, and other hosts' trainers still do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import RunError
from ..hf_reference import PrecomputedReference
from ..yaml_keys import Asked
from .exchange import calls_logsigmoid
from .pairwise import PairwiseBase
from .parts import embeddings_of
from .shared_step import SharedStepMixin


class BatchLossMixin(PairwiseBase, SharedStepMixin):
    """The part of these trainers that makes a step."""

    def get_batch_loss_metrics(self, model: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        host: Any = super()
        self._batch = dict(batch)  # a host may take the labels out of its own
        with self._running().one_step(), self._prompts_shared(self._pairs_in(batch)):
            return host.get_batch_loss_metrics(model, batch, *args, **kwargs)

    def _pairs_in(self, batch: Mapping[str, Any]) -> int:
        return len(batch["input_ids"]) // 2


class HostDPOMixin(BatchLossMixin):
    """The part of the DPO trainers that other hosts derive from TRL's."""

    _own_loss = "DPO"

    if TYPE_CHECKING:

        def _host_reference(self, batch: Any) -> Any:
            """The reference's log-probabilities of both sides, by the host's own forward pass."""

    def _prepare(self, asked: Asked, given: Mapping[str, Any], args: Any) -> None:
        """Note what is asked for, and refuse what can't be combined with it; before ``__init__``.

        Args:
            given: the trainer's models, by its arguments' names, and its tokenizer or processor as
                ``processing_class``.
            args: transformers' arguments.
        """
        self._switch_on(asked.on)
        self._ask(given, args)
        models = {"policy": given["model"], "reference": given.get("ref_model")}
        self._embeddings = {
            name: embeddings_of(model) for name, model in models.items() if model is not None
        }

    def _begin(self, asked: Asked) -> None:
        """Train what is asked for from now on; after ``__init__``."""
        self.set_loss(asked.loss)
        if asked.reference_folder is not None:
            shared = self._shared_key is not None
            self._precomputed = PrecomputedReference(
                self, self._logps_of_reference, asked.reference_folder, shared
            )

    def _logps_of_reference(self, batch: Any) -> Any:
        with self._prompts_shared(self._pairs_in(batch)):
            return self._host_reference(batch)

    def _check_method(self, trainer: type, method: str, loss: str) -> None:
        """Raise ``RuntimeError`` if the host's method computes no loss that can be exchanged."""
        if not calls_logsigmoid(trainer, method):
            raise self._host.moved(f"its {method} does not call F.logsigmoid", loss)

    @contextmanager
    def _exchanged(self, *args: Any) -> Iterator[None]:
        try:
            with super()._exchanged(*args):
                yield
        except RunError as error:
            raise self._host.moved(str(error), self._running().asked.name) from None
