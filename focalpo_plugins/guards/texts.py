"""Compares what a host trains of a row, as text, with what the chat template renders of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ..errors import InvalidValue
from . import messages

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
#: Faults that cause a warning, and never a refusal: the answers are trained in full.
_NEVER_REFUSED = ("lacks", "turns")


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


class Fault(NamedTuple):
    """A fault that some rows have: its description, and whether a run is refused for it."""

    words: str
    refused: bool


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
    allow: str = "",
    marker: str | None = None,
) -> list[Fault]:
    """The faults of the rows, each described once, with its number of rows and the first of them.

    Args:
        host: the host's name.
        of_sides: what the host does with sides whose earlier turns differ.
        of_cut: why the host cuts an answer wrongly, and what to do.
        allow: what the user sets to train on data that is refused.
        marker: a text that the host renders beside an answer.  An answer that holds it is left to
            the check of the tokens, which says more about it.
    """
    count: dict[str, int] = dict.fromkeys(_WHY, 0)
    first: dict[str, str] = {}
    looked_at = 0
    for row in rows:
        looked_at += 1
        for name, side in _faults(row, marker):
            count[name] += 1
            first.setdefault(name, f"{row.place}{_shown(side)}")
    faults = []
    for name, where in first.items():
        why = _WHY[name].format(host=host, of_sides=of_sides, of_cut=of_cut)
        refused = 2 * count[name] > looked_at and name not in _NEVER_REFUSED
        give = f" Give {allow} to train on them anyway." if refused and allow else ""
        words = f"{count[name]} of {looked_at} rows have {why}.{give} The first is {where}"
        faults.append(Fault(words, refused))
    return faults


def check(faults: Iterable[Fault], *, allowed: bool, say: bool, evaluation: bool = False) -> None:
    """Refuse data for a fault that most rows have, and warn of the others.

    Args:
        faults: the result of :func:`find`.
        allowed: whether the user has allowed such data; then there are only warnings.
        say: whether this process writes the warnings.
        evaluation: whether this is evaluation data, which is never refused.

    Raises:
        ValueError: more than half of the rows have the same fault.
    """
    for words, refused in faults:
        if refused and not allowed and not evaluation:
            raise InvalidValue(f"the training data can't be trained as written, got {words}")
        if say:
            messages.say(f"warning: {'in the evaluation data, ' * evaluation}{words}")


def _faults(row: Row, marker: str | None) -> Iterator[tuple[str, Side]]:
    """Each fault of a row once, with the side that shows it."""
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
    if row.in_answers:
        found["turns"] = row.rejected
    yield from found.items()


def _shown(side: Side) -> str:
    """The trained text and the template's, from shortly before they differ."""
    trained, whole = (side.prompt + side.answer).rstrip(), (side.rendered or "").rstrip()
    if side.rendered is None:
        return f": trained is {side.answer[:_AFTER]!r}, and not {side.said[:_AFTER]!r}"
    if trained == whole:
        return ""
    both = zip(trained, whole, strict=False)
    differ = next(
        (place for place, (one, other) in enumerate(both) if one != other),
        min(len(trained), len(whole)),
    )
    start = max(0, differ - _BEFORE)
    one, other = (repr(text[start : differ + _AFTER]) for text in (trained, whole))
    return f": {one} is trained where the template renders {other}"
