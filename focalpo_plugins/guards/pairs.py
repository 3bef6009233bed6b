"""Finds useless pairs in a host's tokenized data, before it trains."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ..errors import InvalidValue
from .faults import Catalogue, Fault

#: Number of pairs that are checked, spread evenly over the data.  These show a fault of most pairs
#: or of the template, and the check takes a second.
SAMPLE = 2048
#: Number of pairs that are checked if the data is streamed: the first ones.
FIRST = 64
_SHOWN = 40  # tokens

_WHY = {
    "identical": "identical answers{cut}, so their margin stays 0. {fix}, or check which columns "
    "are read as chosen and rejected",
    "empty": "an empty answer. Remove them, or check which columns are read as the answers",
    "shared": "one answer that is the start of the other: without a column prompt, their common "
    "start is the prompt, and the pair only teaches where to stop. Add a column prompt if you "
    "don't want that",
    "cut": "a prompt that leaves no token of the answer within {key}={limit}. Raise {key}, or "
    "remove them",
    "strayed": "a BOS or another turn inside an answer: the host read more than the answer, as "
    "Axolotl's chat templates do if an answer is empty or a word of the template. Remove them",
    "doubled": "two BOS at their start: the chat template and the tokenizer each add one. Remove "
    "it from the template or from the text",
}
_CATALOGUE = Catalogue("pairs", _WHY, harmless=("shared",))

#: Row in the data, and token ids of prompt, chosen and rejected answer.
Pair = tuple[int, Sequence[int], Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Cutting:
    """How a host cuts sequences, and separates prompt and answers.

    Attributes:
        key: the host's key or flag for the length that sequences are cut to.
        limit: that length in tokens; None if nothing is cut.
        keep_end: whether the start is cut off, and not the end.
        shared: whether the host takes the common start of two texts as their prompt.  One answer
            can then become empty.  Such a pair only causes a warning: it teaches where to stop.
        marker: a text that the host renders beside an answer, and never as a part of it.
    """

    key: str
    limit: int | None
    keep_end: bool = False
    shared: bool = False
    marker: str | None = None


def blank(tokenizer: Any) -> Callable[[int], bool]:
    """A function that tells if a token has no text: it is special, the EOS, or white space."""

    @functools.cache
    def is_blank(token: int) -> bool:
        if token == tokenizer.eos_token_id:
            return True
        return not tokenizer.decode([token], skip_special_tokens=True).strip()

    return is_blank


def faults_of_answers(
    chosen: Sequence[int], rejected: Sequence[int], is_blank: Callable[[int], bool]
) -> list[str]:
    """The faults of two answers' token ids: ``identical``, ``empty``, both or none.

    The margin of identical answers is 0 for any weights.  An empty answer has only blank tokens:
    the end of a turn, a line end, or the space that OpenRLHF puts before the EOS.  If only one of
    the two is empty, the margin can change, but such a pair is nearly always a mistake.

    Args:
        is_blank: the result of :func:`blank`.
    """
    found = ["identical"] if list(chosen) == list(rejected) else []
    if any(all(map(is_blank, answer)) for answer in (chosen, rejected)):
        found.append("empty")
    return found


def cut(
    prompt: Sequence[int], answer: Sequence[int], limit: int | None, keep_end: bool = False
) -> list[int]:
    """What is left of the answer after prompt and answer are cut to ``limit`` tokens.

    The first tokens are kept, or with ``keep_end`` the last ones.
    """
    over = 0 if limit is None else max(0, len(prompt) + len(answer) - limit)
    if keep_end:
        return list(answer[max(0, over - len(prompt)) :])
    return list(answer[: max(0, len(answer) - over)])


def sampled(dataset: Any) -> Iterator[tuple[int, Any]]:
    """Number and content of each row that is checked, spread evenly over the data.

    For a stream, these are the first ones.
    """
    if not hasattr(dataset, "__len__"):
        yield from enumerate(islice(dataset, FIRST))
        return
    for row in range(0, len(dataset), max(1, -(-len(dataset) // SAMPLE))):
        yield row, dataset[row]


def none_fits(data: str, pairs: int, key: str, limit: object) -> InvalidValue:
    """The error for data of which the host drops every pair as too long.

    Args:
        data: the key or flag of the data.
        pairs: how many there were.
        key: the key or flag for the length that is allowed, ``limit``.
    """
    return InvalidValue(
        f"{data} must hold a pair that fits into {key}, got {pairs} pairs, none of which fits into "
        f"{limit}. Raise {key}."
    )


def find(
    pairs: Iterable[Pair], tokenizer: Any, cutting: Cutting, evaluation: bool = False
) -> list[Fault]:
    """The faults of tokenized pairs.

    Args:
        tokenizer: gives BOS and EOS, and decodes the first bad pair for the message: a row number
            isn't enough, as hosts shuffle and drop rows.
        evaluation: whether this is evaluation data, for which no run is refused.

    Raises:
        ValueError: there is no pair to train on.
    """
    found: dict[str, list[str]] = defaultdict(list)
    checked = alike_once_cut = 0
    is_blank = blank(tokenizer)
    for row, prompt, *answers in pairs:
        checked += 1
        names = _faults(prompt, answers, tokenizer, is_blank, cutting)
        for name in names:
            shown = tokenizer.decode([*prompt, *answers[0]][:_SHOWN])
            found[name].append(f"row {row} of the tokenized data, {shown!r}")
        if "identical" in names:
            # If the host has already cut the sequences, they have exactly this length.
            at_limit = len(prompt) + len(answers[0]) == cutting.limit
            alike_once_cut += at_limit or list(answers[0]) != list(answers[1])
    key, limit = cutting.key, cutting.limit
    if not checked and not evaluation:
        raise InvalidValue(
            "training data refused: it has no pair. The file is empty, or every pair was dropped "
            f"as longer than {key}={limit}. Check the file, or raise {key}."
        )
    once_cut, fix = "", "Remove them"
    if alike_once_cut:
        once_cut = f" ({alike_once_cut} of them only once cut to {key}={limit})"
        fix = f"Raise {key}, remove them"
    return _CATALOGUE.faults(
        found, checked, evaluation, key=key, limit=limit, cut=once_cut, fix=fix
    )


def _faults(
    prompt: Sequence[int],
    answers: Sequence[Sequence[int]],
    tokenizer: Any,
    is_blank: Callable[[int], bool],
    cutting: Cutting,
) -> list[str]:
    """The names of a pair's faults, once its answers are cut."""
    left = [cut(prompt, answer, cutting.limit, cutting.keep_end) for answer in answers]
    found = faults_of_answers(left[0], left[1], is_blank)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    blanks = [answer for answer in answers if all(map(is_blank, answer))]
    # If the host has already cut them, they have exactly this length, and no end.
    if "empty" in found and all(
        len(prompt) + len(each) == cutting.limit and eos not in each for each in blanks
    ):
        found = ["cut"]
    if found == ["empty"] and cutting.shared:
        found = ["shared"]
    if bos not in (None, eos) and [*prompt, *answers[0]][:2] == [bos, bos]:
        found.append("doubled")
    if any(_strayed(prompt, answer, tokenizer, cutting.marker) for answer in answers):
        found.append("strayed")
    return found


def _strayed(
    prompt: Sequence[int], answer: Sequence[int], tokenizer: Any, marker: str | None
) -> bool:
    """Whether the answer holds text that the host's rendering puts before an answer."""
    if marker is not None and marker in tokenizer.decode(answer):
        return True
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos in (None, eos) or bos not in answer:
        return False
    before = [*(prompt[-1:] or [bos]), *answer]
    # A template may begin each turn with a BOS, which follows the EOS of the turn before.
    return any(
        token == bos and last not in (bos, eos) for last, token in zip(before, answer, strict=False)
    )
