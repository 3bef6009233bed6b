"""Faults of data that a run is refused for, or warned of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import InvalidValue
from .messages import say


class Fault(NamedTuple):
    """A fault that some rows have.

    Attributes:
        problem: what is wrong with data of such rows.
        words: how many rows have it, what it is, and what to do.
        first: the first row that has it.
        refused: whether a run is refused for it.
    """

    problem: str
    words: str
    first: str
    refused: bool

    def __str__(self) -> str:
        return f"{self.words}. The first is {self.first}"


@dataclass(frozen=True)
class Policy:
    """What a run does about faults of its data.

    Attributes:
        allow: what the user sets to train on data that is refused, for the message.
        allowed: whether the user has set it; then there are only warnings.
        say: whether this process writes the warnings.
    """

    allow: str
    allowed: bool
    say: bool

    def check(self, faults: Iterable[Fault]) -> None:
        """Refuse data for a fault that most rows have, and warn of the others.

        Raises:
            ValueError: more than half of the training data's rows have the same fault.
        """
        for fault in faults:
            if fault.refused and not self.allowed:
                raise InvalidValue(
                    f"the training data {fault.problem}, got {fault.words}. Give {self.allow} to "
                    f"train on them anyway. The first is {fault.first}"
                )
            if self.say:
                say(f"warning: {fault}")


@dataclass(frozen=True)
class Catalogue:
    """Faults that are looked for together.

    Attributes:
        problem: what is wrong with data of which most rows have one.
        unit: what the rows are, in the plural.
        why: for each fault, what it is, and what to do; with places for words in braces.
        harmless: those that a run is never refused for.
    """

    problem: str
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
                self.problem,
                f"{len(places)} of {rows} {unit} have {self.why[name].format_map(words)}",
                places[0],
                refused=2 * len(places) > rows and not evaluation and name not in self.harmless,
            )
            for name, places in found.items()
        ]
