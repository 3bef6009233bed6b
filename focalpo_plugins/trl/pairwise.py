"""What all trainers share that train another pairwise loss in place of TRL's, for any margin.

Those of LLaMA-Factory and ms-swift are among them: both derive from TRL's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from ..guards import embeddings
from ..guards.faults import Fault, Policy
from ..guards.ranks import together
from ..hf_sequences import sets_of
from ..hf_trainer import RANKS, PairwiseTrainerMixin
from ..registry import BoundLoss
from ..run import Host
from .exchange import loss_exchanged

#: How messages name TRL and its settings.
TRL = Host(
    "TRL",
    packages=("trl", "torch"),
    separator="_",
    allow_changed="focalpo_allow_changed=True",
    allow_data="focalpo_allow_data=True",
    keys={"margin": "focalpo_margin"},
)

# The method, for TRL's model card.
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


class PairwiseBase(PairwiseTrainerMixin):
    """The part of a trainer that is the same for DPO's margin and for margins without a reference.

    It comes before TRL's trainer in the list of bases, and trains nothing before :meth:`set_loss`
    is called.
    """

    _host = TRL
    _marker: str | None = None  # a text that the host renders beside an answer
    _embeddings: Mapping[str, int | None] = {}  # how many the policy and the reference have

    if TYPE_CHECKING:
        _tag_names: list[str]

        def _largest_id(self, dataset: Any) -> int:
            """The largest token id of the tokenized data."""

        def _pair_faults(self, dataset: Any, tokenizer: Any, evaluation: bool) -> Iterable[Fault]:
            """The faults of the tokenized pairs; each rank checks the same rows."""

    def set_loss(self, loss: BoundLoss) -> None:
        super().set_loss(loss)
        is_focalpo = loss.name == "focalpo"
        self._name, self._paper = ("FocalPO", _PAPER) if is_focalpo else (loss.name, {})
        self._tag_names: list[str] = [*self._tag_names, loss.name]

    @contextmanager
    def _exchanged(
        self, smoothing: Sequence[float | None], asked: str, trainer: type
    ) -> Iterator[None]:
        """Inside, the host's log-sigmoids are our loss; its margins are counted after that.

        The arguments are those of :func:`~focalpo_plugins.trl.exchange.loss_exchanged`.
        """
        with loss_exchanged(self._running().loss, smoothing, asked, trainer) as margins:
            yield
        self._count(margins[0])

    def _check_sets(self, tokenizer: Any, trained: Any, evaluated: Any) -> None:
        """Refuse training data with a fault in most pairs, and warn of such evaluation data.

        Args:
            trained: the tokenized training data.
            evaluated: the tokenized evaluation data; several by name, or None.
        """
        for dataset, evaluation in sets_of(trained, evaluated):
            self._check_embeddings(tokenizer, partial(self._largest_id, dataset), evaluation)
            self._check_faults(partial(self._pair_faults, dataset, tokenizer, evaluation))

    def _check_embeddings(
        self, tokenizer: Any, largest_id: Callable[[], int], evaluation: bool
    ) -> None:
        """Refuse tokenized data with a token for which a model has no embedding.

        The models and the tokenizer are those of the training data: they are warned of once.
        """
        known, says = self._embeddings, RANKS.rank == 0 and not evaluation
        together(RANKS, lambda: embeddings.check(known, tokenizer, largest_id, say=says))

    def _check_faults(self, faults: Callable[[], Iterable[Fault]]) -> None:
        """Refuse data for what ``faults`` finds, on all ranks together, and warn about the rest."""
        policy = Policy(self._host.allow_data, self._allow_data, RANKS.rank == 0)
        together(RANKS, lambda: policy.check(faults()))

    def _faults(self, dataset: Any, tokenizer: Any, evaluation: bool) -> list[Fault]:
        """The faults of rows that the host trains differently from the chat template."""
        return []
