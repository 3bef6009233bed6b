"""Describes rows of preference data: their columns in words, their format, and empty cells."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from .messages import meant

#: The formats that the hosts can read, by the names that docs/data.md gives them.
CONVERSATIONS = "whole conversations"
PROMPT_BESIDE = "a prompt beside whole conversations"
MESSAGES = "prompt and answers as message lists"
ONE_MESSAGE = "messages, and one message an answer"
STRINGS = "strings"
TEXTS = "two texts without a prompt"

_PROMPTS = ("prompt", "messages", "question", "instruction", "input")
_ANSWERING = ("assistant", "gpt", "model")
_COLUMNS = 8  # shown in a message
_CHECKED = 100_000  # rows
_OF_CSV = " In a CSV, words such as None, NA and null are read as an empty cell."


@dataclass(frozen=True)
class Description:
    """A description of rows.

    Attributes:
        words: the first row's columns, and what each holds.
        format: one of this module's formats; None if it is another one.
        prompt: the column of the prompt; None if there is none.
        problem: why no host can read the first row; None if a host can.
        odd: in words, the first later row that differs from the first one; None if none does.
    """

    words: str
    format: str | None
    prompt: str | None
    problem: str | None
    odd: str | None


def describe(
    rows: Iterable[Mapping[str, Any]],
    chosen: str = "chosen",
    rejected: str = "rejected",
    prompt: str | None = None,
) -> Description | None:
    """Describe the first row, and the first later one that differs from it; None without rows.

    Args:
        chosen: the column of the chosen answer.
        rejected: the column of the rejected answer.
        prompt: the column of the prompt, if the user has named one.
    """
    rows = islice(rows, _CHECKED)
    first = next(iter(rows), None)
    if first is None:
        return None
    names = _PROMPTS if prompt is None else (prompt, *_PROMPTS)
    found = next((name for name in names if first.get(name) is not None), None)
    columns = (chosen, rejected, *(() if found is None else (found,)))
    kinds = [_kind(first.get(name)) for name in columns]
    odd = None
    for number, row in enumerate(rows, 1):
        if [_kind(row.get(name)) for name in columns] != kinds:
            odd = f"row {number} has {_in_words({name: row.get(name) for name in columns})}"
            break
    format, problem = _format(first, chosen, rejected, found)
    return Description(_in_words(first), format, found, problem, odd)


def empty_cell(dataset: Any, columns: Iterable[str], name: str, path: str = "") -> str | None:
    """The first row of a data set of ``datasets`` with an empty cell in the columns, in words.

    Hosts stop at such a row with an obscure error, or train on the word None.

    Args:
        name: the user's key or flag for the data set.
        path: its file, folder or name on a hub; empty if it isn't known.
    """
    first = {}
    for column in columns:
        if column in dataset.column_names and dataset.data.column(column).null_count:
            cells = dataset.select_columns([column]).with_format("arrow")[:].column(column)
            row = cells.is_null().index(True).as_py()
            if row >= 0:  # else the empty cells are in rows that were not selected
                first[column] = row
    if not first:
        return None
    column, row = min(first.items(), key=lambda found: found[1])
    csv = "" if path and not path.endswith(".csv") else _OF_CSV
    return (
        f"{name} must have prompt and answers in every row, got row {row} (the first is 0)"
        f"{f' of {path!r}' * bool(path)} with an empty cell in the column {column!r}. Fill it, or "
        f"remove the row.{csv}"
    )


def not_text(rows: Iterable[Mapping[str, Any]], columns: Collection[str]) -> str | None:
    """The first row with a message whose content is neither text nor parts, in words.

    Args:
        columns: the columns that may hold messages.
    """
    for number, row in enumerate(islice(rows, _CHECKED)):
        for column in columns:
            cell = row.get(column)
            for message in cell if isinstance(cell, list) else [cell]:
                if not isinstance(message, Mapping) or "tool_calls" in message:
                    continue
                content = message.get("content", "")
                if not isinstance(content, str | list):
                    return (
                        f"row {number} (the first is 0) has a message with the content {content!r} "
                        f"in the column {column!r}. Write it as text, or remove the row"
                    )
    return None


def _format(
    row: Mapping[str, Any], chosen: str, rejected: str, prompt: str | None
) -> tuple[str | None, str | None]:
    """The format, or why there is none."""
    missing = [name for name in (chosen, rejected) if row.get(name) is None]
    if missing:
        return None, f"it has no {' and no '.join(map(repr, missing))}{meant(missing[0], row)}"
    answers = _kind(row[chosen]), _kind(row[rejected])
    asked = None if prompt is None else _kind(row[prompt])
    if "other messages" in (*answers, asked):
        return None, "its messages have other keys than role and content: rename them"
    if answers[0] != answers[1]:
        return None, f"{chosen} and {rejected} have different formats"
    answer = answers[0]
    if answer == "conversation":
        return (CONVERSATIONS if asked is None else PROMPT_BESIDE), None
    if answer == "text":
        return (TEXTS if asked is None else STRINGS), None
    if answer not in ("answer", "message"):
        return None, f"{chosen} and {rejected} are neither text nor messages"
    if asked is None:
        return None, "its answers have no prompt: put it into a column prompt"
    return (MESSAGES if answer == "answer" else ONE_MESSAGE), None


def _kind(value: Any) -> str:
    """``text``, ``message``, ``answer`` (messages that begin with the assistant's),
    ``conversation`` (other messages), ``other messages``, ``nothing``, or another type's name."""
    if value is None or value == "" or value == []:
        return "nothing"
    if isinstance(value, str):
        return "text"
    messages = value if isinstance(value, list) else [value]
    if not all(isinstance(message, Mapping) for message in messages):
        return type(value).__name__
    if not all({"role", "content"} <= set(message) for message in messages):
        return "other messages"
    if not isinstance(value, list):
        return "message"
    return "answer" if messages[0]["role"] in _ANSWERING else "conversation"


def _in_words(row: Mapping[str, Any]) -> str:
    shown = [f"{name} ({_described(value)})" for name, value in list(row.items())[:_COLUMNS]]
    more = len(row) - len(shown)
    return ", ".join([*shown, *[f"{more} more"] * (more > 0)]) or "no columns"


def _described(value: Any) -> str:
    kind = _kind(value)
    if kind == "other messages":
        message = value[0] if isinstance(value, list) else value
        return f"messages with the keys {', '.join(map(str, message)) or 'none'}"
    if kind == "message":
        return "one message"
    if kind in ("answer", "conversation"):
        roles = [str(message["role"]) for message in value]
        said = ", ".join(roles[:3]) + (", ..." if len(roles) > 3 else "")
        return f"{len(roles)} message{'s' * (len(roles) != 1)}: {said}"
    return kind
