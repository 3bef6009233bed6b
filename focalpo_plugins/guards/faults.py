"""Faults of data: most of them stop a run if most rows have them, others only cause a warning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import InvalidValue
from .messages import say


class Fault(NamedTuple):
    """A fault that some rows have.

    Attributes:
        words: how many rows have it, what it is, and what to do.
        first: the first row that has it.
        refused: whether a run is refused for it.
    """

    words: str
    first: str
    refused: bool

    def __str__(self) -> str:
        return f"{self.words}. The first is {self.first}"


@dataclass(frozen=True)
class Policy:
    """What a run does about faults of its data.

    Attributes:
        allow: what the user sets to train anyway, for the message.
        allowed: whether the user has set it; then there are only warnings.
        say: whether this process writes the warnings.
    """

    allow: str
    allowed: bool
    say: bool

    def check(self, faults: Iterable[Fault]) -> None:
        """Refuse data for a fault of most rows, and warn about the others.

        Raises:
            ValueError: more than half of the training data's rows have the same fault.
        """
        for fault in faults:
            if self._refuses(fault):
                raise InvalidValue(f"training data refused: {self._refusal(fault)}")
            if self.say:
                say(f"warning: {fault}")

    def foretell(self, faults: Iterable[Fault]) -> list[str]:
        """What is said of the faults before a run, a sentence each."""
        return [
            f"a run refuses these data: {self._refusal(fault)}"
            if self._refuses(fault)
            else str(fault)
            for fault in faults
        ]

    def _refuses(self, fault: Fault) -> bool:
        return fault.refused and not self.allowed

    def _refusal(self, fault: Fault) -> str:
        return f"{fault.words}. To train anyway, set {self.allow}. The first is {fault.first}"


@dataclass(frozen=True)
class Catalogue:
    """The faults that one check can find.

    Attributes:
        unit: what the rows are, in the plural.
        why: for each fault, what it is, and what to do; with places for words in braces.
        harmless: the faults for which no run is refused.
    """

    unit: str
    why: Mapping[str, str]
    harmless: Sequence[str]

    def faults(
        self, found: Mapping[str, Sequence[str]], rows: int, evaluation: bool, **words: object
    ) -> list[Fault]:
        """Describe the faults of ``rows`` rows.

        Args:
            found: for each fault, the rows that have it, in words.
            evaluation: whether this is evaluation data, for which no run is refused.
            words: what takes the places in braces.
        """
        unit = self.unit + " of the evaluation data" * evaluation
        return [
            Fault(
                f"{len(places)} of {rows} {unit} have {self.why[name].format_map(words)}",
                places[0],
                refused=2 * len(places) > rows and not evaluation and name not in self.harmless,
            )
            for name, places in found.items()
        ]
