"""Whole training steps in TRL and in Axolotl, FocalPO against the host's own DPO, in one process.

Both trainers train the same small model on the same batches, a few steps each in turns, with
optimizer, logging and all.  The model is small on purpose: it hides nothing of the loss.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from measure import CUDA, Result, compare, in_turns, peak_bytes
from transformers import TrainerCallback

TINY = Path(__file__).resolve().parents[1] / "examples" / "tiny"
WARM_UP, STEPS = 3, 20
Trainers = dict[str, Any]


class Clock(TrainerCallback):
    """When each step ended, its logging included."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if CUDA:
            import torch

            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def trl_trainers(folder: Path) -> Trainers:
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    from focalpo_plugins import FocalPOConfig, FocalPOTrainer

    pairs = load_dataset(
        "json", data_files=str(TINY / "train.jsonl"), split="train", cache_dir=str(folder)
    )
    pairs = pairs.select_columns(["chosen", "rejected"])
    found = {}
    for name, trainer, config in (
        ("dpo", DPOTrainer, DPOConfig),
        ("focalpo", FocalPOTrainer, FocalPOConfig),
    ):
        args = config(
            str(folder / name),
            per_device_train_batch_size=16,
            learning_rate=1e-5,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=False,
            use_cpu=not CUDA,
        )
        models = [AutoModelForCausalLM.from_pretrained(TINY / "model") for _ in range(2)]
        found[name] = trainer(*models, args=args, train_dataset=pairs)
    return found


def axolotl_trainers(folder: Path) -> Trainers:
    import yaml

    sys.argv = ["axolotl"]  # a process that the autoload is meant for
    os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_preference_datasets
    from axolotl.train import setup_model_and_trainer

    example = yaml.safe_load((TINY.parent / "tiny_focalpo.yml").read_text(encoding="utf-8"))
    del example["test_datasets"], example["eval_steps"]
    example |= {"base_model": str(TINY / "model"), "learning_rate": 1e-5, "save_steps": 10_000}
    example["datasets"][0]["path"] = str(TINY / "train.jsonl")
    example["plugins"] = ["focalpo_plugins.axolotl.FocalPOPlugin"]
    found = {}
    # DPO first: the second configuration brings its own trainer.
    for name in ("dpo", "focalpo"):
        config = {**example, "rl": name, "output_dir": str(folder / name)}
        if name == "dpo":
            config = {
                k: v for k, v in config.items() if k != "plugins" and not k.startswith("focalpo_")
            }
        path = folder / f"{name}.yml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        cfg = load_cfg(str(path))
        found[name] = setup_model_and_trainer(cfg, load_preference_datasets(cfg=cfg))[0]
    return found


def train(trainer: Any, clock: Clock, steps: int) -> list[float]:
    """Seconds of each of ``steps`` steps, after a few that are not counted."""
    trainer.args.max_steps = WARM_UP + steps
    clock.ends.clear()
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    ends = clock.ends[WARM_UP - 1 :]
    return [b - a for a, b in zip(ends, ends[1:], strict=False)]


def measure(rounds: int, *, host: str) -> Iterator[Result]:
    if not (TINY / "made.json").is_file():
        raise SystemExit("the model and data are not there: python examples/make_tiny.py")
    make: Callable[[Path], Trainers] = {"trl": trl_trainers, "axolotl": axolotl_trainers}[host]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        trainers = make(Path(folder))
        classes = {name: type(trainer).__name__ for name, trainer in trainers.items()}
        assert classes["dpo"] != classes["focalpo"], classes
        clocks = {}
        for name, trainer in trainers.items():
            trainer.args.disable_tqdm = True
            clocks[name] = Clock()
            trainer.add_callback(clocks[name])

        def step_time(name: str) -> float:
            times = sorted(train(trainers[name], clocks[name], STEPS))
            return 1e3 * times[len(times) // 2]

        def peak(name: str) -> float:
            return peak_bytes(lambda: train(trainers[name], clocks[name], 1)) / 2**20

        case = f"{host}: {classes['focalpo']}, 16 pairs"
        ours, theirs = in_turns(lambda: step_time("focalpo"), lambda: step_time("dpo"), rounds)
        yield compare(host, case, "step time", "ms", ours, theirs, classes["dpo"])
        ours, theirs = in_turns(lambda: peak("focalpo"), lambda: peak("dpo"), 2)
        yield compare(host, case, "peak memory", "MiB", ours, theirs, classes["dpo"])
