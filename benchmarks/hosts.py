"""Each host's own training with a clock in every optimizer step, for `ways_in_turns`."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from measure import CUDA, TINY
from torch.nn.modules.module import register_module_forward_pre_hook
from ways_in_turns import Clock

EXAMPLES = TINY.parent
#: What is trained in each way, without the loss's name before the keys.
SWITCHES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "balanced": ("balanced_batches",),
    "shared": ("shared_prompts",),
    "both": ("balanced_batches", "shared_prompts"),
    "both + fused": ("balanced_batches", "shared_prompts", "fused"),
    "both + precomputed": ("balanced_batches", "shared_prompts", "precompute_ref"),
}


def train_trl(
    clock: Clock, folder: Path, *, model: Path, data: Path, arguments: dict[str, Any]
) -> None:
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM

    from focalpo_plugins import FocalPOConfig, FocalPOTrainer

    pairs = load_dataset("json", data_files=str(data), split="train", cache_dir=str(folder))
    args = FocalPOConfig(
        str(folder / "out"),
        learning_rate=1e-5,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=not CUDA,
        gradient_checkpointing=False,
        **arguments,
    )
    models = [AutoModelForCausalLM.from_pretrained(model) for _ in range(2)]
    _tell(clock)
    FocalPOTrainer(*models, args=args, train_dataset=pairs).train()


def train_axolotl(clock: Clock, folder: Path, *, config: dict[str, Any], zero3: bool) -> None:
    """With ``zero3`` under the examples' own configuration of it."""
    import yaml

    os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    config = {
        **config,
        "output_dir": str(folder / "out"),
        "dataset_prepared_path": str(folder / "prepared"),
        # Each would be another process with the host in memory.
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
    }
    if zero3:
        zero = json.loads((EXAMPLES / "deepspeed" / "zero3.json").read_text(encoding="utf-8"))
        if not CUDA:
            os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}
            # Without a GPU's streams the ranks' collectives come out of step.
            zero["zero_optimization"]["overlap_comm"] = False
            _gloo_on_cpu()
        config["deepspeed"] = str(folder / "zero3.json")
        Path(config["deepspeed"]).write_text(json.dumps(zero), encoding="utf-8")
    (folder / "run.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_preference_datasets
    from axolotl.train import setup_model_and_trainer

    cfg = load_cfg(str(folder / "run.yml"))
    _tell(clock)
    setup_model_and_trainer(cfg, load_preference_datasets(cfg=cfg))[0].train()


def _gloo_on_cpu() -> None:
    """Let accelerate start a process group without a GPU."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    of_host = PartialState._prepare_backend

    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        backend, kind = of_host(self, *args, **kwargs)
        none = kind == DistributedType.NO
        return ("gloo", DistributedType.MULTI_XPU) if none else (backend, kind)

    PartialState._prepare_backend = prepare


def train_llamafactory(clock: Clock, folder: Path, *, config: dict[str, Any], data: Path) -> None:
    make = [sys.executable, str(EXAMPLES / "llamafactory" / "make_data.py"), str(data)]
    subprocess.run([*make, "--out", str(folder)], check=True)
    _alone()
    from llamafactory.train.tuner import run_exp

    _tell(clock)
    of_folder = {"dataset_dir": str(folder), "output_dir": str(folder / "out")}
    run_exp({**config, **of_folder, "dataset": data.stem})


def train_swift(clock: Clock, folder: Path, *, config: dict[str, Any]) -> None:
    _alone()
    from swift import RLHFArguments, rlhf_main

    _tell(clock)
    rlhf_main(RLHFArguments(**{**config, "output_dir": str(folder / "out")}))


def _alone() -> None:
    """A process that no launcher has started: these hosts would start a process group."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        del os.environ[name]


def _tell(clock: Clock) -> None:
    """Have each ``transformers.Trainer`` that is built from now on tell the clock of its steps."""
    from transformers import TrainerCallback, trainer

    class EachStep(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.step()

        def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
            clock.micro_step()

    trainer.DEFAULT_CALLBACKS.append(EachStep)


def train_openrlhf(clock: Clock, folder: Path, *, flags: list[str], accumulation: int) -> None:
    forwards = 0

    def count(module: torch.nn.Module, inputs: Any) -> None:
        nonlocal forwards
        # Of the policy.  Its wrappers forward the attribute, and would count each step again.
        if torch.is_grad_enabled() and "lm_head" in module._modules:
            clock.micro_step() if forwards % accumulation else clock.step()
            forwards += 1

    register_module_forward_pre_hook(count)
    from focalpo_plugins.openrlhf.train_dpo import main

    of_folder = {"--ckpt.output_dir": "out", "--ckpt.path": "checkpoints"}
    words = [word for flag, name in of_folder.items() for word in (flag, str(folder / name))]
    sys.argv = ["train_dpo.py", *flags, *words]
    main()


def recipe_axolotl() -> dict[str, Any]:
    """The keys of the Llama-3 LoRA recipe."""
    import yaml

    text = (EXAMPLES / "llama3_focalpo_lora.yml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def recipe_openrlhf() -> list[str]:
    """The flags of the Llama-3 LoRA script."""
    text = (EXAMPLES / "openrlhf" / "llama3_focalpo_lora.sh").read_text(encoding="utf-8")
    _, _, rest = text.partition("\nflags=(\n")
    return shlex.split(rest.partition("\n)\n")[0], comments=True)
