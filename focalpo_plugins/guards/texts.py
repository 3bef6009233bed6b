"""Compares what a host trains of a row, as text, with what the chat template renders of it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from os.path import commonprefix
from typing import NamedTuple

from .faults import Catalogue, Fault

_END = 16  # characters at the end of an answer, which every template keeps
_BEFORE, _AFTER = 24, 60  # characters that a message shows around the first difference

# A thought without a word, as templates write it for an answer without reasoning.
_NO_THOUGHT = re.compile(
    r"<(\w+)>\s*</\1>|\[(\w+)\]\s*\[/\2\]|<\|(\w+)>\w*\s*<\3\|>", re.IGNORECASE
)

_WHY = {
    "sides": "sides whose earlier turns differ: {of_sides}. Give both sides the same turns before "
    "the last one",
    "cut": "an answer that isn't trained as the chat template renders it: {of_cut}",
    "twice": "an answer that begins what the end of the prompt has begun, such as a second "
    "<think>: the chat template's generation prompt writes it too. Take it out of the answers, or "
    "use another template",
    "lacks": "a prompt and an answer that together differ from what the chat template renders, "
    "such as a thought that isn't closed: {host} doesn't train what the template writes between "
    "the two. Use another template if that isn't meant",
    "turns": "sides that differ before their last turn: all turns from the first difference on are "
    "trained as the answer, the user's too. Give both sides the same turns before the last one if "
    "that isn't meant",
}
_CATALOGUE = Catalogue(
    "can't be trained as written",
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

    None if they don't, or only by white space or by a thought without a word.  Such a thought
    stands before an answer in some templates' renderings only, or only in their generation prompts:
    a model of such a template answers with it and without it.
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
    """What the host would train of the rows otherwise than the chat template renders it.

    Args:
        host: the host's name.
        of_sides: what the host does with sides whose earlier turns differ.
        of_cut: why the host cuts an answer wrongly, and what to do.
        marker: a text that the host renders beside an answer.  An answer that holds it is left to
            the check of the tokens, which says more about it.
        evaluation: whether this is evaluation data, of which nothing is refused.
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
        return f": trained is {side.answer[:_AFTER]!r}, and not {side.said[:_AFTER]!r}"
    if trained == whole:
        return ""
    differ = len(commonprefix([trained, whole]))
    start = max(0, differ - _BEFORE)
    one, other = (repr(text[start : differ + _AFTER]) for text in (trained, whole))
    return f": {one} is trained where the template renders {other}"
