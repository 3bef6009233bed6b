"""`focalpo check` and `focalpo report` on what LLaMA-Factory reads and writes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from harness import ManyFocalpo
from llamafactory_run import LlamaFactory

pytestmark = pytest.mark.releases


@pytest.fixture
def checked(llamafactory: LlamaFactory):
    """What the command prints of a run, with changes."""

    def check(*options: str, **changes: Any) -> tuple[int, dict[str, Any], str]:
        path = llamafactory.write(llamafactory.config(**changes))
        focalpo = ManyFocalpo(llamafactory.folder)
        code, output, errors = focalpo("check", path, "--json", *options)
        return code, json.loads(output) if code == 0 else {}, errors

    return check


def test_the_plan(checked):
    """Of 40 pairs in steps of 8; every margin is 0 at first; nothing is left of the model."""
    code, found, errors = checked(max_steps=None, num_train_epochs=2)
    assert code == 0, errors
    assert found["host"].startswith("LLaMA-Factory ")
    assert (found["loss"], found["options"]["gamma"]) == ("focalpo", 0.05)
    assert found["first_loss"] == pytest.approx(0.66953, abs=1e-5)
    assert (found["rows"], found["dropped"], found["batch"]) == (40, 0, 8)
    assert (found["epoch_steps"], found["steps"]) == (5, 10)
    assert found["counts"]["truncated"] == 0 and found["counts"]["starts_with_bos"] == 80
    assert found["warnings"] == []


def test_tokens_are_those_of_a_run(checked, llamafactory: LlamaFactory):
    """With shared prompts, the tokens of all 40 pairs in five steps, whatever their order; balanced
    batches of padded pairs have more, and plain ones most."""
    _, found, errors = checked(max_steps=5, focalpo_shared_prompts=True)
    tokens = found["tokens_per_step"]
    assert tokens["both"] == tokens["shared"] < tokens["balanced"] <= tokens["plain"]
    assert found["way"] == "shared"
    run = llamafactory.train(max_steps=5, focalpo_shared_prompts=True)
    history = json.loads((run.folder / "trainer_state.json").read_text())["log_history"]
    of_run = [entry["focalpo/tokens"] for entry in history if "focalpo/tokens" in entry]
    assert sum(of_run) / len(of_run) == pytest.approx(tokens["shared"], rel=0.02)


def test_pairs_that_are_cut(checked):
    """Every sequence has more than 24 tokens, and the prompt's end is lost."""
    code, found, _ = checked(cutoff_len=24)
    assert code == 0
    assert found["counts"]["truncated"] == 40
    assert any("a prompt whose end is cut off to fit cutoff_len=24" in w for w in found["warnings"])


def test_the_hosts_own_losses(checked):
    own = {"pref_loss": "hinge", "focalpo_gamma": None}
    _, found, _ = checked(**own)
    assert found["loss"] in (None, "sigmoid", "dpo")
    assert any(
        warning.startswith("pref_loss: hinge trains plain DPO in LLaMA-Factory ")
        for warning in found["warnings"]
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"focalpo_gamma": None}, "focalpo_gamma must be given with pref_loss: focalpo"),
        (
            {"stage": "sft", "pref_loss": None, "focalpo_gamma": None},
            "stage must be dpo, got 'sft'",
        ),
        ({"pref_los": "focalpo"}, "pref_los"),
        ({"dataset": "other"}, "Undefined dataset other"),
    ],
)
def test_what_stops_a_run_is_said(checked, changes: dict[str, Any], message: str):
    code, _, errors = checked(**changes)
    assert code != 0
    assert message in errors.strip().splitlines()[-1]


def test_the_model_of_another_size(checked):
    """Nothing else is read: 8.03 billion weights, of which LoRA trains 41.9 million."""
    lora = {"finetuning_type": "lora", "lora_rank": 16, "lora_target": "all", "bf16": True}
    code, found, errors = checked("--model-config", "llama-3-8b", **lora)
    assert code == 0, errors
    assert found["memory_bytes"]["parameters"] == 8_030_261_248
    assert found["memory_bytes"]["trained"] == 41_943_040
    assert found["memory_bytes"]["reference"] == 0


def test_the_report_of_a_run(llamafactory: LlamaFactory):
    run = llamafactory.train()
    code, output, errors = ManyFocalpo(llamafactory.folder)("report", run.folder)
    assert code == 0, errors
    assert "0.6695" in output
