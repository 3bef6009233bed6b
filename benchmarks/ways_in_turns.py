"""Several ways to train, each on ranks of its own, which take turns step by step.

Every rank is a process that runs the real host.  Only the ranks of one way compute at a time, so
all ways meet the same noise of the machine, and the pairs of a step are the same in each.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from measure import CUDA, start_profile, stop_profile

# Imported once, in a process that then starts all ranks; what is not installed is left out.
PRELOADED = ["measure", "datasets", "transformers", "trl.trainer.dpo_trainer", "axolotl.cli.train"]


class Clock:
    """What a rank's host calls at the beginning of each optimizer step."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self.began: float | None = None
        self.profile: Any = None

    def step(self) -> None:
        """Tell what the step before took, and wait for the next turn."""
        self.pipe.send(None if self.began is None else self._taken(self.began))
        self.profile = start_profile() if self.pipe.recv() == "memory" else None
        self.began = time.perf_counter()

    def _taken(self, began: float) -> float:
        if CUDA:
            torch.cuda.synchronize()
        if self.profile is None:
            return time.perf_counter() - began
        return stop_profile(self.profile) / 2**20


@dataclass
class Way:
    """``train(clock, folder, **keywords)`` trains on until the process is ended."""

    train: Callable[..., None]
    keywords: dict[str, Any]


def rank_of(way: Way, rank: int, ranks: int, port: int, pipe: Connection, folder: Path) -> None:
    """One rank's process."""
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {"MASTER_PORT": str(port)}
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
        os.chdir(folder)
        way.train(Clock(pipe), folder, **way.keywords)
        raise RuntimeError("the run ended before it was measured")
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def in_turns(
    ways: dict[str, Way], ranks: int, rounds: int, warm_up: int
) -> dict[str, tuple[list[float], float]]:
    """Seconds of each step of the slowest rank, and the MiB that a last step allocates at most.

    Raises:
        SystemExit: a rank failed; the message has the end of its log.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        started: dict[str, list[Connection]] = {}
        for number, (name, way) in enumerate(ways.items()):
            own = folder / str(number)
            own.mkdir()
            port, started[name] = free_port(), []
            for rank in range(ranks):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=rank_of, args=(way, rank, ranks, port, theirs, own)
                )
                process.start()
                stack.callback(process.join)
                stack.callback(process.kill)
                theirs.close()
                started[name].append(ours)
            answers(name, started[name], own)  # it has begun; only then the next way loads
        folders = {name: folder / str(number) for number, name in enumerate(ways)}

        def turn(name: str, what: str) -> float:
            for rank in started[name]:
                rank.send(what)
            return max(answers(name, started[name], folders[name]))

        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(warm_up + rounds):
            for name in list(ways)[:: -1 if number % 2 else 1]:
                seconds[name].append(turn(name, "time"))
        return {name: (seconds[name][warm_up:], turn(name, "memory")) for name in ways}


def answers(name: str, ranks: list[Connection], folder: Path) -> list[Any]:
    """What each rank sends."""
    found: dict[Connection, Any] = {}
    while missing := [rank for rank in ranks if rank not in found]:
        for rank in wait(missing):
            try:
                found[rank] = rank.recv()
            except (EOFError, ConnectionError):
                log = folder / f"{ranks.index(rank)}.log"
                text = log.read_text(encoding="utf-8", errors="replace")
                raise SystemExit(f"{name}: a rank failed:\n{text[-3000:]}") from None
    return [found[rank] for rank in ranks]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
