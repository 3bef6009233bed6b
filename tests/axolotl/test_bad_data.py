"""Data that nothing can be learnt from, through `axolotl train`: refused before the first step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Axolotl

Row = dict[str, list[dict[str, str]]]


def says(row: Row, side: str, answer: str) -> Row:
    return {**row, side: [*row[side][:-1], {"role": "assistant", "content": answer}]}


def alike(row: Row) -> Row:
    return says(row, "rejected", row["chosen"][-1]["content"])


def long_prompt(row: Row) -> Row:
    question = {"role": "user", "content": "And how many words are in this? " * 60}
    return {side: [question, row[side][-1]] for side in ("chosen", "rejected")}


def without(side: str) -> Callable[[Row], Row]:
    return lambda row: {key: value for key, value in row.items() if key != side}


REFUSED: dict[str, tuple[Callable[[list[Row]], str], tuple[str, ...]]] = {
    "chosen equal to rejected": (
        lambda rows: lines(map(alike, rows)),
        ("the training data can't be learnt from, got 12 of 12 pairs have a chosen answer equal to "
         "the rejected one", "The first is row 0 of the tokenized data, "),
    ),
    "most of them equal": (
        lambda rows: lines([*rows[:5], *map(alike, rows[5:])]),
        ("got 7 of 12 pairs have a chosen answer equal",),
    ),
    "prompts longer than the limit": (
        lambda rows: lines(map(long_prompt, rows)),
        ("train_dataset must hold a pair, got none", "sequence_len"),
    ),
    "an empty file": (lambda rows: "", ("datasets[0].path must hold a pair, got ", "pairs.jsonl', which is empty")),
    "malformed JSON": (lambda rows: lines(rows)[:-40], ("datasets[0].path must be JSON lines, got ", "pairs.jsonl', of which line 12 can't be used: ")),
    "no column chosen": (lambda rows: lines(map(without("chosen"), rows)), ("chosen",)),
    "no column rejected": (lambda rows: lines(map(without("rejected"), rows)), ("rejected",)),
}  # fmt: skip


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def run_on(axolotl: Axolotl, tiny: Path, write: Callable[[list[Row]], str]):
    kept = ("chosen", "rejected")
    found = (tiny / "train.jsonl").read_text().splitlines()[:12]
    rows = [{key: json.loads(line)[key] for key in kept} for line in found]
    pairs = axolotl.folder / "pairs.jsonl"
    pairs.write_text(write(rows))
    data = {"path": str(pairs), "ds_type": "json", "split": "train",
            "type": "chat_template.argilla_chat"}  # fmt: skip
    return axolotl("train", axolotl.config(datasets=[data], max_steps=1, save_steps=1))


@pytest.mark.parametrize("case", REFUSED)
def test_refused(axolotl: Axolotl, tiny: Path, case: str):
    write, words = REFUSED[case]
    run = run_on(axolotl, tiny, write)
    assert run.code != 0
    assert not run.checkpoints
    message = run.output.strip().splitlines()[-1]
    for word in words:
        assert word in message, run.output[-3000:]


def test_a_few_are_warned_of(axolotl: Axolotl, tiny: Path):
    run = run_on(axolotl, tiny, lambda rows: lines([*map(alike, rows[:4]), *rows[4:]]))
    assert run.code == 0, run.output[-3000:]
    warning = "focalpo_plugins: warning: 4 of 12 pairs have a chosen answer equal"
    assert run.output.count(warning) == 1
