"""Useless data in ways that only OpenRLHF has; the contract has the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from contract import PAIRS, alike, empty, lines

pytestmark = pytest.mark.xdist_group("bad data")

OURS = ["--loss", "focalpo"]
DOUBLED = (
    "{{ bos_token }}{{ bos_token }}{% for message in messages %}{{ message['role'] + ': ' + "
    "message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

# It leaves the EOS to OpenRLHF, which puts it after a space.
WITHOUT_EOS = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture
def rows(few: Path) -> list[dict]:
    found = (few / "train.jsonl").read_text().splitlines()[:PAIRS]
    return [{side: json.loads(line)[side] for side in ("chosen", "rejected")} for line in found]


def refused(run) -> str:
    """The last printed line."""
    assert run.returncode != 0
    assert not run.steps("train/")
    return run.stderr.strip().splitlines()[-1]


def test_a_line_without_a_column(train: Callable, rows: list[dict], tmp_path: Path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(lines([rows[0], *({"rejected": row["rejected"]} for row in rows)]))
    run = train(*OURS, "--data.dataset", str(path))
    said = ": line 2 can't be used: it has no 'chosen', got rejected. Fix that line"
    assert said in refused(run), run.output


def test_two_bos_by_the_chat_template(train: Callable):
    message = refused(train(*OURS, "--data.tokenizer_chat_template", DOUBLED))
    assert "of 40 pairs have two BOS at their start: the chat template and the " in message
    assert "'<|begin_of_text|><|begin_of_text|>user: " in message


def test_an_answer_of_a_space_and_an_eos(train: Callable, rows: list[dict], tmp_path: Path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(lines(map(empty, rows)))
    template = ("--data.tokenizer_chat_template", WITHOUT_EOS)
    run = train(*OURS, "--data.dataset", str(path), *template)
    message = refused(run)
    assert "training data refused: 16 of 16 pairs have an empty answer. Remove them" in message, (
        run.output
    )
    assert "To train anyway, set --focalpo.allow_data." in message


def test_evaluation_data_is_warned_of(train: Callable, rows: list[dict], tmp_path: Path):
    """All pairs of the evaluation data have a fault."""
    (tmp_path / "held_out.jsonl").write_text(lines(map(alike, rows)))
    held_out = ("--eval.dataset", str(tmp_path / "held_out.jsonl"), "--eval.split", "train")
    run = train(*OURS, *held_out)
    assert run.returncode == 0, run.output
    evaluated = "focalpo_plugins: warning: 16 of 16 pairs of the evaluation data have identical"
    assert len(run.said(evaluated)) == 1
