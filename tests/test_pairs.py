"""Pairs that nothing can be learnt from: what is refused, what is warned of, what passes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from json_files import FILES

from focalpo_plugins.guards import pairs
from focalpo_plugins.guards.jsonl import check_file

BOS, EOS, TURN, SPACE, MARKER = 1, 2, 3, 4, 99


class Tokenizer:
    """A token is its number, but for special ones, and one that is white space."""

    bos_token_id, eos_token_id = BOS, EOS

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        kept = [i for i in ids if not skip_special_tokens or i not in (BOS, EOS, TURN)]
        return " ".join(" \n" if i == SPACE else str(i) for i in kept)


Pair = tuple[list[int], list[int], list[int]]
GOOD: Pair = ([BOS, 5, 6], [7, 8, EOS], [9, EOS])
EQUAL = "a chosen answer equal to the rejected one"
EMPTY = "an empty answer. Remove them"
LEFT = "no token of the answer within max_length=10. Raise"
STRAYED = "a BOS, or another turn, inside an answer"
DOUBLED = "two BOS at their start: chat template and tokenizer"
END: dict[str, Any] = {"keep_end": True}
BAD: dict[str, tuple[Pair, str, dict[str, Any]]] = {
    "equal": (([BOS, 5], [7, EOS], [7, EOS]), f"{EQUAL}: the margin stays 0. Remove them", {}),
    # 2 tokens of the prompt and 8 of the answer are kept; the answers differ in the ninth.
    "equal once cut": (
        ([BOS, 5], [*[7] * 8, 8, EOS], [*[7] * 8, EOS]),
        f"{EQUAL}, 2 of them once cut to max_length=10: the margin stays 0. Raise max_length, "
        "remove them", {}),
    # The last 10 are kept, and of neither answer the first.
    "equal once their start is cut": (
        ([BOS, 5], [8, *[7] * 9, EOS], [9, *[7] * 9, EOS]),
        f"{EQUAL}, 2 of them once cut to max_length=10: the margin stays 0", END),
    # 10 tokens, as a host leaves them that has cut them itself.
    "cut before": (([BOS, 5], [7] * 8, [7] * 8), f"{EQUAL}, 2 of them once cut to", {}),
    "equal, and cut": (([BOS, 5], [7] * 9, [7] * 9), f"{EQUAL}: the margin stays 0", {}),
    "an EOS alone": (([BOS, 5], [EOS], [7, EOS]), EMPTY, {}),
    "nothing": (([BOS, 5], [7, EOS], []), EMPTY, {}),
    "a space and an EOS": (([BOS, 5], [SPACE, EOS], [7, EOS]), EMPTY, {}),
    "the end of a turn": (([BOS, 5], [7, EOS], [TURN, SPACE, EOS]), EMPTY, {}),
    "many spaces": (([BOS, 5], [*[SPACE] * 7, EOS], [7, EOS]), EMPTY, {}),
    "no room": (([BOS, *[5] * 9], [7], [8]), LEFT, {}),
    "room for a space": (([BOS, *[5] * 8], [SPACE, 7], [SPACE, 8]), LEFT, {}),
    "two BOS": (([BOS, BOS, 5], [7], [8]), DOUBLED, {}),
    "two BOS, no prompt": (([], [BOS, BOS, 5, 7], [BOS, BOS, 5, 8]), DOUBLED, {}),
    "a whole conversation": (([BOS, 5], [BOS, 6, EOS, TURN, EOS], [7, EOS]), STRAYED, {}),
    "a BOS further in": (([BOS, 5], [7, EOS], [SPACE, BOS, 5, 7]), STRAYED, {}),
    "the host's own text": (
        ([5], [7, MARKER, EOS], [7, EOS]), STRAYED, {"marker": f"{MARKER}"}),
    # No BOS tells it where it is the EOS too, as GPT-2's is.
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


def check(rows: list[Pair], bos: int | None = BOS, **changes: Any) -> None:
    given = {
        "key": "max_length",
        "limit": 10,
        "allow": "allow_data: true",
        "allowed": False,
        "say": True,
        **changes,
    }
    tokenizer = Tokenizer()
    tokenizer.bos_token_id = bos
    pairs.check(((row, *pair) for row, pair in enumerate(rows)), tokenizer, **given)


@pytest.mark.parametrize("fault", BAD)
def test_refused_where_most_have_it(fault: str, capsys):
    """Two of three is more than half, one of two is not."""
    pair, why, changes = BAD[fault]
    with pytest.raises(ValueError) as refused:
        check([GOOD, pair, pair], **changes)
    assert "the training data can't be learnt from, got 2 of 3 pairs have " in str(refused.value)
    shown = Tokenizer().decode([*pair[0], *pair[1]])
    assert str(refused.value).endswith(
        f" Give allow_data: true to train on them all the same. The first is row 1 of the "
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
    """What would be refused is warned of in one line; of evaluation data it always is."""
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
    """Of "Yes" and "Yes, and no" the prompt is "Yes": the EOS alone is left, and its place learnt.
    A pair that is equal besides stays at margin 0."""
    pair: Pair = ([BOS, 5, 7], [EOS], [8, EOS])
    check([pair] * 3, shared=True)
    said = capsys.readouterr().err
    assert said.startswith(
        "focalpo_plugins: warning: 3 of 3 pairs have one answer that is the start"
    )
    assert said.count("\n") == 1 and "column prompt" in said and "empty" not in said
    with pytest.raises(ValueError, match="got 3 of 3 pairs have a chosen answer equal to"):
        check([([BOS, 5], [EOS], [EOS])] * 3, shared=True)


def test_no_pairs():
    """Which nothing allows."""
    with pytest.raises(
        ValueError, match="must hold a pair, got none: .* longer than max_length=10"
    ):
        check([], allowed=True)


@pytest.mark.parametrize("case", FILES)
def test_files(tmp_path, case: str):
    content, line, why = FILES[case]
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(content.encode())
    if line is None:
        check_file(file, "data")
        return
    with pytest.raises(ValueError) as refused:
        check_file(file, "data")
    start = f"data must be JSON lines, got {str(file)!r}, of which line {line} can't be used: "
    assert str(refused.value).startswith(start + why)
    assert str(refused.value).endswith(". Fix that line, or remove it.")


@pytest.mark.parametrize(
    "content, why",
    [
        (b"", "data must hold a pair, got "),
        (b"\n \n", "data must hold a pair, got "),
        (b"[]", "data must hold a pair, got "),
        (b'{"a": 1}\n{"a": "\xff"}\n', "('utf-8' codec can't decode byte 0xff"),
        ('{"a": 1}\n'.encode("utf-16"), "data must be in UTF-8, got "),
    ],
)
def test_files_refused_as_a_whole(tmp_path, content: bytes, why: str):
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError) as refused:
        check_file(file, "data")
    assert why in str(refused.value) and repr(str(file)) in str(refused.value)


@pytest.mark.parametrize(
    "content, place",
    [
        ('{"a": 1, "b": 2}\n{"a": 1, "c": 2}\n', "line 2"),
        ('[{"a": 1, "b": 2},\n {"a": 1, "c": 2}]', "entry 2"),
        ('{"a": 1,\n "c": 2}\n', "entry 1"),
    ],
)
def test_an_entry_without_a_column(tmp_path, content: str, place: str):
    (tmp_path / "p.jsonl").write_text(content)
    check_file(tmp_path / "p.jsonl", "data", ["a"])
    why = re.escape(f"{place} can't be used: it has no 'b', got a, c. Fix")
    with pytest.raises(ValueError, match=why):
        check_file(tmp_path / "p.jsonl", "data", ["a", "b"])


def test_files_that_are_not_looked_at(tmp_path):
    """Other formats, and names on a hub."""
    for name in ("d.parquet", "e.jsonl.gz"):
        (tmp_path / name).write_text("{")
        check_file(tmp_path / name, "data")
    check_file(tmp_path / "nobody" / "pairs", "data")


PATTERNS = {
    "a class": ("p[12].jsonl", "p1.jsonl"),
    "a star": ("p*.jsonl", "p.jsonl, pairs.jsonl"),
    "a question mark": ("p?.jsonl", "p1.jsonl"),
    "a folder": ("run[1]/p.jsonl", "run1/p.jsonl"),
    "nothing": ("q[12].jsonl", None),
}


@pytest.mark.parametrize("case", PATTERNS)
def test_a_path_that_hosts_take_for_a_pattern(case: str, tmp_path, monkeypatch):
    """The file is there, and they would read others."""
    path, others = PATTERNS[case]
    found = [] if others is None else others.split(", ")
    for name in (path, *found):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"a": 1}\n')
    monkeypatch.chdir(tmp_path)
    for given in (Path(path), tmp_path / path):
        with pytest.raises(ValueError) as refused:
            check_file(given, "data")
        said = str(refused.value)
        assert said.startswith(f"data must have a path without [ * ?, got {str(given)!r}: hosts")
        assert ("matches nothing" in said) is (others is None)
        assert all(str(tmp_path / name) in said for name in found)


def test_a_folder_s_name_is_a_part_of_the_pattern(tmp_path, monkeypatch):
    """Of the current folder too. A name that matches only itself is read, and so is a folder that
    ``datasets`` has saved, which is no pattern."""
    for name in ("run[1]", "run1", "saved[1]"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "p.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "saved[1]" / "state.json").write_text("{}")
    (tmp_path / "a?b.jsonl").write_text('{"a": 1}\n')
    for name in ("a?b.jsonl", "saved[1]", "run1/p.jsonl", "no[thing].jsonl"):
        check_file(tmp_path / name, "data")
    monkeypatch.chdir(tmp_path / "run[1]")
    with pytest.raises(ValueError, match="data must have a path without"):
        check_file(Path("p.jsonl"), "data")


def test_places():
    """All of a few; evenly spread, the first included, of many."""
    assert list(pairs.places(0)) == [] and list(pairs.places(3)) == [0, 1, 2]
    assert len(pairs.places(pairs.LOOKED_AT)) == pairs.LOOKED_AT
    many = pairs.places(10**6)
    assert pairs.LOOKED_AT / 2 < len(many) <= pairs.LOOKED_AT and many[0] == 0
    assert many[-1] > 0.99 * 10**6


def test_cut():
    """Of 3 + 4 tokens the first five, the last five, the last three, and all."""
    prompt, answer = [1, 2, 3], [4, 5, 6, 7]
    assert pairs.cut(prompt, answer, 5) == [4, 5]
    assert pairs.cut(prompt, answer, 5, keep_end=True) == [4, 5, 6, 7]
    assert pairs.cut(prompt, answer, 3, keep_end=True) == [5, 6, 7]
    assert pairs.cut(prompt, answer, 3) == []
    assert pairs.cut(prompt, answer, 7) == pairs.cut(prompt, answer, None) == answer
