"""A user's script for TRL, whose settings are a JSON object on its command line."""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from focalpo_plugins import FocalPOConfig, FocalPOTrainer

asked = json.loads(sys.argv[1])
own = asked["loss"] == "dpo"
arguments = {
    "per_device_train_batch_size": 4, "max_length": 128, "learning_rate": 1e-3, "beta": 0.1,
    "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": "none", "use_cpu": True,
    "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True,
}  # fmt: skip
for of, steps in (("save", "save_steps"), ("eval", "eval_steps")):
    arguments[f"{of}_strategy"] = "steps" if steps in asked["arguments"] else "no"
if "WORLD_SIZE" in os.environ:
    arguments["ddp_backend"] = "gloo"


def data(name: str):
    return asked[name] and load_dataset("json", data_files=asked[name], split="train")


def model(path: str):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


trainer = (DPOTrainer if own else FocalPOTrainer)(
    asked["model"] if asked["reference"] is None else model(asked["model"]),
    asked["reference"] and model(asked["reference"]),
    args=(DPOConfig if own else FocalPOConfig)(
        asked["output_dir"], **{**arguments, **asked["arguments"]}
    ),
    train_dataset=data("pairs"),
    eval_dataset=data("held_out"),
    processing_class=AutoTokenizer.from_pretrained(asked["model"]),
)
try:
    trainer.train(resume_from_checkpoint=asked["resume"])
finally:
    if trainer.is_world_process_zero():
        Path("log.json").write_text(json.dumps(trainer.state.log_history))
if torch.distributed.is_initialized():
    # Without torch's tear-down, in which gloo's threads abort the process now and then.
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
