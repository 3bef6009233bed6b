"""What TRL's trainers can be asked for beside the loss, and a short run with it."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_trl import (
    FUSED,
    GAMMA,
    PAIRS,
    model,
    trainer,
)
from trl import DPOConfig
from trl.trainer import dpo_trainer

from focalpo_plugins import FocalPOTrainer

# Loss types that this TRL has, by its own source, and fields of its config.
LOSS_TYPES = {*re.findall(r'loss_type == "(\w+)"', Path(dpo_trainer.__file__).read_text())}
EACH_PATH = [None, *(pytest.param(key, marks=pytest.mark.fused) for key in FUSED)]
FIELDS = {*DPOConfig.__dataclass_fields__, "model_kind", "peft_config", "reference"}

LORA = LoraConfig(r=4, init_lora_weights=False)
# What else each is trained with.
FUSED_WITH: dict[str, dict[str, Any]] = {
    "nothing": {},
    "another reference": {"reference": "another"},
    "precomputed": {"precompute_ref_log_probs": True},
    "precomputed from another": {"reference": "another", "precompute_ref_log_probs": True},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "lora": {"peft_config": LORA},
    "lora, precomputed": {"peft_config": LORA, "precompute_ref_log_probs": True},
    "lora beside a trained head": {
        "peft_config": LoraConfig(r=4, init_lora_weights=False, modules_to_save=["lm_head"])
    },
    "an adapter trained before": {"policy": "adapted"},
    "an adapter trained before, precomputed": {
        "policy": "adapted",
        "precompute_ref_log_probs": True,
    },
    "tied embeddings": {"tied": True},
    "synchronised": {
        "reference": "another",
        "sync_ref_model": True,
        "ref_model_sync_steps": 1,
        "ref_model_mixup_alpha": 0.5,
    },
    "bf16": {"bf16": True, "reference": "another"},
}


def history(tokenizer, folder: Path, feature: str, **more: Any) -> tuple[FocalPOTrainer, list]:
    """Three steps and an evaluation after each; without another reference, the earlier policy."""
    from peft import get_peft_model

    arguments = {"reference": None, **FUSED_WITH[feature], **more}
    torch.manual_seed(0)
    policy = model(0, tied=arguments.pop("tied", False))
    if arguments.get("peft_config") is None and arguments["reference"] is None:
        arguments["reference"] = copy.deepcopy(policy)
    if arguments.pop("policy", None) == "adapted":
        policy, arguments["reference"] = get_peft_model(policy, LORA), None
    host = trainer(
        FocalPOTrainer,
        tokenizer,
        folder,
        policy=policy,
        eval_dataset=Dataset.from_list(PAIRS[:3]),
        eval_strategy="steps",
        eval_steps=1,
        focalpo_gamma=GAMMA,
        **arguments,
    )
    host.train()
    return host, [entry for entry in host.state.log_history if "train_runtime" not in entry]
