"""Several ways to train, each on ranks of its own, which take turns step by step.

Every rank is a process that runs the real host.  Only the ranks of one way compute at a time, so
all ways meet the same noise of the machine, and the pairs of a step are the same in each.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from measure import CUDA, start_profile, stop_profile

# Imported once, in a process that then starts all ranks; what is not installed is left out.
# A host that changes TRL comes before it.
PRELOADED = [
    "measure",
    "datasets",
    "transformers",
    "llamafactory.train.tuner",
    "swift.rlhf_trainers",
    "trl.trainer.dpo_trainer",
    "axolotl.cli.train",
]


class Clock:
    """What a rank's host calls as it trains: :meth:`step` when an optimizer step begins, and
    :meth:`micro_step` between two micro-batches of a step."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self.began: float | None = None
        self.cpu: list[float] = []  # CPU time at the step's beginning, and after each micro-step
        self.profile: Any = None

    def step(self) -> None:
        """Tell what the step before took, and wait for the next turn."""
        self.pipe.send(None if self.began is None else self._taken(self.began))
        self.profile = start_profile() if self.pipe.recv() == "memory" else None
        self.cpu = [time.process_time()]
        self.began = time.perf_counter()

    def micro_step(self) -> None:
        self.cpu.append(time.process_time())

    def _taken(self, began: float) -> tuple[float, list[float]] | float:
        """Seconds, and CPU seconds of each micro-step; or bytes."""
        if self.profile is not None:
            return stop_profile(self.profile)
        if CUDA:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        self.micro_step()
        return seconds, [end - start for start, end in pairwise(self.cpu)]


@dataclass
class Taken:
    """Of a way.

    Attributes:
        seconds: of each step.
        cpu: CPU seconds of each step on the critical path: those of the slowest rank in each
            micro-step.  Whatever else runs on the machine hardly changes them.
        bytes: the most that is allocated in one more step, on the rank that allocates most.
    """

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    bytes: float = 0.0


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
    ways: dict[str, Way], ranks: int, rounds: int, warm_up: int, limit: float = math.inf
) -> dict[str, Taken]:
    """Measure ``rounds`` steps of each way, and one more for the memory.

    Args:
        limit: seconds after which no further round begins, once two are measured.

    Raises:
        SystemExit: a rank failed; the message has the end of its log.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    taken = {name: Taken() for name in ways}
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
        folders = {name: folder / str(number) for number, name in enumerate(ways)}
        for name in ways:
            answers(name, started[name], folders[name])  # each has come to its first step

        def turn(name: str, what: str) -> list[Any]:
            for rank in started[name]:
                rank.send(what)
            return answers(name, started[name], folders[name])

        end = time.monotonic() + limit
        for number in range(warm_up + rounds):
            if number >= warm_up + 2 and time.monotonic() > end:
                break
            for name in list(ways)[:: -1 if number % 2 else 1]:
                found = turn(name, "time")
                if number >= warm_up:
                    taken[name].seconds.append(max(seconds for seconds, _ in found))
                    of_ranks = zip(*(cpu for _, cpu in found), strict=True)
                    taken[name].cpu.append(sum(max(micro_step) for micro_step in of_ranks))
        for name in ways:
            taken[name].bytes = max(turn(name, "memory"))
    return taken


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
