"""`focalpo check`, `report` and `score` on what LLaMA-Factory reads and writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import forked
import pytest
from harness import ManyFocalpo
from llamafactory_run import LlamaFactory
from planned import check_trained

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
    """A run on 40 pairs in steps of 8: every margin is 0 at first, and the model isn't kept."""
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
    """With shared prompts, the tokens of all 40 pairs in five steps; balanced
    batches of padded pairs have more, and plain ones most."""
    _, found, errors = checked(max_steps=5, focalpo_shared_prompts=True)
    tokens = found["tokens_per_step"]
    assert tokens["both"] == tokens["shared"] < tokens["balanced"] <= tokens["plain"]
    assert found["way"] == "shared"
    run = llamafactory.train(max_steps=5, focalpo_shared_prompts=True)
    history = json.loads((run.folder / "trainer_state.json").read_text())["log_history"]
    of_run = [entry["focalpo/tokens"] for entry in history if "focalpo/tokens" in entry]
    assert sum(of_run) / len(of_run) == pytest.approx(tokens["shared"], rel=0.02)


@pytest.mark.parametrize("ranks, balanced", [(1, False), (2, False), (2, True)])
def test_a_run_has_the_batches_that_were_planned(
    llamafactory: LlamaFactory, few: Path, ranks: int, balanced: bool
):
    """In all its epochs, whose orders differ.  One rank trains on 5, 5 and 2 of 12 pairs an epoch,
    with two batches to a step, in ceil(1.5 * 2) = 3 steps.  Two ranks train on 5 each, twice an epoch,
    which is a step, and accelerate completes the second time with the epoch's first pairs; in two."""
    lines = (few / "train.jsonl").read_text().splitlines(keepends=True)[:12]
    (llamafactory.folder / "12.jsonl").write_text("".join(lines))
    llamafactory.data("12", llamafactory.folder / "12.jsonl")
    config = llamafactory.config(
        dataset="12", max_steps=None, num_train_epochs=1.5, per_device_train_batch_size=5, seed=7,
        focalpo_balanced_batches=balanced or None,
    )  # fmt: skip
    given = [ranks, llamafactory.write(config)]
    code, said, errors = forked.run("planned:main", given, llamafactory.folder)
    assert code == 0, errors[-3000:]
    plan = json.loads(said.splitlines()[-1])
    how = {"first": ["batches_of_ranks"], "BATCHES": str(llamafactory.folder)}
    run = llamafactory(config, ranks=ranks, **how)
    assert run.code == 0, run.output[-6000:]
    files = sorted(llamafactory.folder.glob("batches*.jsonl"))
    check_trained(plan, files, ranks, balanced)


def test_data_that_are_tokenized(checked, llamafactory: LlamaFactory):
    """LLaMA-Factory keeps them in a folder, which a run makes, and `focalpo check` only reads."""
    tokens = llamafactory.folder / "tokens"
    code, found, errors = checked(tokenized_path=str(tokens))
    assert code == 0, errors
    assert found["rows"] == 40 and not tokens.exists()
    llamafactory.train(tokenized_path=str(tokens), max_steps=1)
    names = {"dataset": "unused", "dataset_dir": str(tokens)}  # which LLaMA-Factory doesn't read
    code, again, errors = checked(tokenized_path=str(tokens), cutoff_len=24, **names)
    assert code == 0, errors
    assert (again["rows"], again["counts"]["truncated"]) == (40, 0)
    assert again["tokens_per_step"] == found["tokens_per_step"]


def test_an_adapter_that_is_trained_on(checked):
    """Its margins aren't 0 at first; a new adapter's are, over a model into which it is merged."""
    lora = {"finetuning_type": "lora", "adapter_name_or_path": "an/adapter"}
    assert checked(**lora)[1]["first_loss"] is None
    found = checked(**lora, create_new_adapter=True)[1]
    assert found["first_loss"] == pytest.approx(0.66953, abs=1e-5)


def test_pairs_that_are_cut(checked):
    """Every sequence has more than 24 tokens, and the prompt's end is lost."""
    code, found, _ = checked(cutoff_len=24)
    assert code == 0
    assert found["counts"]["truncated"] == 40
    words = (
        "a run refuses these data: 40 of 40 pairs have a prompt whose end is cut off to fit cutoff_"
    )
    assert any(warning.startswith(words) for warning in found["warnings"])
    _, allowed, _ = checked(cutoff_len=24, focalpo_allow_data=True)
    assert not any("a run refuses" in warning for warning in allowed["warnings"])


def test_pairs_that_a_run_refuses(checked, llamafactory: LlamaFactory, few: Path):
    """Also with evaluations, for which transformers wants evaluation data, though they are not read
    here."""
    held_out = llamafactory.data("held_out", few / "test.jsonl")
    alike = [json.loads(line) for line in (few / "train.jsonl").read_text().splitlines()]
    lines = [json.dumps({"chosen": row["chosen"], "rejected": row["chosen"]}) for row in alike]
    (llamafactory.folder / "alike.jsonl").write_text("\n".join(lines))
    llamafactory.data("alike", llamafactory.folder / "alike.jsonl")
    evaluates = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": held_out}
    code, found, errors = checked(dataset="alike", **evaluates)
    assert code == 0, errors
    assert found["rows"] == 40
    words = "a run refuses these data: 40 of 40 pairs have identical answers"
    assert any(warning.startswith(words) for warning in found["warnings"])


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
        ({"streaming": True}, "streaming must be false for focalpo check, got true"),
        (
            {"finetuning_type": "lora", "lora_target": "q_projj"},
            "Target modules {'q_projj'} not found",
        ),
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
    full = checked("--model-config", "llama-3-8b", optim="adamw_8bit", bf16=True)[1]
    # Two moments of a byte, and 4 bytes more for what is trained in float32.
    assert full["memory_bytes"]["optimizer"] == 6 * 8_030_261_248
    assert checked(finetuning_type="freeze")[1]["memory_bytes"] is None


def test_the_report_of_a_run(llamafactory: LlamaFactory):
    run = llamafactory.train()
    code, output, errors = ManyFocalpo(llamafactory.folder)("report", run.folder)
    assert code == 0, errors
    assert "0.6695" in output


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_scores_of_a_run(llamafactory: LlamaFactory, few: Path, tiny: Path, kind: str):
    """The scores of its held-out pairs, in the file that LLaMA-Factory reads: the mean margin is what the
    run's last evaluation logs, with the run's beta."""
    held_out = llamafactory.data("held_out", few / "test.jsonl")
    run = llamafactory.train(
        finetuning_type=kind, lora_target="all", pref_beta=0.3, learning_rate=1e-3,
        eval_dataset=held_out, eval_strategy="steps", eval_steps=5, per_device_eval_batch_size=4,
    )  # fmt: skip
    logged = json.loads((run.folder / "trainer_state.json").read_text())["log_history"]
    (margin,) = [entry["eval_rewards/margins"] for entry in logged if "eval_loss" in entry]
    focalpo = ManyFocalpo(llamafactory.folder)
    out = llamafactory.folder / "scores"
    file = llamafactory.folder / "held_out.jsonl"
    words = ["score", run.folder, file, "--ref", tiny / "model", "--out", out, "--format", "csv"]
    code, output, errors = focalpo(*words)
    assert code == 0, errors
    found = json.loads((out / "summary.json").read_text())
    assert found["beta"] == 0.3 and found["rows"] == 12
    assert ("MODEL is an adapter, loaded over" in output) == (kind == "lora")
    assert abs(margin) > 1e-3
    assert found["groups"]["all pairs"]["margin"] == pytest.approx(margin, abs=1e-4)
