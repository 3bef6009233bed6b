"""TRL's data sets: checks of their rows, and the rows for other checks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset
from pyarrow.compute import list_flatten
from pyarrow.compute import max as max_of
from torch import Tensor

from ..errors import InvalidValue
from ..guards import pairs
from ..guards.rows import empty_cell
from ..hf_sequences import PairSequences
from ..plan import Pair, Tokens
from ..run import Host

_SIDES = ("chosen", "rejected")
#: The columns of both sequences' token ids, if a host tokenizes both with the prompt.
SEQUENCES = tuple(f"{side}_input_ids" for side in _SIDES)


def check_data(given: Mapping[str, Any], host: Host) -> None:
    """Raise ``ValueError`` for training data without a pair, and for rows with an empty cell."""
    train_dataset = given.get("train_dataset")
    if train_dataset is not None and next(iter(train_dataset), None) is None:
        raise InvalidValue(
            "train_dataset must hold a pair, got none: it was empty, or every pair was dropped as "
            f"too long. Check the data, or raise {host.key('max_length')}."
        )
    evaluated = given.get("eval_dataset")
    sets = {"train_dataset": train_dataset, "eval_dataset": evaluated}
    if isinstance(evaluated, Mapping):
        sets |= {f"eval_dataset[{name!r}]": dataset for name, dataset in evaluated.items()}
    for name, dataset in sets.items():
        if isinstance(dataset, Dataset):
            columns = ["chosen", "rejected"]
            # Messages may be missing: TRL then takes the prompt out of the answers.
            if getattr(dataset.features.get("prompt"), "dtype", "") in ("string", "large_string"):
                columns.append("prompt")
            wrong = empty_cell(dataset, columns, name)
            if wrong is not None:
                raise InvalidValue(wrong)


def sampled_columns(dataset: Any, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Number and cells of each row that :func:`~.guards.pairs.sampled` picks."""
    if isinstance(dataset, Dataset):
        dataset = dataset.select_columns(list(columns))
    for number, row in pairs.sampled(dataset):
        yield number, *(row[column] for column in columns)


def labelled_answers(dataset: Any) -> Iterator[pairs.Pair]:
    """Number, prompt and answers of each row that is checked, told apart by the labels."""
    names = [f"{side}_{part}" for side in _SIDES for part in ("input_ids", "labels")]
    for number, *cells in sampled_columns(dataset, names):
        chosen, rejected = Tokens.labelled(*cells[:2]), Tokens.labelled(*cells[2:])
        yield number, chosen.prompt, chosen.answer, rejected.answer


def labelled_pairs(rows: Iterable[tuple[Mapping[str, Any], Sequence[int]]]) -> Iterator[Pair]:
    """The pairs of tokenized rows.

    Args:
        rows: each row, and the lengths of its two sequences before they were cut.
    """
    for row, whole in rows:
        chosen, rejected = Tokens.of_row(row)
        yield Pair(chosen, rejected, [len(chosen.ids), len(rejected.ids)] != [*whole])


def sequences_of(
    dataset: Any, prompt: str | None, chosen: str, rejected: str, **cut: Any
) -> PairSequences | None:
    """The pairs' sequences in these columns; None if the data are streamed or have other columns.

    Args:
        cut: how the sequences are cut.
    """
    columns = [name for name in (prompt, chosen, rejected) if name is not None]
    if not isinstance(dataset, Dataset) or not set(columns) <= {*dataset.column_names}:
        return None
    return PairSequences(dataset, prompt, chosen, rejected, **cut)


def unpadded(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The token ids of each sequence of a batch ``(B, L)``, without padding."""
    return [row[seen].tolist() for row, seen in zip(ids, mask.bool(), strict=True)]


def largest_id(dataset: Any, columns: Sequence[str]) -> int:
    """The largest token id in the columns; if the data are streamed, in the first rows."""
    if isinstance(dataset, Dataset):
        batches = dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=1000)
        found = (max_of(list_flatten(rows[name])).as_py() for rows in batches for name in columns)
    else:
        rows = dataset.take(pairs.FIRST)
        found = (max(row[name], default=-1) for row in rows for name in columns)
    return max((id for id in found if id is not None), default=-1)
