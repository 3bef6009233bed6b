"""The data sets that arguments name, and why ms-swift can't read one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..errors import InvalidValue
from ..guards import hub, pairs, sources
from ..guards.messages import explained, modules_of, say
from ..guards.rows import CONVERSATIONS, PROMPT_BESIDE, STRINGS, Description, not_text
from ..guards.sources import Advice

# By format, ms-swift's names of the columns.
_COLUMNS = {
    CONVERSATIONS: {"chosen": "messages", "rejected": "rejected_messages"},
    PROMPT_BESIDE: {"chosen": "messages", "rejected": "rejected_messages"},
    STRINGS: {"prompt": "query", "chosen": "response", "rejected": "rejected_response"},
}
_KEYS = ("dataset", "val_dataset")
_FILES = (".json", ".jsonl", ".csv", ".parquet", ".txt")
# If ms-swift encodes rows when they are trained, only our check finds that there is no pair.
_READING = ("swift.dataset", pairs.__name__)
_CHOSEN = {"messages", "response"}
_REJECTED = {"rejected_messages", "rejected_response"}


@dataclass(frozen=True)
class Source(sources.Source):
    """An entry of ``dataset`` or ``val_dataset`` that is a local file.

    Attributes:
        mapped: the names in ``columns``: for each column of the file, what ms-swift takes it for.
    """

    mapped: Mapping[str, str]

    def load(self) -> Any:
        from datasets import load_dataset

        kind = {".jsonl": "json", ".txt": "text"}.get(self.file.suffix, self.file.suffix[1:])
        return load_dataset(kind, data_files=str(self.file), split="train")

    def in_use(self) -> str:
        return f"columns is {json.dumps(dict(self.mapped))}" if self.mapped else "columns is unset"

    def advice(self, rows: Description) -> Advice:
        names = _COLUMNS.get(rows.format or "")
        if names is None:
            return Advice("make whole conversations of both sides, prompt included", False)
        words = json.dumps(names if rows.format == STRINGS else _COLUMNS[CONVERSATIONS])
        return Advice(f"set columns to '{words}'", names.items() <= self.mapped.items())

    def wrong(self) -> str | None:
        first: Mapping[str, Any] = next(self._written(), {})
        names = self._read_as(first)
        if names & _CHOSEN and names & _REJECTED:
            other = not_text(self._written(), first)
            return None if other is None else f"{self.key} {self.path!r}: {other}."
        if "messages" in names or ("response" in names and "rejected" not in first):
            return (
                f"{self.key} {self.path!r}: its first row has no rejected answer, got the columns "
                f"{', '.join(first)}. Give it a column rejected_messages or rejected_response."
            )
        return super().wrong()

    def _read_as(self, row: Mapping[str, Any]) -> set[str]:
        """ms-swift's names of the columns in which a row holds anything."""
        from swift.dataset import MessagesPreprocessor, ResponsePreprocessor

        of_host = {**MessagesPreprocessor().columns, **ResponsePreprocessor().columns}
        given = (self.mapped.get(column, column) for column, cell in row.items() if cell)
        return {of_host.get(name.lower(), name) for name in given}


def check_files(args: Any) -> None:
    """Refuse local files of pairs that can't be read.

    Raises:
        ValueError: the message names key and file, and the line of a broken one.
    """
    sources.check_files(listed(args))
    for key in _KEYS:
        for name in _named(args, key):
            # Of https://..., ms-swift asks a hub for https, so the whole entry is checked too.
            for written in (_read_from(name), name):
                if Path(written).suffix in _FILES:
                    hub.check_there(key, written)
    for key in ("model", "ref_model"):
        if getattr(args, key, None):
            _check_model(key, str(getattr(args, key)))


def _check_model(key: str, name: str) -> None:
    """Refuse a local model that isn't there.

    ms-swift expands a ``~``, and reads ``MODEL:FOLDER`` as a folder inside a model.
    """
    name = os.path.expanduser(name)
    model, inside = name.partition(":")[0], name.replace(":", "/", 1)
    if not Path(name).exists():
        hub.check_there(key, inside if hub.is_path(model) else model)


def listed(args: Any) -> Iterator[Source]:
    """The local files in ``dataset`` and ``val_dataset``."""
    mapped = _mapped(args.columns)
    for key in _KEYS:
        for name in _named(args, key):
            path = _read_from(name)
            if Path(path).is_file():
                yield Source(key, path, key == "val_dataset", {}, mapped)


def _named(args: Any, key: str) -> list[str]:
    """The entries of ``dataset`` or ``val_dataset``, which in Python may be one string."""
    given = getattr(args, key, None) or ()
    return [given] if isinstance(given, str) else [str(name) for name in given]


def _mapped(columns: Any) -> Mapping[str, str]:
    """``columns`` as a mapping; it is JSON on a command line."""
    if isinstance(columns, str):
        try:
            columns = json.loads(columns)
        except ValueError:  # a file, or what ms-swift reports
            return {}
    return columns if isinstance(columns, Mapping) else {}


def explain(args: Any, error: BaseException) -> str | None:
    """Explain an error that was raised while ms-swift read the data, or for its pairs.

    None if the error came from elsewhere, or if nothing was found.
    """
    if not any(module.startswith(_READING) for module, _ in modules_of(error)):
        return None
    return sources.wrong_in(listed(args))


def nothing_left(args: Any, count: int) -> InvalidValue:
    """The error for data of which ms-swift drops every pair.

    Args:
        count: how many there were.
    """
    wrong = sources.wrong_in(listed(args))
    if wrong is not None:
        return InvalidValue(wrong)
    return pairs.none_fits("dataset", count, "max_length", args.max_length)


def reading(args: Any, read: Callable[[], Any], given: Any) -> Any:
    """What ``read`` returns: a data set to train on, and one to evaluate on.

    ms-swift drops rows that it can't read or encode, and stops with an obscure error if none is
    left.

    Args:
        args: ms-swift's arguments.
        read: a method of ms-swift that loads the data, or encodes what it is given.
        given: the training data that are encoded; None if they are loaded.

    Raises:
        ValueError: nothing is left to train on; or ms-swift's error, and what is wrong.
    """
    with explained(lambda error: explain(args, error)):
        found = read()
    before, left = _count(given), _count(found[0])
    if not before or left == before:
        return found
    key = f"max_length={args.max_length}"
    if not left:
        raise nothing_left(args, before)
    if PartialState().is_main_process:
        say(
            f"warning: {before - left} of {before} pairs are left out: they are longer than {key}, "
            "or ms-swift can't encode them. To keep long ones, raise max_length."
        )
    return found


def _count(rows: Any) -> int:
    """The number of rows; 0 for none, or for a stream."""
    return len(rows) if hasattr(rows, "__len__") else 0


def _read_from(name: str) -> str:
    """The file or name in an entry of ``dataset``; subsets and a number of rows may follow it."""
    from swift.dataset import DatasetSyntax

    return str(DatasetSyntax.parse(name).dataset)
