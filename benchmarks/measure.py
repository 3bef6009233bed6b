"""How everything in the suite is measured: two sides in turns, and a ratio of their medians.

Machines are noisy and the noise drifts, so the two sides take turns, each going first in every
other round.  A time by itself says little; the ratio does, with the quartiles of the rounds'
own ratios as its spread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any

import torch

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


@dataclass
class Result:
    """One row: ``ratio`` is ours over theirs, ``low`` and ``high`` its quartiles over rounds."""

    benchmark: str
    case: str
    quantity: str
    unit: str
    ours: float
    theirs: float
    ratio: float
    low: float
    high: float
    rounds: int
    against: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    benchmark: str,
    case: str,
    quantity: str,
    unit: str,
    ours: list[float],
    theirs: list[float],
    against: str,
) -> Result:
    """From what each round measured of both sides."""
    ratios = [a / b if b else float(a == b) for a, b in zip(ours, theirs, strict=True)]
    low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    a, b = median(ours), median(theirs)
    ratio = a / b if b else float(a == b)
    return Result(benchmark, case, quantity, unit, a, b, ratio, low, high, len(ratios), against)


def in_turns(
    ours: Callable[[], float], theirs: Callable[[], float], rounds: int
) -> tuple[list[float], list[float]]:
    """What both sides return, round by round; whoever was second is first in the next."""
    found: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            found[side].append((ours, theirs)[side]())
    return found


def seconds(work: Callable[[], Any], repeats: int = 1) -> float:
    """Seconds of one call, averaged over ``repeats``; by CUDA events where there is CUDA."""
    if CUDA:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(repeats):
            work()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats
    clock = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - clock) / repeats


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most memory that tensors allocated in ``work`` took at any moment.

    On a CPU the profiler's allocations and frees are added up; on CUDA the allocator is asked.
    """
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
