"""Whole training steps of OpenRLHF's own command: FocalPO against its DPO, and a precomputed
reference against its own way, which runs the reference model at every step.

Both sides are the real command, each in a process of its own on one rank, and they take turns step
by step.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from measure import (
    CUDA,
    TINY,
    Result,
    check_tiny,
    compare,
    larger_model,
    start_profile,
    stop_profile,
)
from torch.nn.modules.module import register_module_forward_pre_hook

WARM_UP, PAIRS = 3, 16


def live_bytes() -> int:
    """Bytes of all tensors there are, each storage once."""
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            # Under ZeRO-3 the parameter is a shell, and this rank's share of it is beside it.
            for tensor in (thing, getattr(thing, "ds_tensor", None)):
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


class Turns:
    """A step lasts from one forward of the policy to the next; the other side's come in between."""

    def __init__(self, mine: Any, other: Any, steps: int) -> None:
        self.mine, self.other, self.steps = mine, other, steps
        self.seconds: list[float] = []
        self.memory = 0.0
        self.began: float | None = None
        self.profile: Any = None

    def __call__(self, module: torch.nn.Module, inputs: Any) -> None:
        # Its wrappers forward the attribute, and would count each step again.
        if not (torch.is_grad_enabled() and "lm_head" in module._modules):
            return
        if self.began is not None:
            if CUDA:
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self.began)
            self.other.release()
        self.mine.acquire()
        done = len(self.seconds)
        if done == WARM_UP + self.steps:
            self.memory = live_bytes()
            self.profile = start_profile()
        elif self.profile is not None:
            self.memory = (self.memory + stop_profile(self.profile)) / 2**20
            self.profile = None
        self.began = time.perf_counter()


def child(flags: list[str], turns: Turns, folder: Path) -> None:
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        register_module_forward_pre_hook(turns)
        from focalpo_plugins.openrlhf.train_dpo import main

        sys.argv = ["train_dpo.py", *flags]
        main()
        found = {"seconds": turns.seconds[WARM_UP : WARM_UP + turns.steps], "MiB": turns.memory}
        (folder / "result.json").write_text(json.dumps(found), encoding="utf-8")
    except BaseException:
        traceback.print_exc()
    finally:
        for _ in range(1000):  # the other side waits for this one no more
            turns.other.release()
        os._exit(0)


def in_turns(
    model: Path, sides: list[list[str]], steps: int, pairs: int = PAIRS, data: Path | None = None
) -> list[dict[str, Any]]:
    fork = multiprocessing.get_context("fork")
    batons = fork.Semaphore(1), fork.Semaphore(0)
    turns = [Turns(*batons, steps), Turns(*batons[::-1], steps)]
    with tempfile.TemporaryDirectory() as name:
        started = []
        for number, (flags, turn) in enumerate(zip(sides, turns, strict=True)):
            folder = Path(name) / str(number)
            folder.mkdir()
            common: dict[str, Any] = {
                "--model.model_name_or_path": model,
                "--data.dataset": data or TINY / "train.jsonl",
                "--data.max_samples": (WARM_UP + steps + 3) * pairs,
                "--data.max_len": 1024 if data else 128,
                "--ds.attn_implementation": "eager",
                "--train.micro_batch_size": pairs,
                "--train.batch_size": pairs,
                "--ckpt.output_dir": folder / "out",
                "--ckpt.path": folder / "checkpoints",
            }
            words = [str(word) for flag in common.items() for word in flag]
            argv = [*words, "--data.apply_chat_template", *flags]
            started.append(fork.Process(target=child, args=(argv, turn, folder)))
            started[-1].start()
        for process in started:
            process.join()
        found = []
        for number in range(2):
            result = Path(name) / str(number) / "result.json"
            if not result.is_file():
                log = (result.parent / "log").read_text(encoding="utf-8", errors="replace")
                raise SystemExit(f"OpenRLHF failed:\n{log[-3000:]}")
            found.append(json.loads(result.read_text(encoding="utf-8")))
        return found


def measure(
    rounds: int, *, pairs: Path | None = None, tokenizer: Path | None = None
) -> Iterator[Result]:
    check_tiny()
    focalpo = ["--loss", "focalpo"]

    def both(
        case: str,
        model: Path,
        ours: list[str],
        theirs: list[str],
        steps: int,
        against: str,
        size: int = PAIRS,
        data: Path | None = None,
    ) -> Iterator[Result]:
        a, b = in_turns(model, [ours, theirs], steps, size, data)
        times = [[1e3 * s for s in side["seconds"]] for side in (a, b)]
        yield compare("openrlhf", case, "step time", "ms", *times, against=against)
        peaks = [[side["MiB"]] for side in (a, b)]
        yield compare("openrlhf", case, "peak memory", "MiB", *peaks, against=against)

    case = f"openrlhf: --loss focalpo, {PAIRS} pairs"
    yield from both(case, TINY / "model", focalpo, ["--loss", "dpo"], rounds, "--loss dpo")
    with tempfile.TemporaryDirectory() as folder:
        model = larger_model(Path(folder))
        cache = [*focalpo, "--focalpo.precompute_ref", "--focalpo.precompute_dir", f"{folder}/ref"]
        case = f"openrlhf: precompute_ref, 25 M, {PAIRS} pairs"
        yield from both(case, model, cache, focalpo, max(4, rounds // 4), "without the flag")
        shared, dpo = [*focalpo, "--focalpo.shared_prompts"], ["--loss", "dpo"]
        data = pairs.resolve() if pairs else None
        if tokenizer is not None:
            model = larger_model(Path(folder) / "other", tokenizer)
        for size in (4, 8):
            case = f"openrlhf: {data.name if data else 'tiny data'}, shared, 25 M, {size} pairs"
            steps = max(4, rounds // 2)
            yield from both(case, model, shared, dpo, steps, "--loss dpo", size, data)
