"""ms-swift's command, on the tiny assets of examples/."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import forked
from forked import SUPPORT, environment

# Steps of four pairs a rank, on a CPU; `columns` reads conversations on both sides.
TINY: dict[str, Any] = {
    "rlhf_type": "dpo",
    "model_type": "llama",
    "template": "llama3",
    "tuner_type": "full",
    "columns": json.dumps({"chosen": "messages", "rejected": "rejected_messages"}),
    "split_dataset_ratio": 0,
    "beta": 0.1,
    "torch_dtype": "float32",
    "fp16": False,
    "bf16": False,
    "max_length": 128,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": False,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "logging_steps": 1,
    "save_strategy": "no",
    "add_version": False,
    "check_model": False,  # it asks a hub for a newer one
    "report_to": "none",
    "dataloader_num_workers": 0,
    "dataloader_persistent_workers": False,  # before 4.6 on by default
}


LORA = {"tuner_type": "lora", "lora_rank": 4, "target_modules": "all-linear"}
# On two ranks, without a GPU.
ZERO_3: dict[str, Any] = {
    "deepspeed": "zero3",
    "external_plugins": SUPPORT / "swift_gloo.py",
    "use_cpu": None,
    "gradient_accumulation_steps": 1,
}


def words(given: Mapping[str, Any]) -> list[str]:
    """The command line with these keys; None leaves one out."""
    line = []
    for key, value in given.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            line += [f"--{key}", *map(str, values)]
    return line


def command() -> str:
    """The script that ms-swift starts for `swift rlhf`."""
    return find_spec("swift.cli.rlhf").origin


def train(
    folder: Path, given: Mapping[str, Any], ranks: int = 1, fault: str | None = None, **how: Any
) -> tuple[int, str]:
    """Exit code and output of a run with these keys over the tiny ones."""
    on_cpu = {"use_cpu": True} if ranks > 1 else {}
    argv = words({"output_dir": folder / "out", **TINY, **on_cpu, **given})
    variables = {"MODELSCOPE_CACHE": str(folder / "cache"), "HF_DATASETS_CACHE": str(folder / "hf")}
    if fault == "read-only":
        (folder / "out").mkdir(mode=0o555)
        variables["PERMISSIONS_HOLD"] = "1"
        how = {"first": ["disk_faults.sitecustomize"], **how}
    if fault == "no network":
        variables["NETWORK_ASKED"] = str(folder / "asked")
        env = environment(SUPPORT / "no_network", **variables)
        line = [sys.executable, command(), *argv]
        done = subprocess.run(line, env=env, cwd=folder, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr
    code, output, _ = forked.run(
        command(), argv, folder, ranks if ranks > 1 else None, merged=True, **variables, **how
    )
    return code, output
