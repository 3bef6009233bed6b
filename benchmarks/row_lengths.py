"""How long each host's data set takes to tell the lengths of 60,000 pairs, on one rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from measure import Result, compare, conversations

ROWS = 60_000
GOAL = 2.0  # seconds


def of_trl(file: Path, tokenizer: Any, limit: int) -> Callable[[], Any]:
    """The lengths from the token ids that TRL and Axolotl keep."""
    from datasets import Dataset
    from shared_prompts import of_file

    from focalpo_plugins.hf_sequences import PairSequences

    (some,) = of_file(file, tokenizer, len(conversations(file)), 1)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = list(islice(cycle(some), ROWS))
    dataset = Dataset.from_dict({name: [row[name] for row in rows] for name in names})
    sequences = PairSequences(dataset, *names, limit=limit)
    return lambda: sequences.tokens("unpadded")


def of_openrlhf(file: Path, tokenizer: Any, limit: int) -> Callable[[], Any]:
    """The lengths from the texts that OpenRLHF keeps, which are tokenized for this."""
    from datasets import Dataset

    from focalpo_plugins.openrlhf import cpu

    cpu.stand_in()
    from openrlhf.datasets import RewardDataset

    from focalpo_plugins.openrlhf.batches import read_tokens

    rows = list(islice(cycle(conversations(file)), ROWS))
    sides = {side: [row[side] for row in rows] for side in ("chosen", "rejected")}
    keys = SimpleNamespace(apply_chat_template=True, chosen_key="chosen", rejected_key="rejected")
    strategy = SimpleNamespace(args=SimpleNamespace(data=keys))
    dataset = RewardDataset(Dataset.from_dict(sides), tokenizer, limit, strategy, is_dpo=True)
    alone: Any = SimpleNamespace(rank=0, count=1, gather=lambda thing: [thing])
    return lambda: read_tokens(dataset, "unpadded_backbone", True, alone)


# Each with its rounds: OpenRLHF's takes half a minute or longer.
READ = {"trl": (of_trl, 5), "openrlhf": (of_openrlhf, 1)}


def measure(host: str, file: Path, tokenizer: Any) -> Iterator[Result]:
    prepare, rounds = READ[host]
    read = prepare(file, tokenizer, 1024)
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        read()
        seconds.append(time.perf_counter() - began)
    case = f"{host}: lengths of {ROWS:,} pairs"
    yield compare("balanced", case, "time", "s", seconds, [GOAL] * rounds, f"{GOAL:.0f} s")
