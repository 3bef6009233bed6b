"""What all TRL trainers with another pairwise loss share, for any margin."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..guards import embeddings
from ..guards.faults import Fault, Policy
from ..guards.ranks import together
from ..hf_trainer import RANKS, PairwiseTrainerMixin
from ..registry import BoundLoss
from ..run import Host
from .data import largest_id

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

    def set_loss(self, loss: BoundLoss) -> None:
        super().set_loss(loss)
        is_focalpo = loss.name == "focalpo"
        self._name, self._paper = ("FocalPO", _PAPER) if is_focalpo else (loss.name, {})
        self._tag_names: list[str] = [*self._tag_names, loss.name]

    def _check_embeddings(self, dataset: Any, tokenizer: Any, columns: Sequence[str]) -> None:
        """Refuse tokenized data with a token for which a model has no embedding."""
        known = self._embeddings

        def check() -> None:
            is_first = RANKS.rank == 0
            embeddings.check(known, tokenizer, lambda: largest_id(dataset, columns), say=is_first)

        together(RANKS, check)

    def _check_faults(self, faults: Callable[[], Iterable[Fault]]) -> None:
        """Refuse data for what ``faults`` finds, on all ranks together, and warn about the rest."""
        policy = Policy(self._host.allow_data, self._allow_data, RANKS.rank == 0)
        together(RANKS, lambda: policy.check(faults()))

    def _faults(self, dataset: Any, tokenizer: Any, evaluation: bool) -> list[Fault]:
        """The faults of rows that the host trains differently from the chat template."""
        return []
