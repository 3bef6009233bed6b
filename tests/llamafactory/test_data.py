"""Rows and entries of dataset_info.json that LLaMA-Factory reads, and what is said of others."""

from __future__ import annotations

import json
from typing import Any

import pytest
from harness import EXAMPLES, ManyFocalpo, run_python
from llamafactory_run import LlamaFactory

pytestmark = pytest.mark.releases

USER = {"role": "user", "content": "How many words are here: lemon, weak?"}
GOOD, BAD = "There are two words in the list.", "That is hard to say."
MESSAGES = {
    "messages": [USER],
    "chosen": {"role": "assistant", "content": GOOD},
    "rejected": {"role": "assistant", "content": BAD},
}
TAGGED = {
    "conversations": [{"from": "human", "value": USER["content"]}],
    "chosen": {"from": "gpt", "value": GOOD},
    "rejected": {"from": "gpt", "value": BAD},
}
STRINGS = {"prompt": USER["content"], "chosen": GOOD, "rejected": BAD}
LISTS = {
    "prompt": [USER],
    "chosen": [MESSAGES["chosen"]],
    "rejected": [MESSAGES["rejected"]],
}
SIDES = {"chosen": "chosen", "rejected": "rejected"}
TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user",
        "assistant_tag": "assistant", "system_tag": "system"}  # fmt: skip
OF_MESSAGES = {"formatting": "sharegpt", "ranking": True, "tags": TAGS,
               "columns": {"messages": "messages", **SIDES}}  # fmt: skip
OF_TAGGED = {"formatting": "sharegpt", "ranking": True,
             "columns": {"messages": "conversations", **SIDES}}  # fmt: skip
OF_STRINGS = {"formatting": "alpaca", "ranking": True, "columns": {"prompt": "prompt", **SIDES}}


@pytest.fixture
def check(llamafactory: LlamaFactory):
    def checked(row: dict[str, Any], entry: dict[str, Any], **changes: Any) -> tuple[int, str, str]:
        path = llamafactory.folder / "rows.jsonl"
        path.write_text(8 * (json.dumps(row) + "\n"))
        info = llamafactory.folder / "dataset_info.json"
        info.write_text(json.dumps({"rows": {"file_name": path.name, **entry}}))
        config = llamafactory.write(llamafactory.config(dataset="rows", **changes))
        return ManyFocalpo(llamafactory.folder)("check", config, "--json")

    return checked


@pytest.mark.parametrize(
    "row, entry", [(MESSAGES, OF_MESSAGES), (TAGGED, OF_TAGGED), (STRINGS, OF_STRINGS)]
)
def test_what_it_reads(check, row: dict[str, Any], entry: dict[str, Any]):
    """All three are the same pair: one user turn, and an answer with its end of turn."""
    code, output, errors = check(row, entry)
    assert code == 0, errors
    found = json.loads(output)
    assert (found["rows"], found["dropped"]) == (8, 0)
    counts = found["counts"]
    assert counts["starts_with_bos"] == 16 and counts["uncut_without_eos"] == 0
    assert "set ranking: true and formatting: " in found["formats"][0]


@pytest.mark.parametrize(
    "row, entry, advice",
    [
        (MESSAGES, {**OF_MESSAGES, "tags": {}}, "in columns messages: messages, chosen: chosen, rejected: rejected, and in tags role_tag: role, content_tag: content, user_tag: user"),
        (MESSAGES, {**OF_MESSAGES, "columns": {"messages": "prompt", **SIDES}}, "in columns messages: messages"),
        (STRINGS, OF_MESSAGES, "these are strings: set ranking: true and formatting: alpaca, in columns prompt: prompt, chosen: chosen, rejected: rejected"),
        (STRINGS, {**OF_STRINGS, "columns": {"prompt": "prompt"}}, "in columns prompt: prompt, chosen: chosen, rejected: rejected"),
        (LISTS, OF_MESSAGES, "write the prompt's messages into one column"),
        ({**MESSAGES, "messages": [USER, MESSAGES["rejected"]]}, OF_MESSAGES, "row 0 (the first is 0) has the turns user, assistant before its answers"),
        ({**MESSAGES, "messages": []}, OF_MESSAGES, "has the turns none before its answers"),
        ({**MESSAGES, "chosen": {"role": "assistant", "content": None}}, OF_MESSAGES, "row 0 (the first is 0) has a message with the content None in the column 'chosen'"),
    ],
)  # fmt: skip
def test_what_it_does_not_read(check, row: dict[str, Any], entry: dict[str, Any], advice: str):
    code, _, errors = check(row, entry)
    assert code != 0
    assert advice in errors.strip().splitlines()[-1]


def test_the_script_for_whole_conversations(llamafactory: LlamaFactory, tiny):
    """Its files train as they are."""
    script = EXAMPLES / "llamafactory" / "make_data.py"
    out = llamafactory.folder / "made"
    run = run_python(str(script), str(tiny / "train.jsonl"), "--out", str(out))
    assert run.returncode == 0, run.stderr
    run = llamafactory.train(dataset_dir=str(out), dataset="train", max_steps=1)
    assert "focalpo_plugins: active." in run.output


def test_the_script_refuses_sides_that_differ(tmp_path):
    path = tmp_path / "rows.jsonl"
    answer = [{"role": "assistant", "content": GOOD}]
    other = [{"role": "user", "content": "Another question"}]
    path.write_text(json.dumps({"chosen": [USER, *answer], "rejected": [*other, *answer]}) + "\n")
    script = EXAMPLES / "llamafactory" / "make_data.py"
    run = run_python(str(script), str(path), "--out", str(tmp_path / "out"))
    assert run.returncode != 0
    assert "row 0: both sides must have the same turns before the last one" in run.stderr
