"""TRL's data sets: checks of their rows, and the rows that other checks look at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset
from pyarrow.compute import list_flatten
from pyarrow.compute import max as max_of
from pyarrow.types import is_large_string, is_string

from ..errors import InvalidValue
from ..guards import pairs
from ..run import Host


def check_data(given: Mapping[str, Any], host: Host) -> None:
    """Raise ``ValueError`` for training data without a pair, and for rows with an empty cell."""
    train_dataset = given.get("train_dataset")
    if train_dataset is not None and next(iter(train_dataset), None) is None:
        raise InvalidValue(
            "train_dataset must hold a pair, got none: it was empty, or every pair of it was "
            f"dropped as too long. Look at the data, or raise {host.key('max_length')}."
        )
    evaluated = given.get("eval_dataset")
    sets = {"train_dataset": train_dataset, "eval_dataset": evaluated}
    if isinstance(evaluated, Mapping):
        sets |= {f"eval_dataset[{name!r}]": dataset for name, dataset in evaluated.items()}
    for name, dataset in sets.items():
        for column in ("prompt", "chosen", "rejected"):
            if isinstance(dataset, Dataset) and column in dataset.column_names:
                _check_cells(dataset, column, name)


def _check_cells(dataset: Dataset, column: str, name: str) -> None:
    """Refuse a column without a value in some row, on which TRL stops with an obscure error."""
    stored = dataset.data.column(column)
    is_text = is_string(stored.type) or is_large_string(stored.type)
    # A prompt may be missing in all rows: TRL's CPO and ORPO then take it out of the answers.
    if not stored.null_count or (column == "prompt" and not is_text):
        return
    cells = dataset.select_columns([column]).with_format("arrow")[:].column(column)
    row = cells.is_null().index(True).as_py()
    if row >= 0:  # else the empty cells are in rows that were not selected
        raise InvalidValue(
            f"{name} must have prompt and answers in every row, got row {row} (the first is 0) "
            f"with nothing in the column {column!r}. Fill it, or remove the row. In a CSV, words "
            "such as None, NA and null are read as nothing."
        )


def checked_rows(
    dataset: Any, columns: Sequence[str] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and content of the rows that are checked: spread over the data, or the first ones if
    the data are streamed.

    Args:
        columns: the columns to read; None for all.
    """
    if isinstance(dataset, Dataset):
        numbers = pairs.places(len(dataset))
        read = dataset if columns is None else dataset.select_columns(list(columns))
        found = read.select(numbers)
    else:
        numbers, found = range(pairs.FIRST), dataset.take(pairs.FIRST)
    yield from zip(numbers, found, strict=False)


def largest_id(dataset: Any, columns: Sequence[str]) -> int:
    """The largest token id in the columns; if the data are streamed, in the first rows."""
    if isinstance(dataset, Dataset):
        batches = dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=1000)
        found = (max_of(list_flatten(rows[name])).as_py() for rows in batches for name in columns)
    else:
        rows = dataset.take(pairs.FIRST)
        found = (max(row[name], default=-1) for row in rows for name in columns)
    return max((id for id in found if id is not None), default=-1)
