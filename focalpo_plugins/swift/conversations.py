"""Conversations as ms-swift's template encodes them, and as they are written in their rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from ..guards.faults import Catalogue, Fault
from ..guards.pairs import sampled
from .pairs import EncodedPairs

_SHOWN = 80  # characters
_WHY = {
    "asked": "no prompt: ms-swift puts an empty user turn before their answers. Put the prompt "
    "into the columns of both answers as their first turns, or name its column in columns",
    "rejected": "no rejected answer: ms-swift trains the chosen one in its place. Fill the empty "
    "cells, or remove the rows",
    "sides": "sides whose earlier turns differ: ms-swift trains each answer after the turns of its "
    "own side, so the two answers have different prompts. Give both sides the same turns before "
    "the last one if that isn't meant",
}
_CATALOGUE = Catalogue("rows", _WHY, harmless=("sides",))


def text_faults(found: EncodedPairs, evaluation: bool = False) -> list[Fault]:
    """The faults of rows that ms-swift encodes differently from two answers to one prompt.

    Args:
        found: the pairs.
        evaluation: whether this is evaluation data, for which no run is refused.
    """
    if found.is_stream:  # its rows are encoded, and hold no messages
        return []
    places: dict[str, list[str]] = defaultdict(list)
    checked = 0
    for number, row in sampled(found.rows):
        names, shown = _faults_of(row), ""
        if names:  # encoding takes two milliseconds, so the other rows aren't encoded here
            both = found.encoded(row)
            if both is None:
                continue
            shown = found.template.tokenizer.decode(both[1].ids)[:_SHOWN]
        checked += 1
        for name in names:
            places[name].append(f"row {number} of the tokenized data, rejected: {shown!r}")
    return _CATALOGUE.faults(places, checked, evaluation)


def _faults_of(row: Mapping[str, Any]) -> list[str]:
    found = {
        "asked": not _asks(row),
        "rejected": not _rejects(row),
        "sides": _earlier_turns_differ(row),
    }
    return [name for name, has in found.items() if has]


def _asks(row: Mapping[str, Any]) -> bool:
    """Whether a message before the answer says anything."""
    return any(turn.get("content") for turn in row["messages"][:-1])


def _rejects(row: Mapping[str, Any]) -> bool:
    """Whether anything differs from the chosen side."""
    return any(value for name, value in row.items() if name.startswith("rejected_"))


def _earlier_turns_differ(row: Mapping[str, Any]) -> bool:
    if not row.get("rejected_messages"):
        return False
    said = [
        [(turn["role"], turn["content"]) for turn in (row.get(name) or ())[:-1]]
        for name in ("messages", "rejected_messages")
    ]
    return said[0] != said[1]
