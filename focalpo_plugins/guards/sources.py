"""The data sets that a run reads: the format of their rows, and why the host can't read them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from . import jsonl
from .rows import Description, describe, empty_cell, not_text


class Advice(NamedTuple):
    """What the user sets for the host to read rows of a format.

    Attributes:
        words: what to do, as an imperative.
        taken: whether the run's settings are that already.
    """

    words: str
    taken: bool


@dataclass(frozen=True)
class Source(ABC):
    """A file, a folder or a hub's data set that the user names for a run.

    Attributes:
        key: the key or flag that names it.
        path: its name, as the user wrote it.
        evaluation: whether it is evaluated.
        columns: the user's names of ``chosen``, ``rejected`` and ``prompt``; the prompt's is left
            out if the user has named none.
    """

    key: str
    path: str
    evaluation: bool
    columns: Mapping[str, str]

    @abstractmethod
    def load(self) -> Any:
        """The rows, as the host loads them: a data set of ``datasets``."""

    @abstractmethod
    def in_use(self) -> str:
        """The settings by which the host reads the rows, in words."""

    @abstractmethod
    def advice(self, rows: Description) -> Advice:
        """What reads such rows."""

    @property
    def file(self) -> Path:
        """The file or folder; a name on a hub gives a path where nothing is."""
        return Path(self.path)

    @cached_property
    def rows(self) -> Any:
        """The result of :meth:`load`."""
        return self.load()

    def description(self, most: int | None = None) -> Description | None:
        """A description of the rows, of ``most`` at most; None if they can't be read."""
        try:
            return describe(islice(self._written(), most), **self.columns)
        except Exception:  # the host reports it
            return None

    def wrong(self) -> str | None:
        """Why the host can't read the rows, and what to do; None if nothing was found."""
        rows = self.description()
        if rows is None:
            return None
        start = f"{self.key} {self.path!r}: its first row has {rows.words}, and {self.in_use()}"
        if rows.problem is not None:
            return f"{start}: {rows.problem}{'' if rows.problem.endswith('?') else '.'}"
        words, taken = self.advice(rows)
        if not taken:
            return f"{start}: these are {rows.format}: {words}."
        other = not_text(self._written(), self.columns.values())
        if other is not None:
            return f"{self.key} {self.path!r}: {other}."
        if rows.odd is None:
            return None
        return self.empty_cell() or f"{start}, which fits, but {rows.odd}. Fix or remove that row."

    def empty_cell(self) -> str | None:
        """The first row without a prompt or an answer, in words; None if none is found."""
        with suppress(Exception):  # what can't be read, the host reports
            return empty_cell(self.rows, self.columns.values(), self.key, self.path)
        return None

    def _written(self) -> Iterator[Mapping[str, Any]]:
        """The rows as they are written: a loaded table has the same columns and types in all."""
        if self.file.suffix in jsonl.SUFFIXES and self.file.is_file():
            return jsonl.rows(self.file)
        return iter(self.rows)


def check_files(sources: Iterable[Source]) -> None:
    """Refuse local files of pairs that can't be read.

    Raises:
        ValueError: the message names key and file, and the line of a broken one.
    """
    for source in sources:
        jsonl.check_file(source.file, source.key)


def wrong_in(sources: Iterable[Source]) -> str | None:
    """Why the host can't read the rows of the sources; None if nothing was found."""
    return "; ".join(filter(None, (source.wrong() for source in sources))) or None


def described(sources: Iterable[Source]) -> list[str]:
    """A line for each source: its rows, their format, and what reads it."""
    lines = []
    for source in sources:
        rows = source.description(1)
        if rows is not None:
            line = f"{source.key} {source.path!r} has {rows.words}"
            if rows.format is not None:
                line += f": {rows.format}; to read them, {source.advice(rows).words}"
            lines.append(line)
    return lines


def remote_names(models: Mapping[str, str], sources: Iterable[Source]) -> dict[str, str]:
    """The names of models and data that may come from a hub, by the user's key or flag."""
    names = dict(models)
    for source in sources:
        if not source.file.exists():
            names[source.key] = ", ".join(filter(None, (names.get(source.key), source.path)))
    return names
