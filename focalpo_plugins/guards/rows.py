"""Describes rows of preference data: their columns in words, and their format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
_LOOKED_AT = 100_000  # rows


@dataclass(frozen=True)
class Look:
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

    def line(self, name: str, read_by: str) -> str:
        """One line on the rows of ``name``; ``read_by`` names what reads them."""
        return f"{name} has {self.words}" + ("" if self.format is None else f": {read_by}")

    def mismatch(self, start: str, fits: bool, advice: str, verb: str = "fits") -> str | None:
        """Why rows could not be read, after ``start``; None if all rows fit.

        Args:
            fits: whether the type or the flags in use read rows of this format.
            advice: what does.
            verb: ``fit`` if ``start`` ends with the names of several flags.
        """
        if self.problem is not None:
            return f"{start}: {self.problem}. docs/data.md lists the formats."
        if not fits:
            return f"{start}: these are {self.format}: {advice}. docs/data.md lists the formats."
        if self.odd is not None:
            return f"{start}, which {verb}; {self.odd}. Fix that row, or remove it."
        return None


def look(
    rows: Iterable[Mapping[str, Any]],
    chosen: str = "chosen",
    rejected: str = "rejected",
    prompt: str | None = None,
) -> Look | None:
    """Describe the first row, and the first later one that differs from it; None without rows.

    Args:
        chosen: the column of the chosen answer.
        rejected: the column of the rejected answer.
        prompt: the column of the prompt, if the user has named one.
    """
    first, odd = None, None
    columns: Sequence[str] = ()
    for number, row in zip(range(_LOOKED_AT), rows, strict=False):
        if first is None:
            first = row
            names = _PROMPTS if prompt is None else (prompt, *_PROMPTS)
            found = next((name for name in names if row.get(name) is not None), None)
            columns = (chosen, rejected, *(() if found is None else (found,)))
            continue
        if any(_kind(row.get(name)) != _kind(first.get(name)) for name in columns):
            odd = f"row {number} has {_in_words({name: row.get(name) for name in columns})}"
            break
    if first is None:
        return None
    format, problem = _format(first, chosen, rejected, found)
    return Look(_in_words(first), format, found, problem, odd)


def _format(
    row: Mapping[str, Any], chosen: str, rejected: str, prompt: str | None
) -> tuple[str | None, str | None]:
    """The format, or why there is none."""
    missing = [name for name in (chosen, rejected) if row.get(name) is None]
    if missing:
        return None, f"it has no {' and no '.join(map(repr, missing))}"
    answers = _kind(row[chosen]), _kind(row[rejected])
    asked = None if prompt is None else _kind(row[prompt])
    if "other messages" in (*answers, asked):
        return None, "its messages have other keys than role and content: rename them"
    if answers[0] != answers[1]:
        return None, f"{chosen} and {rejected} are not alike"
    answer = answers[0]
    if answer == "conversation":
        return (CONVERSATIONS if asked is None else PROMPT_BESIDE), None
    if answer == "text":
        return (TEXTS if asked is None else STRINGS), None
    if answer not in ("answer", "message"):
        return None, f"{chosen} and {rejected} are neither text nor messages"
    if asked is None:
        return None, "its answers stand without a prompt: put it into a column prompt"
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
