"""Data that nothing can be learnt from, through OpenRLHF's command: refused before the first step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from openrlhf_flags import of_host

pytestmark = pytest.mark.xdist_group("bad data")

OURS = ["--loss", "focalpo"]
(MAX_LEN,) = of_host(["--data.max_len"])
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


def says(row: dict, side: str, answer: str) -> dict:
    return {**row, side: [*row[side][:-1], {"role": "assistant", "content": answer}]}


def alike(row: dict) -> dict:
    return says(row, "rejected", row["chosen"][-1]["content"])


def empty(row: dict) -> dict:
    return says(row, "chosen", "")


def after_other_turns(row: dict) -> dict:
    """Two turns before the last question, the second of which is longer on the chosen side."""
    said = {"chosen": "A long answer that is good.", "rejected": "Short."}
    return {
        side: [turns[0], {"role": "assistant", "content": said[side]}, turns[0], turns[-1]]
        for side, turns in row.items()
    }


def long_prompt(row: dict) -> dict:
    question = {"role": "user", "content": "And how many words are in this? " * 60}
    return {side: [question, row[side][-1]] for side in ("chosen", "rejected")}


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


REFUSED: dict[str, tuple[Callable[[list[dict]], str], str]] = {
    "chosen equal to rejected": (
        lambda rows: lines(map(alike, rows)),
        "the training data can't be learnt from, got 16 of 16 pairs have a chosen answer equal to",
    ),
    "most of them equal": (
        lambda rows: lines([*rows[:7], *map(alike, rows[7:])]),
        "got 9 of 16 pairs have a chosen answer equal to the rejected one",
    ),
    "empty answers": (
        lambda rows: lines(map(empty, rows)),
        "got 16 of 16 pairs have an empty answer. Remove them",
    ),
    "sides whose earlier turns differ": (
        lambda rows: lines(map(after_other_turns, rows)),
        "got 16 of 16 rows have sides whose earlier turns differ: OpenRLHF cuts both off after as",
    ),
    "prompts longer than the limit": (lambda rows: lines(map(long_prompt, rows)),
        f"every pair was dropped as longer than {MAX_LEN}=128. Look at the file, or raise {MAX_LEN}.",
    ),
    "an empty file": (lambda rows: "", "dataset must hold a pair, got "),
    "the first line cut": (lambda rows: lines(rows)[9:], "of which line 1 can't be used: Expecting value. Fix"),
    "malformed JSON": (lambda rows: lines(rows)[:-40], "of which line 16 can't be used: Unterminated string"),
    "no column chosen": (
        lambda rows: lines([rows[0], *({"rejected": row["rejected"]} for row in rows)]),
        "of which line 2 can't be used: it has no 'chosen', got rejected. Fix that line",
    ),
    "no column rejected": (
        lambda rows: lines({"chosen": row["chosen"]} for row in rows),
        "of which line 1 can't be used: it has no 'rejected', got chosen. Fix that line",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(
    few: Path, tiny: Path, train_many: Callable, tmp_path_factory: pytest.TempPathFactory
) -> dict:
    found = (few / "train.jsonl").read_text().splitlines()[:16]
    rows = [{side: json.loads(line)[side] for side in ("chosen", "rejected")} for line in found]
    cases = {name: write for name, (write, _) in REFUSED.items()}
    cases["a few"] = lambda rows: lines([*map(alike, rows[:4]), *rows[4:]])
    flags = {}
    for number, (name, write) in enumerate(cases.items()):
        folder = tmp_path_factory.mktemp(f"bad_data{number}")
        (folder / "pairs.jsonl").write_text(write(rows))
        flags[name] = [*OURS, "--data.dataset", str(folder / "pairs.jsonl")]
    held_out = tmp_path_factory.mktemp("held_out") / "pairs.jsonl"
    held_out.write_text(lines(map(alike, rows)))
    flags["a few"] += ["--eval.dataset", str(held_out), "--eval.split", "train"]
    flags["allowed"] = [*flags["chosen equal to rejected"], "--focalpo.allow_data"]
    template = ["--data.tokenizer_chat_template", WITHOUT_EOS]
    flags["a space"] = [*flags["empty answers"], *template]
    flags["two BOS"] = [*OURS, "--data.tokenizer_chat_template", DOUBLED]
    from transformers import AutoModelForCausalLM

    reference = tmp_path_factory.mktemp("reference")
    cut = AutoModelForCausalLM.from_pretrained(tiny / "model")
    cut.resize_token_embeddings(100)
    cut.save_pretrained(reference)
    flags["embeddings"] = [*OURS, "--ref.model_name_or_path", str(reference)]
    return train_many(flags)


@pytest.mark.parametrize("case", REFUSED)
def test_refused(runs: dict, case: str):
    run = runs[case]
    assert run.returncode != 0
    assert not run.steps("train/")
    message = run.stderr.strip().splitlines()[-1]
    assert REFUSED[case][1] in message, run.output


def test_a_token_without_an_embedding(runs: dict):
    """The reference has the first 100 of the tokenizer's 883 tokens."""
    run = runs["embeddings"]
    assert run.returncode != 0
    assert not run.steps("train/")
    message = "the reference must have an embedding for each token of the data, got 100 embeddings"
    assert message in run.output and "the tokenizer has 883 tokens" in run.output


def test_two_bos_by_the_chat_template(runs: dict):
    run = runs["two BOS"]
    assert run.returncode != 0
    assert not run.steps("train/")
    message = run.stderr.strip().splitlines()[-1]
    assert "of 40 pairs have two BOS at their start: chat template and tokenizer both" in message
    assert "'<|begin_of_text|><|begin_of_text|>user: " in message


def test_an_answer_of_a_space_and_an_eos(runs: dict):
    run = runs["a space"]
    assert run.returncode != 0
    assert not run.steps("train/")
    message = run.stderr.strip().splitlines()[-1]
    assert "got 16 of 16 pairs have an empty answer. Remove them" in message, run.output
    assert "Give --focalpo.allow_data to train on them anyway." in message


def test_allowed(runs: dict):
    run = runs["allowed"]
    assert run.returncode == 0, run.output
    warning = "focalpo_plugins: warning: 16 of 16 pairs have a chosen answer equal to the rejected"
    assert len(run.said(warning)) == 1
    assert len(run.steps("train/")) == 2


def test_a_few_are_warned_of(runs: dict):
    """Of evaluation data, all that have a fault."""
    run = runs["a few"]
    assert run.returncode == 0, run.output
    warning = "focalpo_plugins: warning: 4 of 16 pairs have a chosen answer equal to the rejected"
    assert len(run.said(warning)) == 1
    evaluated = "focalpo_plugins: warning: 16 of 16 pairs of the evaluation data have a chosen"
    assert len(run.said(evaluated)) == 1
