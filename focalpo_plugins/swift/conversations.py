"""Conversations as ms-swift's template encodes them, and as they are written in their rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from ..guards.faults import Catalogue, Fault
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


def text_faults(found: EncodedPairs, template: Any, evaluation: bool = False) -> list[Fault]:
    """The faults of rows that ms-swift encodes differently from two answers to one prompt.

    Args:
        found: the pairs.
        template: ms-swift's template.
        evaluation: whether this is evaluation data, for which no run is refused.
    """
    places: dict[str, list[str]] = defaultdict(list)
    checked = 0
    for number, row, _, rejected in found.sampled():
        checked += 1
        shown = template.tokenizer.decode(rejected.ids)[:_SHOWN]
        found_in_row = (
            ("asked", not _asks(row)),
            ("rejected", not _rejects(row)),
            ("sides", _earlier_turns_differ(row)),
        )
        for name, has in found_in_row:
            if has:
                places[name].append(f"row {number} of the tokenized data, rejected: {shown!r}")
    return _CATALOGUE.faults(places, checked, evaluation)


def _asks(row: Mapping[str, Any]) -> bool:
    """Whether a message before the answer says anything; a stream's rows don't tell."""
    turns = row.get("messages")
    return turns is None or any(turn.get("content") for turn in turns[:-1])


def _rejects(row: Mapping[str, Any]) -> bool:
    """Whether anything differs from the chosen side; a stream's rows don't tell."""
    return "messages" not in row or any(
        value for name, value in row.items() if name.startswith("rejected_")
    )


def _earlier_turns_differ(row: Mapping[str, Any]) -> bool:
    if not row.get("rejected_messages"):
        return False
    said = [
        [(turn["role"], turn["content"]) for turn in (row.get(name) or ())[:-1]]
        for name in ("messages", "rejected_messages")
    ]
    return said[0] != said[1]
