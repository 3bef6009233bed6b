"""What is said of the first step's margins, which are 0 where the policy starts as its reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_trl
import torch
from peft import LoraConfig
from tiny_trl import SGD
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from focalpo_plugins import FocalPOTrainer
from focalpo_plugins.guards.start import check_first_margins

AGREE = "focalpo_plugins: first step: policy and reference agree, largest margin 0.\n"
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


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
    """Its reference is loaded again from where it came from."""
    policy = AutoModelForCausalLM.from_pretrained(saved)
    with torch.no_grad():
        policy.lm_head.weight.mul_(1.5)
    tiny_trl.trainer(
        FocalPOTrainer, tokenizer, tmp_path, policy=policy, reference=None, **SGD
    ).train()
    said = capsys.readouterr().err
    assert said.count("warning: at the first step every margin should be 0, as the policy starts"
                      " as its reference, got ") == 1  # fmt: skip
    assert "Look for a reference other than the intended one" in said


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
