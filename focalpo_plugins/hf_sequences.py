"""The two token sequences of each pair in a ``datasets.Dataset``: their lengths, and their rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from tqdm.auto import tqdm

from .balanced import Cost

Numbers: TypeAlias = "NDArray[np.int64]"

_ROWS = 10_000  # that are read at a time
_SHOWN_AFTER = 2.0  # seconds until the progress bar
_NO_LIMIT = np.iinfo(np.int64).max


def sets_of(trained: Any, evaluated: Any) -> Iterator[tuple[Any, bool]]:
    """The data sets that there are, each with whether it is evaluated."""
    named = evaluated if isinstance(evaluated, Mapping) else {"": evaluated}
    for dataset, evaluation in ((trained, False), *((each, True) for each in named.values())):
        if dataset is not None:
            yield dataset, evaluation


@dataclass(frozen=True)
class PairSequences:
    """The sequences as the host's collator makes them.

    Attributes:
        dataset: the host's data set.
        prompt: the column with the start of both sequences; None if each column has its own.
        chosen: the column with the rest of the chosen sequence.
        rejected: the column with the rest of the rejected sequence.
        limit: the number of tokens that a sequence is cut to; None if it isn't cut.
        keep_end: whether its start is cut off, and not its end.
    """

    dataset: Dataset
    prompt: str | None
    chosen: str
    rejected: str
    limit: int | None = None
    keep_end: bool = False

    def lengths(self, *, say: bool = False) -> tuple[Numbers, Numbers, Numbers]:
        """For each pair the tokens of the chosen and of the rejected sequence, and of their common
        start.

        Args:
            say: whether a progress bar is shown if this takes long.
        """
        columns = [name for name in (self.prompt, self.chosen, self.rejected) if name is not None]
        tables = self.dataset.select_columns(columns).with_format("arrow").iter(batch_size=_ROWS)
        found = []
        with tqdm(
            total=len(self.dataset), desc="lengths of the pairs", unit="pair", disable=not say,
            delay=_SHOWN_AFTER,
        ) as bar:  # fmt: skip
            for table in tables:
                found.append(self._lengths_in(table))
                bar.update(table.num_rows)
        chosen, rejected, common = (np.concatenate(part) for part in zip(*found, strict=True))
        return chosen, rejected, common

    def tokens(self, cost: Cost, *, say: bool = False) -> list[int]:
        """For each pair its tokens, as :func:`~focalpo_plugins.balanced.deal` takes them."""
        chosen, rejected, common = self.lengths(say=say)
        found = np.maximum(chosen, rejected) if cost == "padded" else chosen + rejected - common
        return [int(number) for number in found]

    def _lengths_in(self, table: Any) -> tuple[Numbers, Numbers, Numbers]:
        prompt = 0 if self.prompt is None else _lengths(table[self.prompt].combine_chunks())
        answers = [table[name].combine_chunks() for name in (self.chosen, self.rejected)]
        whole = [prompt + _lengths(answer) for answer in answers]
        limit = _NO_LIMIT if self.limit is None else self.limit
        chosen, rejected = (np.minimum(length, limit) for length in whole)
        common = prompt + _in_common(*answers)
        if self.keep_end:
            # Sequences that lose starts of different lengths no longer line up.
            lost = [length - left for length, left in zip(whole, (chosen, rejected), strict=True)]
            common = np.where(lost[0] == lost[1], np.maximum(common - lost[0], 0), 0)
        return chosen, rejected, np.minimum(common, np.minimum(chosen, rejected))

    def of(self, row: int) -> tuple[list[int], list[int]]:
        """The token ids of the chosen and of the rejected sequence of a row."""
        cells = self.dataset[row]
        prompt = [] if self.prompt is None else list(cells[self.prompt])
        chosen, rejected = (self._cut([*prompt, *cells[of]]) for of in (self.chosen, self.rejected))
        return chosen, rejected

    def _cut(self, ids: list[int]) -> list[int]:
        over = 0 if self.limit is None else max(0, len(ids) - self.limit)
        return ids[over:] if self.keep_end else ids[: len(ids) - over]

    def rows_of(self, pairs: Iterable[tuple[list[int], list[int]]]) -> list[int | None]:
        """For each pair of sequences, the first row that has them; None if there is none."""
        lengths = self.lengths()
        found = []
        for pair in pairs:
            chosen, rejected = map(self._cut, pair)
            alike = (lengths[0] == len(chosen)) & (lengths[1] == len(rejected))
            rows: list[int] = np.flatnonzero(alike).tolist()
            found.append(next((row for row in rows if self.of(row) == (chosen, rejected)), None))
        return found


def _lengths(lists: Any) -> Numbers:
    """The length of each list in an Arrow array."""
    found: Numbers = lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    return found


def _in_common(lists: Any, others: Any) -> Numbers:
    """The number of items that both lists of each place begin with."""
    sides = []
    for array in (lists, others):
        ends = np.cumsum(_lengths(array))
        sides.append((array.flatten().to_numpy(zero_copy_only=False), ends - _lengths(array)))
    shorter = np.minimum(_lengths(lists), _lengths(others))
    common = np.zeros_like(shorter)
    left = np.flatnonzero(shorter)  # places at which both lists may have more in common
    while len(left):
        one, other = (values[starts[left] + common[left]] for values, starts in sides)
        left = left[one == other]
        common[left] += 1
        left = left[common[left] < shorter[left]]
    return common
