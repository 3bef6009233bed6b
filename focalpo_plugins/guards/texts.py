"""Compares the text of a row that a host trains with the chat template's rendering of it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from os.path import commonprefix
from typing import NamedTuple

from .faults import Catalogue, Fault

_END = 16  # characters at the end of an answer, which every template keeps
_BEFORE, _AFTER = 24, 60  # characters that a message shows around the first difference

# An empty thought, as templates write it for an answer without reasoning.
_NO_THOUGHT = re.compile(
    r"<(\w+)>\s*</\1>|\[(\w+)\]\s*\[/\2\]|<\|(\w+)>\w*\s*<\3\|>", re.IGNORECASE
)

_WHY = {
    "sides": "sides whose earlier turns differ: {of_sides}. Give both sides the same turns before "
    "the last one",
    "cut": "an answer that isn't trained as the chat template renders it: {of_cut}",
    "twice": "an answer that repeats the end of the prompt, such as a second <think>: the chat "
    "template's generation prompt already writes it. Remove it from the answers, or use another "
    "template",
    "lacks": "a prompt and an answer that together differ from what the chat template renders, "
    "such as a thought that isn't closed: {host} doesn't train what the template writes between "
    "the two. Use another template if you don't want that",
    "turns": "sides that differ before their last turn: all turns from the first difference on are "
    "trained as the answer, including the user's. Give both sides the same turns before the last "
    "one if you don't want that",
}
_CATALOGUE = Catalogue(
    "rows",
    _WHY,
    harmless=("lacks", "turns"),  # the answers are trained in full
)


class Side(NamedTuple):
    """One side of a row: its texts as they are trained, and as they should be.

    Attributes:
        prompt: the text of the prompt that the host trains with.
        answer: the text of the answer that it trains.
        said: what the row's last message says.
        rendered: what the template renders of all messages of this side; None if the host writes
            its own format.
    """

    prompt: str
    answer: str
    said: str
    rendered: str | None


class Row(NamedTuple):
    """A row of preference data.

    Attributes:
        place: where it is, in words.
        chosen: the chosen side.
        rejected: the rejected side.
        turns_differ: whether the sides differ before their last message.
        in_answers: whether they do in what is trained as the answers, and a user speaks there.
    """

    place: str
    chosen: Side
    rejected: Side
    turns_differ: bool = False
    in_answers: bool = False


def difference(side: Side) -> str | None:
    """How prompt and answer differ from the template's rendering: ``cut``, ``twice`` or ``lacks``.

    None if they don't, or only by white space or by an empty thought.  Some templates write an
    empty thought only in their renderings or only in their generation prompts: models of such a
    template answer with it and without it.
    """
    said, answer = side.said.strip(), side.answer.rstrip()
    if side.rendered is None:
        return None if said in answer else "cut"
    whole = side.rendered.rstrip()
    if (side.prompt + answer).rstrip() == whole:
        return None
    kept = said if said in whole else said[-_END:]
    if not answer or not whole.endswith(answer) or kept not in answer:
        return "cut"
    prompt, before = side.prompt.rstrip(), whole.removesuffix(answer).rstrip()
    if before.startswith(prompt):
        between = before.removeprefix(prompt).strip()
    elif prompt.startswith(before):
        between = prompt.removeprefix(before).strip()
        if between and answer.lstrip().startswith(between.split()[0]):
            return "twice"
    else:
        return "cut"
    return None if not between or _NO_THOUGHT.fullmatch(between) else "lacks"


def find(
    rows: Iterable[Row],
    *,
    host: str,
    of_sides: str,
    of_cut: str,
    marker: str | None = None,
    evaluation: bool = False,
) -> list[Fault]:
    """The faults of rows that the host would train differently from the chat template.

    Args:
        host: the host's name.
        of_sides: what the host does with sides whose earlier turns differ.
        of_cut: why the host cuts an answer wrongly, and what to do.
        marker: a text that the host renders beside an answer.  An answer that holds it is left to
            the check of the tokens, which says more about it.
        evaluation: whether this is evaluation data, for which no run is refused.
    """
    found: dict[str, list[str]] = defaultdict(list)
    checked = 0
    for row in rows:
        checked += 1
        for name, side in _faults(row, marker).items():
            found[name].append(f"{row.place}{_shown(side)}")
    return _CATALOGUE.faults(
        found, checked, evaluation, host=host, of_sides=of_sides, of_cut=of_cut
    )


def _faults(row: Row, marker: str | None) -> dict[str, Side]:
    """The names of a row's faults, each with the side that shows it."""
    found: dict[str, Side] = {}
    for side in (row.chosen, row.rejected):
        # Empty answers, too, are named by the check of the tokens.
        if not side.said.strip() or marker is not None and marker in side.answer:
            continue
        name = difference(side)
        if name is not None:
            found.setdefault(name, side)
    if row.turns_differ and found:
        found = {"sides": next(iter(found.values()))}
    return found | ({"turns": row.rejected} if row.in_answers else {})


def _shown(side: Side) -> str:
    """The trained text and the template's, from shortly before they differ."""
    trained, whole = (side.prompt + side.answer).rstrip(), (side.rendered or "").rstrip()
    if side.rendered is None:
        return f": {side.answer[:_AFTER]!r} is trained instead of {side.said[:_AFTER]!r}"
    if trained == whole:
        return ""
    differ = len(commonprefix([trained, whole]))
    start = max(0, differ - _BEFORE)
    one, other = (repr(text[start : differ + _AFTER]) for text in (trained, whole))
    return f": {one} is trained, but the template renders {other}"
