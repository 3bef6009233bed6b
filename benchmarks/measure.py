"""How everything in the suite is measured: two sides in turns, and a ratio of their medians.

Machines are noisy and the noise drifts, so the two sides take turns, each going first in every
other round.  A time by itself says little; the ratio of the medians does, with its 95 % interval
over rounds drawn again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")

TINY = Path(__file__).resolve().parents[1] / "examples" / "tiny"


MOST_PAIRS = 48  # of a file, that a benchmark draws


def installed(module: str) -> bool:
    """Whether a module can be imported; a folder of its name doesn't count."""
    spec = find_spec(module)
    return spec is not None and spec.origin is not None


def check_tiny() -> None:
    """End the process where the tiny model and data have not been made."""
    if not (TINY / "made.json").is_file():
        raise SystemExit("the model and data are not there: python examples/make_tiny.py")


def conversations(path: Path) -> list[dict[str, Any]]:
    """The pairs of a file of JSON lines, as whole conversations in chosen and rejected.

    Raises:
        ValueError: a line is none, or there are too few; the message names file and line.
    """
    rows = []
    # A text in JSON may hold line breaks other than \n.
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip(" \t"):
            continue
        try:
            row = json.loads(line)
            for side in ("chosen", "rejected"):
                [(message["role"], message["content"]) for message in row[side]]
                row[side][1]
        except (ValueError, TypeError, LookupError):
            raise ValueError(
                f"{path}, line {number}, must be an object with whole conversations in chosen and "
                "rejected"
            ) from None
        rows.append(row)
    if len(rows) < MOST_PAIRS:
        raise ValueError(f"{path} must hold at least {MOST_PAIRS} pairs, got {len(rows)}")
    return rows


#: Of 25 million parameters: there the forward of a reference is more than the host's overhead.
LARGER = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8}
LARGER |= {"num_attention_heads": 8, "num_key_value_heads": 4}


def larger_model(folder: Path, tokens: Path | None = None, shape: dict[str, int] = LARGER) -> Path:
    """A random Llama for the tokens of the tiny model, or of the model at ``tokens``."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    shape = {**shape, "head_dim": 64}
    tokens = tokens or TINY / "model"
    config = AutoConfig.from_pretrained(tokens, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokens).save_pretrained(folder)
    return folder


def what_a_trainer_needs() -> dict[str, Any]:
    """A tokenizer of five tokens, and one pair: its batches are given to the trainer otherwise."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {word: number for number, word in enumerate(("<pad>", "<eos>", "<unk>", "b", "c"))}
    words = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    pairs = Dataset.from_list([{"prompt": "a ", "chosen": "b", "rejected": "c"}])
    return {"train_dataset": pairs, "processing_class": tokenizer}


@dataclass
class Result:
    """One row: ``ratio`` is ours over theirs, between ``low`` and ``high`` with 95 %."""

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
    """The result of what each round measured of both sides."""
    pairs = list(zip(ours, theirs, strict=True))
    random = Random(0)
    drawn = sorted(_ratio(random.choices(pairs, k=len(pairs))) for _ in range(1000))
    a, b = median(ours), median(theirs)
    low, high = drawn[25], drawn[-26]
    return Result(
        benchmark, case, quantity, unit, a, b, _ratio(pairs), low, high, len(pairs), against
    )


def _ratio(pairs: list[tuple[float, float]]) -> float:
    return median(a for a, _ in pairs) / median(b for _, b in pairs)


def in_turns(
    ours: Callable[[], float], theirs: Callable[[], float], rounds: int
) -> tuple[list[float], list[float]]:
    """What both sides return, round by round; the side that was second begins the next round."""
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
    profile = start_profile()
    work()
    return stop_profile(profile)


def start_profile() -> Any:
    """Begin to count what is allocated; :func:`stop_profile` gives the peak in bytes."""
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    profile = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    )
    profile.start()
    return profile


def stop_profile(profile: Any) -> int:
    if CUDA:
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - profile)
    profile.stop()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
