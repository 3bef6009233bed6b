"""The pairs of a run, as ms-swift's template encodes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from os.path import commonprefix
from typing import Any

from tqdm.auto import tqdm

from ..balanced import Cost
from ..guards import pairs
from ..guards.ranks import Ranks, together
from ..plan import Tokens

_SHOWN_AFTER = 2.0  # seconds until the progress bar
_SEARCHED = 10_000  # rows


class EncodedPairs:
    """The pairs of a data set that ms-swift has prepared.

    Args:
        dataset: rows that are encoded when they are read, or a stream of encoded rows.
        template: ms-swift's template.
    """

    def __init__(self, dataset: Any, template: Any) -> None:
        self.rows = getattr(dataset, "dataset", dataset)
        self.template = template
        self._tokens: dict[Cost, list[int]] = {}

    @property
    def is_stream(self) -> bool:
        return not hasattr(self.rows, "__len__")

    def of(self, row: int) -> tuple[Tokens, Tokens]:
        return self._sides(self.rows[row])

    def _sides(self, row: Mapping[str, Any]) -> tuple[Tokens, Tokens]:
        if "chosen_input_ids" not in row:  # rows of a stream are encoded
            row = self.template.encode(dict(row), return_length=True)
        return Tokens.of_row(row)

    def encoded(self, row: Mapping[str, Any]) -> tuple[Tokens, Tokens] | None:
        """Both sequences of a row; None if ms-swift can't encode it, and trains another one."""
        try:
            return self._sides(row)
        except Exception:
            return None

    def _sampled(self) -> Iterator[tuple[int, Tokens, Tokens]]:
        """Number and sequences of each row that is checked."""
        for number, row in pairs.sampled(self.rows):
            both = self.encoded(row)
            if both is not None:
                yield number, *both

    def tokenized(self) -> Iterator[pairs.Pair]:
        """Row, prompt, chosen and rejected answer of the pairs to check."""
        for number, chosen, rejected in self._sampled():
            yield number, chosen.prompt, chosen.answer, rejected.answer

    def largest_id(self) -> int:
        """The largest token id in the pairs to check; -1 if there are none."""
        found = (max(side.ids, default=-1) for _, *both in self._sampled() for side in both)
        return max(found, default=-1)

    def tokens(self, cost: Cost, *, say: bool = False) -> list[int]:
        """For each pair its tokens, as :func:`~focalpo_plugins.balanced.deal` takes them.

        Args:
            say: whether a progress bar is shown if this takes long.
        """
        if cost not in self._tokens:  # a resumed run builds its loader twice
            self._tokens[cost] = self._tokens_of(range(len(self.rows)), cost, say)
        return self._tokens[cost]

    def read_tokens(self, cost: Cost, ranks: Ranks) -> None:
        """Read what :meth:`tokens` returns, a part of the pairs on each rank: a template takes two
        milliseconds for one.  Call it on all ranks.

        Raises:
            RuntimeError: a rank could not read its part.
        """
        if cost in self._tokens:
            return
        count, own = len(self.rows), list[int]()
        part = range(ranks.rank, count, ranks.count)
        together(ranks, lambda: own.extend(self._tokens_of(part, cost, ranks.rank == 0)))
        found = [0] * count
        for rank, of_rank in enumerate(ranks.gather(own)):
            found[rank :: ranks.count] = of_rank
        self._tokens[cost] = found

    def _tokens_of(self, rows: range, cost: Cost, say: bool) -> list[int]:
        if cost == "padded" and "lengths" in getattr(self.rows, "column_names", ()):
            lengths = self.rows["lengths"]
            return [max(lengths[row]) for row in rows]
        found = []
        shown = tqdm(
            rows, desc="lengths of the pairs", unit="pair", disable=not say, delay=_SHOWN_AFTER
        )
        for row in shown:
            try:
                chosen, rejected = (side.ids for side in self.of(row))
            except Exception:  # ms-swift trains another row in its place
                chosen, rejected = [], []
            longest = max(len(chosen), len(rejected))
            common = len(commonprefix([chosen, rejected]))
            found.append(longest if cost == "padded" else len(chosen) + len(rejected) - common)
        return found

    def rows_of(self, found: Iterable[tuple[list[int], list[int]]]) -> list[int | None]:
        """For each pair of sequences, the first row that has them; None if it isn't found.

        Only the first rows are searched: each takes milliseconds, and the other ranks wait.
        """
        wanted = list(found)
        places: list[int | None] = [None] * len(wanted)
        for row in range(min(len(self.rows), _SEARCHED)):
            if None not in places:
                break
            try:
                pair = tuple(side.ids for side in self.of(row))
            except Exception:
                continue
            for number, other in enumerate(wanted):
                if places[number] is None and pair == tuple(other):
                    places[number] = row
        return places
