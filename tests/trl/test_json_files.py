"""Files of pairs that hosts can't read: what is refused, with file and line, and what passes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from json_files import FILES

from focalpo_plugins.guards.jsonl import check_file

pytestmark = pytest.mark.releases


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
    start = f"data must be JSON lines, got {str(file)!r}: line {line} can't be used: "
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


def test_a_misspelt_column(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"chosen": "a", "rejectd": "b"}\n')
    why = "it has no 'rejected', got chosen, rejectd; did you mean 'rejectd'? Fix that line"
    with pytest.raises(ValueError, match=re.escape(why)):
        check_file(tmp_path / "p.jsonl", "data", ["chosen", "rejected"])


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
    """The file exists, but hosts would read others."""
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
    """Also for the current folder. A name that matches only itself is read, and so is a folder that
    ``datasets`` has saved, which isn't a pattern."""
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
