"""Messages about the first step's margins, which are 0 if the policy starts as its reference."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny_trl
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_trl import SGD
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from focalpo_plugins import FocalPOTrainer
from focalpo_plugins.run import check_first_margins, check_resumed_margins

AGREE = "focalpo_plugins: first step: policy and reference agree, largest margin 0.\n"
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
# An adapter as training leaves it: it doesn't start at 0.
TRAINED = LoraConfig(
    r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
)


@pytest.fixture
def saved(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> str:
    tiny_trl.model(0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"reference": "loaded"},
        {"peft_config": LORA},
        {"precompute_ref_log_probs": True},
        {"focalpo_shared_prompts": True, "gradient_accumulation_steps": 2},
        pytest.param({"focalpo_fused": True}, marks=pytest.mark.fused),
    ],
    ids=["none given", "the same", "adapter", "precomputed", "shared", "fused"],
)
def test_margins_are_zero(tokenizer, saved: str, tmp_path: Path, capsys, given: dict[str, Any]):
    reference = AutoModelForCausalLM.from_pretrained(saved) if "reference" in given else None
    host = tiny_trl.trainer(
        FocalPOTrainer,
        tokenizer,
        tmp_path,
        policy=saved,
        **{**given, "reference": reference},
        **SGD,
    )
    host.train()
    said = capsys.readouterr().err
    assert said.count("first step") == 1
    (line,) = [line for line in said.splitlines() if "first step" in line]
    number = float(line.rpartition("largest margin ")[2].rstrip("."))
    assert number < 1e-4
    if "precompute_ref_log_probs" not in given and "focalpo_fused" not in given:
        assert number == 0 and AGREE in said


def test_a_policy_that_was_changed(tokenizer, saved: str, tmp_path: Path, capsys):
    """Its reference is loaded again from the policy's place."""
    policy = AutoModelForCausalLM.from_pretrained(saved)
    with torch.no_grad():
        policy.lm_head.weight.mul_(1.5)
    tiny_trl.trainer(
        FocalPOTrainer, tokenizer, tmp_path, policy=policy, reference=None, **SGD
    ).train()
    said = capsys.readouterr().err
    assert said.count("warning: the largest margin of the first step is ") == 1
    assert " nats), expected 0: the policy starts as its reference. " in said
    assert "Check for: a wrong reference, weights changed after loading, " in said


def test_nothing_is_said_of_another_reference_or_a_resumed_run(
    tokenizer, saved: str, tmp_path: Path, capsys
):
    tiny_trl.trainer(FocalPOTrainer, tokenizer, tmp_path, policy=saved, **SGD).train()
    assert "first step" not in capsys.readouterr().err
    for resume in (None, str(tmp_path / "checkpoint-1")):
        host = tiny_trl.trainer(
            FocalPOTrainer, tokenizer, tmp_path, policy=saved, reference=None, max_steps=2,
            save_strategy="steps", save_steps=1, **SGD,
        )  # fmt: skip
        host.train(resume_from_checkpoint=resume)
        assert ("first step" in capsys.readouterr().err) == (resume is None)


def merged(saved: str) -> Any:
    """The saved model with a trained adapter merged into it."""
    policy = AutoModelForCausalLM.from_pretrained(saved)
    return get_peft_model(policy, TRAINED).merge_and_unload().requires_grad_(True)


@pytest.mark.parametrize("policy", ["adapted", "merged", "of another dtype"])
def test_nothing_is_said_of_two_models_from_one_place_that_differ(
    tokenizer, saved: str, tmp_path: Path, capsys, policy: str
):
    """A trained adapter, in place or merged, over its base as the reference; and rounded weights."""
    reference = AutoModelForCausalLM.from_pretrained(saved)
    given = {
        "adapted": lambda: get_peft_model(AutoModelForCausalLM.from_pretrained(saved), TRAINED),
        "merged": lambda: merged(saved),
        "of another dtype": lambda: AutoModelForCausalLM.from_pretrained(saved, dtype="bfloat16"),
    }[policy]()
    tiny_trl.trainer(
        FocalPOTrainer, tokenizer, tmp_path, policy=given, reference=reference, **SGD
    ).train()
    assert "first step" not in capsys.readouterr().err


def test_two_equal_models(tokenizer, saved: str, tmp_path: Path, capsys):
    policy, reference = (AutoModelForCausalLM.from_pretrained(saved) for _ in range(2))
    tiny_trl.trainer(
        FocalPOTrainer, tokenizer, tmp_path, policy=policy, reference=reference, **SGD
    ).train()
    assert AGREE in capsys.readouterr().err


SAVING = {"save_strategy": "steps", "save_steps": 2, **SGD}


@pytest.mark.parametrize(
    "path", [{}, pytest.param({"focalpo_fused": True}, marks=pytest.mark.fused)]
)
def test_a_resumed_adapter_that_was_not_loaded(tokenizer, saved, tmp_path, capsys, path):
    """From a checkpoint with an adapter "ref", transformers loads only that one. The remedy in the
    message works: the policy is then the checkpoint's."""

    def start(adapter: str, steps: int, resume: str | None) -> tuple[Any, str]:
        base = AutoModelForCausalLM.from_pretrained(saved)
        policy = PeftModel.from_pretrained(base, adapter, is_trainable=True)
        host = tiny_trl.trainer(
            FocalPOTrainer, tokenizer, tmp_path / "out", policy=policy, reference=None,
            max_steps=steps, gradient_accumulation_steps=2, per_device_train_batch_size=2,
            **SAVING, **path,
        )  # fmt: skip
        host.train(resume_from_checkpoint=resume)
        return host, capsys.readouterr().err

    sft, checkpoint = str(tmp_path / "sft"), str(tmp_path / "out" / "checkpoint-2")
    get_peft_model(AutoModelForCausalLM.from_pretrained(saved), TRAINED).save_pretrained(sft)
    assert "after resuming" not in start(sft, 2, None)[1]
    resumed, said = start(sft, 4, checkpoint)
    (line,) = [line for line in said.splitlines() if "after resuming" in line]
    assert "focalpo_plugins: warning: the largest margin of the first step after resuming " in line
    assert f"PeftModel.from_pretrained(BASE_MODEL, {checkpoint!r}, is_trainable=True)" in line
    cured, said = start(checkpoint, 4, checkpoint)
    assert "after resuming" not in said
    logged = [
        next(entry["rewards/margins"] for entry in host.state.log_history if entry["step"] == 3)
        for host in (resumed, cured)
    ]
    assert abs(logged[0]) < 1e-5 < 0.01 < abs(logged[1])


@pytest.mark.parametrize(
    "given, said",
    [
        ({}, False),  # loaded as it should be
        # Nothing was learnt: the margins of all steps are 0, and those after resuming too.
        ({"learning_rate": 0.0}, False),
        # The first learning rate of a warm-up is 0, so the first step changes nothing.
        ({"warmup_steps": 2, "lr_scheduler_type": "linear", "save_steps": 1}, False),
        # The checkpoint is given as the policy, and so becomes the reference.
        ({"policy": "checkpoint"}, True),
    ],
)
def test_false_alarms_after_resuming(tokenizer, saved, tmp_path, capsys, given, said: bool):
    arguments = {**SAVING, **given}
    policy = arguments.pop("policy", saved)
    out = tmp_path / "out"
    for steps in (2, 3):
        host = tiny_trl.trainer(
            FocalPOTrainer, tokenizer, out, policy=saved, reference=None, max_steps=steps,
            **arguments,
        )  # fmt: skip
        if steps == 3 and policy == "checkpoint":
            policy = str(out / "checkpoint-2")
            host = tiny_trl.trainer(
                FocalPOTrainer, tokenizer, out, policy=policy, reference=None, max_steps=3,
                **arguments,
            )  # fmt: skip
        resume = str(out / f"checkpoint-{arguments['save_steps']}") if steps == 3 else None
        capsys.readouterr()
        host.train(resume_from_checkpoint=resume)
    assert ("after resuming" in capsys.readouterr().err) == said


@pytest.mark.parametrize(
    "largest, history, said",
    [
        (0.0, [], True),  # nothing was logged
        (1e-9, [], False),
        (0.0, [{"step": 1, "rewards/margins": 0.0, "learning_rate": 1e-3}], True),
        (0.0, [{"step": 1, "rewards/margins": 0.0, "learning_rate": 0.0}], False),
        (0.0, [{"step": 2, "rewards/margins": 0.0, "learning_rate": 1e-3}], False),
        (0.0, [{"step": 9, "rewards/margins": -0.2}], True),
        # Rounding of a path that computes the reference otherwise: 1 % of 0.2 is 0.002.
        (0.0019, [{"step": 9, "rewards/margins": 0.2}, {"step": 9, "eval_loss": 1.0}], True),
        (0.0021, [{"step": 9, "rewards/margins": 0.2}], False),
    ],
)
def test_which_margins_show_that_nothing_was_loaded(capsys, largest, history, said: bool):
    check_resumed_margins(largest, history, "checkpoint-9")
    assert ("after resuming" in capsys.readouterr().err) == said


def with_a_token_more(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    longer = copy.deepcopy(tokenizer)
    longer.add_tokens(["<new>"])
    assert len(longer) == 44
    return longer


NEW = [{**pair, "chosen": f"{pair['chosen']} <new>"} for pair in tiny_trl.PAIRS]


@pytest.mark.releases
@pytest.mark.parametrize("given", ["reference", "made reference", "policy", "precomputed"])
def test_a_token_without_an_embedding(tokenizer, saved: str, tmp_path: Path, given: str):
    """The tokenizer got a 44th token, and not every model has an embedding for it. If no reference
    is given, TRL loads it from the policy's place, without later changes."""
    policy = AutoModelForCausalLM.from_pretrained(saved)
    arguments: dict[str, Any] = {"reference": None, "precompute_ref_log_probs": False}
    if given != "policy":
        policy.resize_token_embeddings(44)
    if given in ("reference", "precomputed"):
        arguments["reference"] = tiny_trl.model(1)
    arguments["precompute_ref_log_probs"] = given == "precomputed"
    name = "policy" if given == "policy" else "reference"
    message = (
        f"^the {name} must have an embedding for each token of the data, got 43 embeddings and"
    )
    with pytest.raises(ValueError, match=f"{message} the token id 43: the tokenizer has 44 tokens"):
        tiny_trl.trainer(
            FocalPOTrainer, with_a_token_more(tokenizer), tmp_path, policy=policy,
            pairs=Dataset.from_list(NEW), **arguments,
        )  # fmt: skip


def test_a_token_without_an_embedding_that_no_pair_has(tokenizer, saved, tmp_path, capsys):
    """It trains, with one warning for all data, or without one if both models were resized."""
    for resized in (False, True):
        policy, reference = (AutoModelForCausalLM.from_pretrained(saved) for _ in range(2))
        policy.resize_token_embeddings(44)
        if resized:
            reference.resize_token_embeddings(44)
        tiny_trl.trainer(
            FocalPOTrainer, with_a_token_more(tokenizer), tmp_path, policy=policy,
            reference=reference, eval_dataset=Dataset.from_list(tiny_trl.PAIRS), **SGD,
        ).train()  # fmt: skip
        line = "warning: the reference has 43 embeddings, but the tokenizer has 44 tokens. No "
        assert capsys.readouterr().err.count(line) == (not resized)


@pytest.mark.parametrize("processes", [None, 2])
def test_prompts_whose_tokens_change_before_an_answer(
    tokenizer, tmp_path, capsys, caplog, processes: int | None
):
    """A prompt that ends within a word: TRL warns once for each of the 16 answers. The newest
    releases cut where the tokens differ, and warn once themselves."""
    glued = [
        {"prompt": f"{pair['prompt']} w", "chosen": "1 w2", "rejected": "3 w4"}
        for pair in tiny_trl.PAIRS
    ]
    tiny_trl.trainer(
        FocalPOTrainer, tokenizer, tmp_path, pairs=Dataset.from_list(glued),
        dataset_num_proc=processes,
    )  # fmt: skip
    said = [line for line in capsys.readouterr().err.splitlines() if "focalpo_plugins: " in line]
    lines = [line for line in said if "change the tokens at the end of their prompt" in line]
    source = Path(trl.trainer.dpo_trainer.__file__).read_text()
    if "Mismatch between tokenized prompt" in source:
        assert len(lines) == 1 and "warning: 16 answers change the tokens" in lines[0]
    assert "Mismatch between" not in caplog.text


@pytest.mark.parametrize(
    "largest, beta, narrow, agrees",
    [
        (0.0009, 0.1, False, True),  # 0.009 nats
        (0.0011, 0.1, False, False),  # 0.011 nats
        (0.009, 0.01, True, True),  # 0.9 nats
        (0.011, 0.01, True, False),  # 1.1 nats
        (float("inf"), 0.1, True, False),
    ],
)
def test_what_rounding_explains(capsys, largest: float, beta: float, narrow: bool, agrees: bool):
    check_first_margins(largest, beta, narrow)
    assert ("agree" in capsys.readouterr().err) == agrees
