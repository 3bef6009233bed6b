"""Useless pairs: which ones are refused, which ones cause a warning, which ones pass."""

from __future__ import annotations

from typing import Any

import pytest

from focalpo_plugins.guards import pairs
from focalpo_plugins.guards.faults import Policy

BOS, EOS, TURN, SPACE, MARKER = 1, 2, 3, 4, 99


class Tokenizer:
    """A token is its number, except for special ones and one that is white space."""

    bos_token_id, eos_token_id = BOS, EOS

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        kept = [i for i in ids if not skip_special_tokens or i not in (BOS, EOS, TURN)]
        return " ".join(" \n" if i == SPACE else str(i) for i in kept)


Pair = tuple[list[int], list[int], list[int]]
GOOD: Pair = ([BOS, 5, 6], [7, 8, EOS], [9, EOS])
EQUAL = "identical answers"
EMPTY = "an empty answer. Remove them"
LEFT = "no token of the answer within max_length=10. Raise"
STRAYED = "a BOS or another turn inside an answer"
DOUBLED = "two BOS at their start: the chat template and the tokenizer each add one. Remove it"
END: dict[str, Any] = {"keep_end": True}
BAD: dict[str, tuple[Pair, str, dict[str, Any]]] = {
    "equal": (([BOS, 5], [7, EOS], [7, EOS]), f"{EQUAL}, so their margin stays 0. Remove them", {}),
    # 2 tokens of the prompt and 8 of the answer are kept; the answers differ in the ninth.
    "equal once cut": (
        ([BOS, 5], [*[7] * 8, 8, EOS], [*[7] * 8, EOS]),
        f"{EQUAL} (2 of them only once cut to max_length=10), so their margin stays 0. Raise "
        "max_length, remove them", {}),
    # The last 10 are kept, without the first token of either answer.
    "equal once their start is cut": (
        ([BOS, 5], [8, *[7] * 9, EOS], [9, *[7] * 9, EOS]),
        f"{EQUAL} (2 of them only once cut to max_length=10), so their margin stays 0", END),
    # 10 tokens, as from a host that has already cut them.
    "cut before": (([BOS, 5], [7] * 8, [7] * 8), f"{EQUAL} (2 of them only once cut to max_length=10), so", {}),
    "equal, and cut": (([BOS, 5], [7] * 9, [7] * 9), f"{EQUAL}, so their margin stays 0", {}),
    "an EOS alone": (([BOS, 5], [EOS], [7, EOS]), EMPTY, {}),
    "nothing": (([BOS, 5], [7, EOS], []), EMPTY, {}),
    "a space and an EOS": (([BOS, 5], [SPACE, EOS], [7, EOS]), EMPTY, {}),
    "the end of a turn": (([BOS, 5], [7, EOS], [TURN, SPACE, EOS]), EMPTY, {}),
    "many spaces": (([BOS, 5], [*[SPACE] * 7, EOS], [7, EOS]), EMPTY, {}),
    "no room": (([BOS, *[5] * 9], [7], [8]), LEFT, {}),
    "no room, and cut before": (([BOS, *[5] * 9], [], []), LEFT, {}),
    "room for a space": (([BOS, *[5] * 8], [SPACE, 7], [SPACE, 8]), LEFT, {}),
    "two BOS": (([BOS, BOS, 5], [7], [8]), DOUBLED, {}),
    "two BOS, no prompt": (([], [BOS, BOS, 5, 7], [BOS, BOS, 5, 8]), DOUBLED, {}),
    "a whole conversation": (([BOS, 5], [BOS, 6, EOS, TURN, EOS], [7, EOS]), STRAYED, {}),
    "a BOS further in": (([BOS, 5], [7, EOS], [SPACE, BOS, 5, 7]), STRAYED, {}),
    "the host's own text": (
        ([5], [7, MARKER, EOS], [7, EOS]), STRAYED, {"marker": f"{MARKER}"}),
    # A BOS proves nothing if it is also the EOS, as GPT-2's is.
    "that, without a BOS": (
        ([5], [EOS, MARKER, EOS], [7, EOS]), STRAYED, {"marker": f"{MARKER}", "bos": EOS}),
}  # fmt: skip
FINE: dict[str, tuple[Pair, dict[str, Any]]] = {
    "no BOS to double": (([BOS, BOS, 5], [7], [8]), {"bos": None}),
    "no limit": (([BOS, *[5] * 9], [7], [8]), {"limit": None}),
    "cut, and different": (([BOS, 5], [*[7] * 7, 8, 9], [7] * 9), {}),
    "the end is kept": (([BOS, *[5] * 20], [7, EOS], [8, EOS]), END),
    # Llama-2's template writes one for each turn, after the EOS of the one before.
    "turns that begin with a BOS": (([BOS, 5], [7, EOS, BOS, 6, 7, EOS], [8, EOS]), {}),
    "a text without a prompt": (([], [BOS, 5, 7], [BOS, 5, 8]), {}),
    "EOS is BOS": (([5], [7, EOS, 6, EOS], [8, EOS]), {"bos": EOS}),
    "one starts with the other": (([BOS, 5], [7, EOS], [7, 8, EOS]), {}),
}


def check(
    rows: list[Pair],
    bos: int | None = BOS,
    allowed: bool = False,
    say: bool = True,
    evaluation: bool = False,
    **changes: Any,
) -> None:
    tokenizer = Tokenizer()
    tokenizer.bos_token_id = bos
    cutting = pairs.Cutting("max_length", **{"limit": 10, **changes})
    found = ((row, *pair) for row, pair in enumerate(rows))
    faults = pairs.find(found, tokenizer, cutting, evaluation)
    Policy("allow_data: true", allowed, say).check(faults)


@pytest.mark.parametrize("fault", BAD)
def test_refused_where_most_have_it(fault: str, capsys):
    """Two of three is more than half; one of two is not."""
    pair, why, changes = BAD[fault]
    with pytest.raises(ValueError) as refused:
        check([GOOD, pair, pair], **changes)
    assert "training data refused: 2 of 3 pairs have " in str(refused.value)
    shown = Tokenizer().decode([*pair[0], *pair[1]])
    assert str(refused.value).endswith(
        f" To train anyway, set allow_data: true. The first is row 1 of the "
        f"tokenized data, {shown!r}"
    )
    assert why in str(refused.value)
    assert not capsys.readouterr().err
    why = why.replace("2 of them", "1 of them")
    check([pair, GOOD], **changes)
    said = capsys.readouterr().err
    assert said.startswith("focalpo_plugins: warning: 1 of 2 pairs have ")
    assert why in said and said.count("\n") == 1 and "allow_data" not in said
    check([pair, GOOD], say=False, **changes)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("fault", BAD)
def test_allowed(fault: str, capsys):
    """A refused fault becomes one line of warning; evaluation data always gets only the warning."""
    pair, why, changes = BAD[fault]
    why = why.replace("2 of them", "1 of them")
    check([pair], allowed=True, **changes)
    said = capsys.readouterr().err
    assert said.startswith("focalpo_plugins: warning: 1 of 1 pairs have ") and why in said
    assert said.count("\n") == 1
    check([pair], evaluation=True, **changes)
    evaluation = said.replace("pairs", "pairs of the evaluation data")
    assert capsys.readouterr().err == evaluation
    check([], evaluation=True)


@pytest.mark.parametrize("case", FINE)
def test_good_pairs_pass_without_a_word(case: str, capsys):
    pair, changes = FINE[case]
    check([GOOD, pair], **changes)
    assert capsys.readouterr() == ("", "")


def test_a_common_start_that_became_the_prompt_is_never_refused(capsys):
    """For "Yes" and "Yes, and no" the prompt is "Yes": only the EOS is left, and its place is
    trained. A pair that is also equal stays at margin 0."""
    pair: Pair = ([BOS, 5, 7], [EOS], [8, EOS])
    check([pair] * 3, shared=True)
    said = capsys.readouterr().err
    assert said.startswith(
        "focalpo_plugins: warning: 3 of 3 pairs have one answer that is the start"
    )
    assert said.count("\n") == 1 and "column prompt" in said and "empty" not in said
    with pytest.raises(
        ValueError, match="training data refused: 3 of 3 pairs have identical answers"
    ):
        check([([BOS, 5], [EOS], [EOS])] * 3, shared=True)


def test_no_pairs():
    """No setting allows it."""
    with pytest.raises(
        ValueError, match="data refused: it has no pair. .* longer than max_length=10. Check the"
    ):
        check([], allowed=True)


def test_the_rows_that_are_checked():
    """All rows of a few; evenly spread rows, including the first, of many; the first rows of a
    stream."""
    assert list(pairs.sampled("")) == [] and list(pairs.sampled("abc")) == [*enumerate("abc")]
    assert len([*pairs.sampled(range(pairs.SAMPLE))]) == pairs.SAMPLE
    many = list(pairs.sampled(range(10**6)))
    assert all(row == item for row, item in many)
    assert pairs.SAMPLE / 2 < len(many) <= pairs.SAMPLE and many[0][0] == 0
    assert many[-1][0] > 0.99 * 10**6
    assert [*pairs.sampled(iter(range(10**6)))] == [(row, row) for row in range(pairs.FIRST)]


def test_cut():
    """The first five, the last five, the last three, and all of 3 + 4 tokens."""
    prompt, answer = [1, 2, 3], [4, 5, 6, 7]
    assert pairs.cut(prompt, answer, 5) == [4, 5]
    assert pairs.cut(prompt, answer, 5, keep_end=True) == [4, 5, 6, 7]
    assert pairs.cut(prompt, answer, 3, keep_end=True) == [5, 6, 7]
    assert pairs.cut(prompt, answer, 3) == []
    assert pairs.cut(prompt, answer, 7) == pairs.cut(prompt, answer, None) == answer
