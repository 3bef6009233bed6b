"""Useless data in ways that only Axolotl has; the contract has the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from contract import Row, alike, lines, says
from harness import Axolotl


def without_answer(row: Row) -> Row:
    """A row without an answer: Axolotl takes the whole conversation instead."""
    return says(row, "chosen", "")


def short_answer(row: Row) -> Row:
    """A row whose answer is a word of the template: Axolotl takes all the text after that word."""
    return says(row, "rejected", "user")


def spaced(row: Row) -> Row:
    """The tiny model's template trims as Llama-3's does, so Axolotl doesn't find this text in it."""
    return says(row, "chosen", row["chosen"][-1]["content"] + "\n")


REFUSED: dict[str, tuple[Callable[[list[Row]], str], tuple[str, ...]]] = {
    "empty answers, and words of the template": (
        lambda rows: lines([*map(without_answer, rows[:4]), *map(short_answer, rows[4:7]), *rows[7:]]),
        ("refused: 7 of 12 pairs have a BOS or another turn inside an answer", "answer is empty or",
         "To train anyway, set focalpo_allow_data: true."),
    ),
    # The row ends in `<|eot_id|>`; Axolotl's `find` leaves only its last character.
    "white space that the template trims": (
        lambda rows: lines([*rows[:5], *map(spaced, rows[5:])]),
        ("training data refused: 7 of 12 rows have an answer that isn't trained as the "
         "chat template renders it", "The first is row 5 of datasets[0].path ", "pairs.jsonl': ",
         "<|end_header_id|>\\n\\n>' is trained, but the template renders "),
    ),
}  # fmt: skip


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


def test_a_few_of_other_text_are_warned_of(axolotl: Axolotl, tiny: Path):
    run = run_on(axolotl, tiny, lambda rows: lines([*map(spaced, rows[:4]), *rows[4:]]))
    assert run.code == 0, run.output[-3000:]
    assert run.output.count("focalpo_plugins: warning: 4 of 12 rows have an answer that isn't") == 1


@pytest.mark.parametrize("first", ["chat", "plain"])
def test_one_bos_in_mixed_data(axolotl: Axolotl, tiny: Path, first: str):
    """The chat template writes a BOS and the tokenizer adds another; plain text gets only the
    tokenizer's. All 16 rows are checked. With the plain ones first, the others also have equal
    answers, which is allowed here."""
    found = (tiny / "train.jsonl").read_text().splitlines()[:12]
    rows = [json.loads(line) for line in found]
    if first == "plain":
        rows = list(map(alike, rows))
    plain = [{"question": f"Count to {i}.", "chosen": "Fine.", "rejected": "No."} for i in range(4)]
    sets = {"chat": (rows, "chat_template.argilla_chat"), "plain": (plain, "chatml.intel")}
    datasets = []
    for name in sorted(sets, reverse=first == "plain"):
        file = axolotl.folder / f"{name}.jsonl"
        file.write_text(lines(sets[name][0]))
        datasets.append(
            {"path": str(file), "ds_type": "json", "split": "train", "type": sets[name][1]}
        )
    run = axolotl.train(
        datasets=datasets, shuffle_merged_datasets=False, max_steps=1, save_steps=1,
        focalpo_allow_data=first == "plain")  # fmt: skip
    warnings = [line for line in run.output.splitlines() if "focalpo_plugins: warning" in line]
    if first == "chat":
        assert not warnings
    else:
        (warning,) = warnings
        assert "12 of 16 pairs have identical answers" in warning


def test_the_split_that_is_checked_is_the_one_that_is_trained(tmp_path: Path):
    """Of a saved data set with splits, Axolotl trains "train", whichever comes first."""
    from datasets import Dataset, DatasetDict

    from focalpo_plugins.axolotl.sources import listed

    sets = {"test": 1, "train": 3}
    saved = {name: Dataset.from_list([{"chosen": "a"}] * rows) for name, rows in sets.items()}
    DatasetDict(saved).save_to_disk(str(tmp_path / "saved"))
    (source,) = listed({"datasets": [{"path": str(tmp_path / "saved")}]})
    assert len(source.load()) == 3
