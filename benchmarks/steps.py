"""Whole training steps in TRL and in Axolotl, FocalPO against the host's own DPO, in one process.

Both trainers train the same small model on the same batches, a step each in turns, with data
loading, optimizer and logging.  The model is small on purpose: it hides nothing of the loss.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from measure import CUDA, TINY, Result, check_tiny, compare, larger_model, peak_bytes
from transformers import TrainerCallback

WARM_UP = 5
Trainers = dict[str, Any]


class Turns(TrainerCallback):
    """Trains one step whenever the other trainer, in its own thread, has done one."""

    def __init__(self, mine: threading.Semaphore, other: threading.Semaphore) -> None:
        self.mine, self.other = mine, other
        self.began: float | None = None
        self.sets_aside = False
        self.seconds: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.take_over()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        # A step lasts until the next one begins: its logging comes after its on_step_end.
        if self.began is not None:
            self.hand_over()
            self.take_over()
        self.began = time.perf_counter()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.hand_over()

    def take_over(self) -> None:
        self.mine.acquire()
        if self.sets_aside:
            gc.freeze()

    def hand_over(self) -> None:
        if CUDA:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)
        # What a trainer sets aside for its garbage collections, the other has to look at.
        self.sets_aside = gc.get_freeze_count() > 0
        gc.unfreeze()
        self.other.release()


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


def axolotl_trainers(
    folder: Path,
    pairs: int = 16,
    shared: bool = False,
    data: Path | None = None,
    tokens: Path | None = None,
) -> Trainers:
    """DPO's and FocalPO's; with ``shared`` FocalPO's fused and with shared prompts, on a larger
    model, and on the pairs of ``data`` if there are any."""
    import yaml

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
    example |= {"micro_batch_size": pairs, "gradient_accumulation_steps": 1}
    if shared:
        example |= {"focalpo_fused": True, "focalpo_shared_prompts": True}
        example["base_model"] = str(larger_model(folder / "model", tokens))
        if data is not None:
            example["datasets"][0]["path"] = str(data.resolve())
            example["sequence_len"] = 1024
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


def in_turns(trainers: Trainers, steps: int) -> tuple[list[float], ...]:
    """Milliseconds of each step, in the trainers' order, without the first few."""
    batons = threading.Semaphore(1), threading.Semaphore(0)
    turns = [Turns(*batons), Turns(*batons[::-1])]
    errors: list[BaseException] = []

    def train(trainer: Any, turn: Turns) -> None:
        trainer.args.max_steps = WARM_UP + steps
        trainer.add_callback(turn)
        try:
            trainer.train()
        except BaseException as error:
            errors.append(error)
            turn.other.release(steps)

    threads = [
        threading.Thread(target=train, args=each)
        for each in zip(trainers.values(), turns, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    for trainer, turn in zip(trainers.values(), turns, strict=True):
        trainer.remove_callback(turn)
    return tuple([1e3 * s for s in turn.seconds[WARM_UP:]] for turn in turns)


def peak(trainer: Any) -> float:
    """MiB at the peak of two steps; the model and the optimizer's state are there already."""
    trainer.args.max_steps = 2
    return peak_bytes(trainer.train) / 2**20


def measure(
    rounds: int, *, host: str, pairs: Path | None = None, tokenizer: Path | None = None
) -> Iterator[Result]:
    check_tiny()
    make: Callable[[Path], Trainers] = {"trl": trl_trainers, "axolotl": axolotl_trainers}[host]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        trainers = make(Path(folder))
        classes = {name: type(trainer).__name__ for name, trainer in trainers.items()}
        assert classes["dpo"] != classes["focalpo"], classes
        quiet = io.StringIO()
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            theirs, ours = in_turns(trainers, rounds)
            peaks = {name: [peak(t), peak(t)] for name, t in trainers.items()}
        case = f"{host}: {classes['focalpo']}, 16 pairs"
        yield compare(host, case, "step time", "ms", ours, theirs, classes["dpo"])
        most = peaks["focalpo"], peaks["dpo"]
        yield compare(host, case, "peak memory", "MiB", *most, against=classes["dpo"])
    if host == "axolotl":
        tokens = tokenizer.resolve() if tokenizer else None
        for size in (4, 8):
            yield from measure_shared(max(4, rounds // 4), size, pairs, tokens)


def measure_shared(
    rounds: int, pairs: int, data: Path | None, tokens: Path | None
) -> Iterator[Result]:
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        quiet = io.StringIO()
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            trainers = axolotl_trainers(Path(folder), pairs, True, data, tokens)
            theirs, ours = in_turns(trainers, rounds)
            peaks = {name: [peak(trainer)] for name, trainer in trainers.items()}
        own, name = type(trainers["dpo"]).__name__, data.name if data else "tiny data"
        case = f"axolotl: {name}, shared + fused, 25 M, {pairs} pairs"
        yield compare("axolotl", case, "step time", "ms", ours, theirs, own)
        most = peaks["focalpo"], peaks["dpo"]
        yield compare("axolotl", case, "peak memory", "MiB", *most, against=own)
