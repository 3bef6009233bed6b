"""Pairs that nothing can be learnt from, found in what a host has tokenized, before it trains."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from . import messages

#: How many pairs are looked at, spread evenly over the data: most pairs, or a defect of the
#: template, show in so many, and it takes a second.
LOOKED_AT = 2048
_SHOWN = 40  # tokens

_WHY = {
    "identical": "a chosen answer equal to the rejected one: the margin stays 0. Remove them, or "
    "look at which columns are read as chosen and rejected",
    "empty": "an empty answer. Remove them, or look at which columns are read as the answers",
    "cut": "a prompt that leaves no token of the answer within {key}={limit}. Raise {key}, or "
    "remove them",
    "doubled": "two BOS at their start: chat template and tokenizer both write one. Take it out of "
    "the template or of the text",
}


def faults(chosen: Sequence[int], rejected: Sequence[int], eos: int | None) -> list[str]:
    """What is wrong with the token ids of two answers, of ``identical`` and ``empty``.

    An answer of nothing but its end is empty.
    """
    found = ["identical"] if list(chosen) == list(rejected) else []
    if any(all(token == eos for token in answer) for answer in (chosen, rejected)):
        found.append("empty")
    return found


def places(count: int) -> range:
    """The rows that are looked at, of ``count``."""
    return range(0, count, max(1, -(-count // LOOKED_AT)))


def check(
    pairs: Iterable[tuple[int, Sequence[int], Sequence[int], Sequence[int]]],
    *,
    bos: int | None,
    eos: int | None,
    decode: Callable[[list[int]], str],
    key: str,
    limit: int | None,
    say: bool,
) -> None:
    """Refuse data of which more than half can't be learnt from, and warn of less.

    Args:
        pairs: row in the data, and token ids of prompt, chosen and rejected answer.
        bos: the tokenizer's; None where it has none.
        eos: the tokenizer's.
        decode: token ids to text, to show the first such pair: hosts shuffle and drop rows.
        key: the host's key or flag for the length that sequences are cut to.
        limit: that length in tokens; None where nothing is cut.
        say: whether this process writes the warning.

    Raises:
        ValueError: there is no pair, or more than half have the same fault.
    """
    rows: dict[str, int] = dict.fromkeys(_WHY, 0)
    first: dict[str, tuple[int, list[int]]] = {}
    looked_at = 0
    for row, prompt, chosen, rejected in pairs:
        looked_at += 1
        found = faults(chosen, rejected, eos)
        if limit is not None and len(prompt) >= limit:
            found = ["cut"]
        if bos is not None and bos != eos and list(prompt[:2]) == [bos, bos]:
            found.append("doubled")
        for name in found:
            rows[name] += 1
            first.setdefault(name, (row, [*prompt, *chosen]))
    if not looked_at:
        raise ValueError(
            "the training data must hold a pair, got none: the file is empty, or every pair was "
            f"dropped as longer than {key}={limit}. Look at the file, or raise {key}."
        )
    for name, (row, tokens) in first.items():
        why = _WHY[name].format(key=key, limit=limit)
        message = (
            f"{rows[name]} of {looked_at} pairs have {why}. The first is row {row} of the "
            f"tokenized data, {decode(tokens[:_SHOWN])!r}"
        )
        if 2 * rows[name] > looked_at:
            raise ValueError(f"the training data can't be learnt from, got {message}")
        if say:
            messages.say(f"warning: {message}")


def check_file(path: Path, name: str, columns: Sequence[str] = ()) -> None:
    """Refuse a local file of JSON lines that is empty, or has a line that is no JSON or lacks a
    column; the hosts' own error for it names neither file nor line.

    Args:
        name: of the key or flag that names the file.
        columns: that every line must have.

    Raises:
        ValueError: the message names the line.
    """
    if path.suffix not in (".json", ".jsonl") or not path.is_file():
        return
    number = rows = 0
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):  # noqa: B007  (the message has it)
                if rows == 0 and line.strip() and not _is_json(line):
                    return  # one array or object over several lines, or the host's to say
                if not line.strip():
                    continue
                row = json.loads(line)
                rows += 1
                for column in columns:
                    if column not in row:
                        raise ValueError(f"it has no {column!r}, got {', '.join(row)}")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} must be in UTF-8, got {str(path)!r} ({error}). Write it again in UTF-8."
        ) from None
    except ValueError as error:
        raise ValueError(
            f"{name} must be JSON lines, got {str(path)!r}, of which line {number} "
            f"can't be used: {error}. Mend that line, or remove it."
        ) from None
    if not rows:
        raise ValueError(f"{name} must hold a pair, got {str(path)!r}, which is empty.")


def _is_json(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
