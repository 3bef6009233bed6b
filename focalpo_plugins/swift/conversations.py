"""Conversations as ms-swift's template encodes them, and as their rows say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..guards.faults import Fault
from .pairs import EncodedPairs

_SHOWN = 80  # characters


def text_faults(found: EncodedPairs, template: Any, evaluation: bool = False) -> list[Fault]:
    """What of the rows is encoded otherwise than a pair of answers to one prompt.

    Args:
        found: the pairs.
        template: ms-swift's template.
        evaluation: whether this is evaluation data, for which no run is refused.
    """
    checked, differ = 0, []
    for number, row, chosen, rejected in found.sampled():
        checked += 1
        starts = [side.ids[: side.start] for side in (chosen, rejected)]
        if starts[0] != starts[1] and "rejected_messages" in row and _earlier_turns_differ(row):
            shown = template.tokenizer.decode(rejected.ids)[:_SHOWN]
            differ.append(f"row {number} of the tokenized data, rejected: {shown!r}")
    if not differ:
        return []
    unit = "rows" + " of the evaluation data" * evaluation
    words = (
        f"{len(differ)} of {checked} {unit} have sides whose earlier turns differ: ms-swift trains "
        "each answer after the turns of its own side, so the two answers have different prompts. "
        "Give both sides the same turns before the last one if that isn't meant"
    )
    return [Fault("can't be trained as written", words, differ[0], refused=False)]


def _earlier_turns_differ(row: Mapping[str, Any]) -> bool:
    said = [
        [(turn["role"], turn["content"]) for turn in (row.get(name) or ())[:-1]]
        for name in ("messages", "rejected_messages")
    ]
    return said[0] != said[1]
