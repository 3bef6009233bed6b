"""Pairs that nothing can be learnt from, found in what a host has tokenized, before it trains."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import messages

#: How many pairs are looked at, spread evenly over the data: most pairs, or a defect of the
#: template, show in so many, and it takes a second.
LOOKED_AT = 2048
#: How many pairs are looked at of data that is streamed, the first ones.
FIRST = 64
_SHOWN = 40  # tokens
_DECODER = json.JSONDecoder()
_INK = re.compile(r"[^ \t\n\r]")  # what JSON doesn't take for space

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


def check_file(path: Path, name: str, columns: Sequence[str] = ()) -> None:
    """Refuse a local file of JSON that is empty, that the hosts can't read, or that has an entry
    without a column; the hosts' own error for it names neither file nor line.

    Hosts read objects, which may stand on a line each or over several, or one array of them.

    Args:
        name: of the key or flag that names the file.
        columns: that every entry must have.

    Raises:
        ValueError: the message names the line.
    """
    if path.suffix not in (".json", ".jsonl") or not path.is_file():
        return
    entries = 0
    try:
        for place, row in _entries(path):
            entries += 1
            for column in columns:
                if isinstance(row, dict) and column not in row:
                    got = ", ".join(row) or "nothing"
                    raise ValueError(f"{place} can't be used: it has no {column!r}, got {got}")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} must be in UTF-8, got {str(path)!r} ({error}). Write it again in UTF-8."
        ) from None
    except ValueError as error:
        raise ValueError(
            f"{name} must be JSON lines, got {str(path)!r}, of which {error}. Mend that line, or "
            "remove it."
        ) from None
    if not entries:
        raise ValueError(f"{name} must hold a pair, got {str(path)!r}, which is empty.")


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Place and value of each entry; None for what the hosts alone can read.

    Raises:
        ValueError: a line is broken; the message begins with its number.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            row = _object(line)
            if row is not None:
                yield f"line {number}", row
            elif line.strip():
                break  # an array, an object over several lines, or broken
        else:
            return
    text = path.read_text(encoding="utf-8")
    try:
        values = _values(text.removeprefix("\ufeff"))
    except ValueError:
        if not _read_by_hosts(path):
            raise
        values = [None]
    # Some releases of datasets can't read an array that a byte order mark or a space stands before.
    if text[0] not in "[{" and _read_by_hosts(path) is False:
        raise ValueError("line 1 can't be used: it must begin with the [ of an array, or a {")
    yield from ((f"entry {number}", value) for number, value in enumerate(values, 1))


def _read_by_hosts(path: Path) -> bool | None:
    """Whether ``datasets``, by which the hosts read files, can; None where it isn't installed."""
    try:
        from datasets import load_dataset
    except ImportError:
        return None
    try:
        read = load_dataset("json", data_files=str(path), split="train", streaming=True)
        for _ in read.with_format("arrow").iter(batch_size=1000):
            pass
    except Exception:  # of pyarrow, pandas or datasets
        return False
    return True


def _object(text: str) -> dict[str, Any] | None:
    """The JSON object that ``text`` is; None where it is none that the hosts can read."""
    try:
        value = json.loads(text)
        _check_surrogates(text, value)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _values(text: str) -> list[Any]:
    """The objects that stand in ``text`` one after the other, or in one array.

    Raises:
        ValueError: it is broken; the message begins with the number of the line.
    """
    try:
        return _parsed(text)
    except json.JSONDecodeError as error:
        whole = error
    lines = text.split("\n")
    opening = next((line for line in lines if line.strip()), "")
    is_array = opening.lstrip().startswith("[") and _why_broken(opening) is not None
    if not is_array and any(line.startswith("{") and _object(line) is not None for line in lines):
        # JSON lines: a line that is cut may read on into the next, and break further down.
        for number, line in enumerate(lines, 1):
            if line.strip() and _object(line) is None:
                why = _why_broken(line) or "it is not one JSON object"
                raise ValueError(f"line {number} can't be used: {why}")
    raise ValueError(f"line {whole.lineno} can't be used: {whole.msg}")


def _parsed(text: str) -> list[Any]:
    if text.lstrip().startswith("["):
        value = json.loads(text)
        _check_surrogates(text, value)
        return list(value)
    values: list[Any] = []
    end = 0
    while (start := _INK.search(text, end)) is not None:
        value, end = _DECODER.raw_decode(text, start.start())
        if not isinstance(value, dict | None):
            raise json.JSONDecodeError("it is not one JSON object", text, start.start())
        _check_surrogates(text[start.start() : end], value)
        values.append(value or {})  # hosts read null as an entry without columns
    return values


def _why_broken(text: str) -> str | None:
    try:
        _parsed(text)
    except json.JSONDecodeError as error:
        return error.msg
    return None


def _check_surrogates(text: str, value: Any) -> None:
    """Python reads half of a surrogate pair, and the hosts do not."""
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise json.JSONDecodeError("it has half of a surrogate pair", text, 0) from None
