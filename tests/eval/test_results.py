"""RESULTS.md against a transcription of the paper made for this test."""

from __future__ import annotations

import re

import pytest
from harness import EXAMPLES

METHODS = ["ORPO", "KTO", "DPO", "SimPO", "FocalPO"]

# Table 1: AlpacaEval 2.0 WR, LCWR, Arena-Hard WR, for Llama-3-Instruct and then for Mistral-Base.
TABLE_1 = """
33.8 38.1 26.0  12.6 14.7  6.2
31.8 33.1 11.7  12.3 14.9  8.8
47.5 48.2 33.1  18.6 20.6 16.4
47.5 53.7 33.8  21.4 17.0 13.3
49.8 54.7 34.6  20.4 23.9 17.1
"""
# Table 2: HellaSwag, ARC, TruthfulQA, WinoGrande, GSM8k, MMLU, Average; SFT and then as above.
TABLE_2_LLAMA = """
58.7 58.3 51.7 75.9 75.7 65.7 68.3
58.8 60.2 57.6 76.7 75.3 65.6 69.8
59.3 60.5 55.6 75.0 77.5 66.0 69.6
59.1 61.3 56.3 74.7 75.4 66.1 69.6
57.6 64.2 63.9 74.5 70.7 65.3 70.1
58.7 63.0 59.7 74.7 72.6 66.1 69.9
"""
TABLE_2_MISTRAL = """
62.1 54.9 43.0 77.9 38.8 59.7 59.9
63.8 56.5 47.9 79.3 43.1 61.5 62.9
64.3 59.2 52.5 79.5 46.6 59.4 64.0
64.4 58.3 53.1 76.7 31.8 57.4 60.9
64.1 59.8 50.8 76.9 31.5 58.4 60.6
66.7 61.4 55.0 78.6 33.0 59.6 62.7
"""
# SimPO's README at commit 71c2c59, tables v0.2 and v0.1: WR, LC, Arena-Hard; and the paper's row.
README = {
    "princeton-nlp/Llama-3-Instruct-8B-ORPO-v0.2": ([33.8, 38.1, 28.2], 0),
    "princeton-nlp/Llama-3-Instruct-8B-KTO-v0.2": ([32.1, 34.1, 27.3], 1),
    "princeton-nlp/Llama-3-Instruct-8B-SimPO-v0.2": ([47.5, 53.7, 36.5], 3),
    "princeton-nlp/Llama-3-Instruct-8B-DPO-v0.2": ([47.5, 48.2, 35.2], 2),
    "kaist-ai/mistral-orpo-beta": ([12.2, 14.7, 7.0], 0),
    "princeton-nlp/Mistral-7B-Base-SFT-SimPO": ([20.8, 21.4, 16.6], 3),
}


def numbers(text: str) -> list[list[float]]:
    return [[float(word) for word in line.split()] for line in text.strip().splitlines()]


def tables() -> list[list[list[str]]]:
    """The page's tables of scores, as rows of cells."""
    found: list[list[list[str]]] = [[]]
    for line in (EXAMPLES / "RESULTS.md").read_text().splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif found[-1]:
            found.append([])
    return [table for table in found if table and table[0][0] in ("method", "checkpoint")]


def check(table: list[list[str]], methods: list[str], expected: list[list[float]]) -> None:
    """Each of the paper's numbers has an empty cell for the reader's; the page has no other scores."""
    head, rule, *rows = table
    width = len(expected[0])
    assert head[0] == "method" and head[2 : 2 * width + 1 : 2] == ["yours"] * width
    assert set(rule) == {"---"} and {len(row) for row in table} == {len(head)}
    assert [row[0] for row in rows] == methods
    for row, values in zip(rows, expected, strict=True):
        assert [float(cell) for cell in row[1 : 2 * width + 1 : 2]] == values
        assert row[2 : 2 * width + 1 : 2] == [""] * width


def test_table_1():
    llama, mistral, *_ = tables()
    both = numbers(TABLE_1)
    for table, expected in ((llama, [r[:3] for r in both]), (mistral, [r[3:] for r in both])):
        assert table[0][1::2] == ["WR", "LC", "Arena-Hard"]
        check(table, METHODS, expected)


def test_the_checkpoints_readme():
    """Each of theirs has the paper's number in the same row; no row is equal in both."""
    head, rule, *rows = tables()[2]
    assert head == ["checkpoint", "WR", "paper", "LC", "paper", "Arena-Hard", "paper"]
    assert set(rule) == {"---"}
    assert [row[0] for row in rows] == list(README)
    for name, *cells in rows:
        theirs, number = README[name]
        row = numbers(TABLE_1)[number]
        papers = row[:3] if "Llama-3" in name else row[3:]
        assert [float(cell) for cell in cells[::2]] == theirs
        assert [float(cell) for cell in cells[1::2]] == papers
        assert theirs != papers


def test_the_authors_checkpoints():
    text = " ".join((EXAMPLES / "RESULTS.md").read_text().split())
    for name, lc, arena in (
        ("Llama-3-8B-Instruct-FocalPO", 54.7, 34.6), ("Mistral-7B-Base-SFT-FocalPO", 23.9, 17.1)
    ):  # fmt: skip
        scores = re.search(rf"`tongliuphysics/{name}`\D*([\d.]+)\D*([\d.]+)", text).groups()
        assert [float(score) for score in scores] == [lc, arena]


def test_table_2():
    """The last column is the mean of the six. In each of the twelve rows the average that the paper
    prints lies above it, by what the page says: the page has copied it correctly, and the paper has
    a slip or uses a different metric."""
    *_, llama, mistral = tables()
    assert len(tables()) == 5
    for table, text in ((llama, TABLE_2_LLAMA), (mistral, TABLE_2_MISTRAL)):
        expected = numbers(text)
        names = ["HellaSwag", "ARC", "TruthfulQA", "WinoGrande", "GSM8K", "MMLU", "average"]
        assert table[0][1:-1:2] == names and table[0][-1] == "mean of the six"
        check(table, ["SFT", *METHODS], expected)
        for row, (*six, average) in zip(table[2:], expected, strict=True):
            mean = sum(six) / 6
            assert float(row[-1]) == pytest.approx(mean, abs=0.0501)
            assert 3.6 < average - mean < 4.25
