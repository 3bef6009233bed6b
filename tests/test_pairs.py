"""Pairs that nothing can be learnt from: what is refused, what is warned of, what passes."""

from __future__ import annotations

from typing import Any

import pytest

from focalpo_plugins import pairs

BOS, EOS = 1, 2
GOOD = ([BOS, 5, 6], [7, 8, EOS], [9, EOS])
BAD: dict[str, tuple[tuple[list[int], ...], str]] = {
    "identical": (([BOS, 5], [7, EOS], [7, EOS]), "a chosen answer equal to the rejected one"),
    "empty chosen": (([BOS, 5], [EOS], [7, EOS]), "an empty answer. Remove them"),
    "empty rejected": (([BOS, 5], [7, EOS], []), "an empty answer. Remove them"),
    "cut": (([BOS, *[5] * 9], [7], [8]), "no token of the answer within max_length=10. Raise"),
    "doubled": (([BOS, BOS, 5], [7], [8]), "two BOS at their start: chat template and tokenizer"),
}


def check(rows: list[tuple[list[int], ...]], **changes: Any) -> None:
    given = {
        "bos": BOS,
        "eos": EOS,
        "key": "max_length",
        "limit": 10,
        "say": True,
        "decode": lambda ids: " ".join(map(str, ids)),
        **changes,
    }
    pairs.check(((row, *pair) for row, pair in enumerate(rows)), **given)


@pytest.mark.parametrize("fault", BAD)
def test_refused_where_most_have_it(fault: str, capsys):
    """Two of three is more than half, one of two is not."""
    pair, why = BAD[fault]
    with pytest.raises(ValueError) as refused:
        check([GOOD, pair, pair])
    assert "got 2 of 3 pairs have " in str(refused.value)
    shown = " ".join(map(str, [*pair[0], *pair[1]]))
    assert str(refused.value).endswith(f"The first is row 1 of the tokenized data, {shown!r}")
    assert why in str(refused.value)
    check([pair, GOOD])
    said = capsys.readouterr().err
    assert said.startswith("focalpo_plugins: warning: 1 of 2 pairs have ")
    assert why in said and said.count("\n") == 1
    check([pair, GOOD], say=False)
    assert not capsys.readouterr().err


def test_good_pairs_pass_without_a_word(capsys):
    check([GOOD] * 3)
    check([([BOS, BOS, 5], [7], [8])], bos=None)  # a tokenizer without a BOS
    check([([BOS, *[5] * 9], [7], [8])], limit=None)
    assert capsys.readouterr() == ("", "")


def test_no_pairs():
    with pytest.raises(
        ValueError, match="must hold a pair, got none: .* longer than max_length=10"
    ):
        check([])


@pytest.mark.parametrize(
    "content, why",
    [
        ("", "data must hold a pair, got "),
        ("\n \n", "data must hold a pair, got "),
        ('{"a": 1}\n{"a": \n', "of which line 2 can't be used: Expecting value"),
        ('{"a": 1}\n\n{"a": 1}\nb\n', "of which line 4 can't be used: Expecting value"),
        (b'{"a": 1}\n{"a": "\xff"}\n', "('utf-8' codec can't decode byte 0xff"),
    ],
)
def test_files_refused(tmp_path, content, why):
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as refused:
        pairs.check_file(file, "data")
    assert why in str(refused.value) and repr(str(file)) in str(refused.value)


def test_a_line_without_a_column(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"a": 1, "b": 2}\n{"a": 1, "c": 2}\n')
    pairs.check_file(tmp_path / "p.jsonl", "data", ["a"])
    with pytest.raises(ValueError, match="line 2 can't be used: it has no 'b', got a, c. Mend"):
        pairs.check_file(tmp_path / "p.jsonl", "data", ["a", "b"])


def test_files_that_pass(tmp_path):
    """JSON lines; and what the hosts read otherwise: one array, an object over several lines,
    another format, a name on a hub."""
    for name, content in (
        ("a.jsonl", '{"a": 1}\n\n{"a": 2}'),
        ("b.json", '[{"a": 1},\n {"a": 2}]'),
        ("c.json", '{"data":\n [1]}'),
        ("d.parquet", ""),
    ):
        (tmp_path / name).write_text(content)
        pairs.check_file(tmp_path / name, "data")
    pairs.check_file(tmp_path / "nobody" / "pairs", "data")


def test_places():
    """All of a few; evenly spread, the first included, of many."""
    assert list(pairs.places(0)) == [] and list(pairs.places(3)) == [0, 1, 2]
    assert len(pairs.places(pairs.LOOKED_AT)) == pairs.LOOKED_AT
    many = pairs.places(10**6)
    assert pairs.LOOKED_AT / 2 < len(many) <= pairs.LOOKED_AT and many[0] == 0
    assert many[-1] > 0.99 * 10**6
