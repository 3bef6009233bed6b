"""Pairs that nothing can be learnt from, found in what a host has tokenized, before it trains."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from . import messages

#: How many pairs are looked at, spread evenly over the data: most pairs, or a defect of the
#: template, show in so many, and it takes a second.
LOOKED_AT = 2048
#: How many pairs are looked at of data that is streamed, the first ones.
FIRST = 64
_SHOWN = 40  # tokens

_WHY = {
    "identical": "a chosen answer equal to the rejected one{cut}: the margin stays 0. {fix}, "
    "or look at which columns are read as chosen and rejected",
    "empty": "an empty answer. Remove them, or look at which columns are read as the answers",
    "shared": "an answer that the other one begins with: without a column prompt their common "
    "start is the prompt, and what is learnt is where to stop. Give a column prompt if that is "
    "not meant",
    "cut": "a prompt that leaves no token of the answer within {key}={limit}. Raise {key}, or "
    "remove them",
    "strayed": "a BOS, or another turn, inside an answer: the host took more than the answer, as "
    "Axolotl's chat templates do for an empty answer or one that is a word of the template. "
    "Remove them",
    "doubled": "two BOS at their start: chat template and tokenizer both write one. Take it out of "
    "the template or of the text",
}


def blank(tokenizer: Any) -> Callable[[int], bool]:
    """Whether a token says nothing: it is special, the EOS, or white space."""

    @functools.cache
    def is_blank(token: int) -> bool:
        if token == tokenizer.eos_token_id:
            return True
        return not tokenizer.decode([token], skip_special_tokens=True).strip()

    return is_blank


def faults(
    chosen: Sequence[int], rejected: Sequence[int], is_blank: Callable[[int], bool]
) -> list[str]:
    """What is wrong with the token ids of two answers, of ``identical`` and ``empty``.

    The margin of identical answers is 0 whatever the weights are.  An empty answer has blank tokens
    alone: what ends a turn, a line end, the space that OpenRLHF puts before the EOS.  If only one
    of the two is empty the margin can change, but in the data it is nearly always a mistake.

    Args:
        is_blank: of :func:`blank`.
    """
    found = ["identical"] if list(chosen) == list(rejected) else []
    if any(all(map(is_blank, answer)) for answer in (chosen, rejected)):
        found.append("empty")
    return found


def cut(
    prompt: Sequence[int], answer: Sequence[int], limit: int | None, keep_end: bool = False
) -> list[int]:
    """What is left of the answer once prompt and answer are cut to ``limit`` tokens: to the first
    ones, or with ``keep_end`` to the last."""
    over = 0 if limit is None else max(0, len(prompt) + len(answer) - limit)
    if keep_end:
        return list(answer[max(0, over - len(prompt)) :])
    return list(answer[: max(0, len(answer) - over)])


def places(count: int) -> range:
    """The rows that are looked at, of ``count``."""
    return range(0, count, max(1, -(-count // LOOKED_AT)))


def check(
    pairs: Iterable[tuple[int, Sequence[int], Sequence[int], Sequence[int]]],
    tokenizer: Any,
    *,
    key: str,
    limit: int | None,
    keep_end: bool = False,
    shared: bool = False,
    marker: str | None = None,
    allow: str,
    allowed: bool,
    say: bool,
    evaluation: bool = False,
) -> None:
    """Refuse data of which more than half can't be learnt from, and warn of less.

    A pair whose common start was taken for the prompt, and one answer for empty because of that, is
    warned of and never refused: it teaches where to stop.

    Args:
        pairs: row in the data, and token ids of prompt, chosen and rejected answer.
        tokenizer: names BOS and EOS, and shows the first such pair: hosts shuffle and drop rows.
        key: the host's key or flag for the length that sequences are cut to.
        limit: that length in tokens; None where nothing is cut.
        keep_end: whether what is cut off is the start.
        shared: whether the host takes the common start of two texts for their prompt.
        marker: a text that the host renders beside an answer, and never as a part of it.
        allow: what the user gives to train on data that is refused.
        allowed: whether it was given: what would be refused is warned of.
        say: whether this process writes the warnings.
        evaluation: whether this is evaluation data, of which nothing is refused.

    Raises:
        ValueError: there is no pair, or more than half have the same fault.
    """
    rows: dict[str, int] = dict.fromkeys(_WHY, 0)
    first: dict[str, tuple[int, list[int]]] = {}
    looked_at = alike_once_cut = 0
    is_blank = blank(tokenizer)
    for row, prompt, *answers in pairs:
        looked_at += 1
        chosen, rejected = (cut(prompt, answer, limit, keep_end) for answer in answers)
        found = faults(chosen, rejected, is_blank)
        if "empty" in found and not any(all(map(is_blank, answer)) for answer in answers):
            found = ["cut"]
        if found == ["empty"] and shared:
            found = ["shared"]
        if "identical" in found:
            # A host that has cut them already leaves sequences of just this length.
            at_limit = len(prompt) + len(answers[0]) == limit
            alike_once_cut += at_limit or list(answers[0]) != list(answers[1])
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if bos not in (None, eos) and [*prompt, *answers[0]][:2] == [bos, bos]:
            found.append("doubled")
        if any(_strayed(prompt, answer, tokenizer, marker) for answer in answers):
            found.append("strayed")
        for name in found:
            rows[name] += 1
            first.setdefault(name, (row, [*prompt, *answers[0]]))
    if not looked_at and not evaluation:
        raise ValueError(
            "the training data must hold a pair, got none: the file is empty, or every pair was "
            f"dropped as longer than {key}={limit}. Look at the file, or raise {key}."
        )
    once_cut, fix = "", "Remove them"
    if alike_once_cut:
        once_cut = f", {alike_once_cut} of them once cut to {key}={limit}"
        fix = f"Raise {key}, remove them"
    for name, (row, tokens) in first.items():
        why = _WHY[name].format(key=key, limit=limit, cut=once_cut, fix=fix)
        many = 2 * rows[name] > looked_at and name != "shared"
        refused = many and not allowed and not evaluation
        message = (
            f"{rows[name]} of {looked_at} pairs{' of the evaluation data' * evaluation} have {why}."
            f"{f' Give {allow} to train on them all the same.' * refused} The first is row {row} "
            f"of the tokenized data, {tokenizer.decode(tokens[:_SHOWN])!r}"
        )
        if refused:
            raise ValueError(f"the training data can't be learnt from, got {message}")
        if say:
            messages.say(f"warning: {message}")


def _strayed(
    prompt: Sequence[int], answer: Sequence[int], tokenizer: Any, marker: str | None
) -> bool:
    """Whether the answer holds what stands before an answer, in the host's rendering."""
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
