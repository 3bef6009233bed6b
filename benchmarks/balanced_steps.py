"""Whole steps of the real hosts, plain, with balanced batches, with shared prompts and with both.

"plain" is FocalPO without switches, and in LLaMA-Factory and ms-swift the host's own DPO.

Each row is predicted first, from the tokens on the critical path of the same pairs.  The rows at
the end are what balanced batches cost where they can save nothing.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import row_lengths
import torch
from hosts import (
    EXAMPLES,
    SWITCHES,
    train_axolotl,
    train_llamafactory,
    train_openrlhf,
    train_swift,
    train_trl,
)
from lengths import of_file, path
from measure import (
    CUDA,
    TINY,
    Result,
    check_tiny,
    compare,
    conversations,
    installed,
    larger_model,
)
from ways_in_turns import Way, in_turns

from focalpo_plugins.balanced import Geometry

#: Large enough that the host's own work is little of a micro-batch's time; and deep, so that its
#: output layer, which sees padding even with shared prompts, is little of the model.
SHAPE = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2}
WARM_UP = 1
LIMIT = 480  # seconds of a row, on a machine that is busy otherwise
ORDERS = 20  # that a prediction draws
FOUR = ("plain", "balanced", "shared", "both")
SWITCHED = (*FOUR, "both + precomputed")
# The policy's forward pass, its backward pass, which takes twice as long, and the reference's.
PASSES = dict.fromkeys(SWITCHES, 4) | {"both + precomputed": 3}
# They bring a TRL of their own, and change its trainer.
CHANGE_TRL = ("llamafactory", "swift")


def way_of_trl(geometry: Geometry, model: Path, data: Path, switches: tuple[str, ...]) -> Way:
    arguments = {
        "per_device_train_batch_size": geometry.each,
        "gradient_accumulation_steps": geometry.accumulation,
        **{f"focalpo_{switch}": True for switch in switches},
    }
    return Way(train_trl, {"model": model, "data": data, "arguments": arguments})


def way_of_axolotl(geometry: Geometry, model: Path, data: Path, switches: tuple[str, ...]) -> Way:
    import yaml

    config = yaml.safe_load((EXAMPLES / "tiny_focalpo.yml").read_text(encoding="utf-8"))
    del config["test_datasets"], config["eval_steps"], config["max_steps"]
    config["datasets"][0]["path"] = str(data)
    config |= {
        "base_model": str(model),
        "plugins": ["focalpo_plugins.axolotl.FocalPOPlugin"],
        "sequence_len": 1024,
        "micro_batch_size": geometry.each,
        "gradient_accumulation_steps": geometry.accumulation,
        "save_steps": 10_000,
        "learning_rate": 1e-5,
        **{f"focalpo_{switch}": True for switch in switches},
    }
    return Way(train_axolotl, {"config": config, "zero3": geometry.ranks > 1})


def way_of_openrlhf(geometry: Geometry, model: Path, data: Path, switches: tuple[str, ...]) -> Way:
    values = {
        "--loss": "focalpo",
        "--model.model_name_or_path": model,
        "--data.dataset": data,
        "--data.max_len": 1024,
        "--ds.attn_implementation": "eager",
        "--train.micro_batch_size": geometry.each,
        "--train.batch_size": geometry.step,
    }
    flags = [str(word) for flag in values.items() for word in flag]
    flags += ["--data.apply_chat_template", *(f"--focalpo.{switch}" for switch in switches)]
    return Way(train_openrlhf, {"flags": flags, "accumulation": geometry.accumulation})


def way_of_llamafactory(
    geometry: Geometry, model: Path, data: Path, switches: tuple[str, ...]
) -> Way:
    config = tiny_recipe("llamafactory", "pref_loss", geometry, switches)
    config |= {"model_name_or_path": str(model), "cutoff_len": 1024}
    config["disable_gradient_checkpointing"] = True  # like the other hosts
    return Way(train_llamafactory, {"config": config, "data": data})


def way_of_swift(geometry: Geometry, model: Path, data: Path, switches: tuple[str, ...]) -> Way:
    config = tiny_recipe("swift", "loss_type", geometry, switches)
    config |= {"model": str(model), "dataset": [str(data)], "max_length": 1024}
    return Way(train_swift, {"config": config})


def tiny_recipe(
    host: str, loss: str, geometry: Geometry, switches: tuple[str, ...]
) -> dict[str, Any]:
    """The host's tiny run without evaluation; without switches it is the host's own DPO.

    Args:
        loss: the key with the loss's name.
    """
    import yaml

    text = (EXAMPLES / host / "tiny_focalpo.yaml").read_text(encoding="utf-8")
    config: dict[str, Any] = yaml.safe_load(text)
    for key in ("eval_dataset", "val_dataset", "eval_strategy", "eval_steps", "eval_on_start"):
        config.pop(key, None)
    if not switches:
        config |= {loss: "sigmoid"}
        del config["focalpo_gamma"]
    return config | {
        "per_device_train_batch_size": geometry.each,
        "per_device_eval_batch_size": geometry.each,
        "gradient_accumulation_steps": geometry.accumulation,
        "max_steps": 10_000,
        "save_strategy": "no",
        "learning_rate": 1e-5,
        **{f"focalpo_{switch}": True for switch in switches},
    }


@dataclass
class Row:
    host: str
    text: str
    way: Callable[[Geometry, Path, Path, tuple[str, ...]], Way]
    geometry: Geometry
    ways: tuple[str, ...]


ROWS = (
    Row("trl", "TRL, 1 rank", way_of_trl, Geometry(1, 4, 8), (*FOUR, "both + fused")),
    Row("axolotl", "Axolotl, 2 ranks, ZeRO-3", way_of_axolotl, Geometry(2, 2, 8), FOUR),
    Row("openrlhf", "OpenRLHF, 2 ranks, ZeRO-2", way_of_openrlhf, Geometry(2, 2, 8), FOUR),
    *(
        Row(host, f"{name}, 1 rank", way, Geometry(1, pairs, 32 // pairs), SWITCHED)
        for host, name, way in (
            ("llamafactory", "LLaMA-Factory", way_of_llamafactory),
            ("swift", "ms-swift", way_of_swift),
        )
        for pairs in (4, 8)
    ),
)
# Small steps, so that what balancing costs would be seen.
EQUAL = Row("trl", "TRL, 1 rank", way_of_trl, Geometry(1, 4, 4), ("plain", "balanced"))
EQUAL_ROUNDS = 20  # for each round of the others


def measured_here(host: str) -> bool:
    """Whether a host is installed, and isn't changed by another installed host."""
    return installed(host) and not (host == "trl" and any(map(installed, CHANGE_TRL)))


def drawn(rows: list[dict[str, Any]], count: int, file: Path) -> Path:
    """A file of so many pairs, each of ``rows`` as often as any other, give or take one."""
    order = random.Random(0)
    chosen: list[dict[str, Any]] = []
    while len(chosen) < count:
        chosen += order.sample(rows, min(len(rows), count - len(chosen)))
    lines = [json.dumps({side: row[side] for side in ("chosen", "rejected")}) for row in chosen]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def predicted(row: Row, case: str, file: Path, model: Path) -> Iterator[Result]:
    from transformers import AutoTokenizer

    lengths = of_file(file, AutoTokenizer.from_pretrained(model))
    paths = {way: [path(lengths, row.geometry, way, seed) * PASSES[way] / 4
                   for seed in range(ORDERS)] for way in row.ways}  # fmt: skip
    for way in row.ways[1:]:
        sides = paths[way], paths["plain"]
        yield compare("balanced", f"{case}, {way}", "predicted", "tok", *sides, "plain")


def measured(row: Row, case: str, file: Path, model: Path, rounds: int) -> Iterator[Result]:
    ways = {way: row.way(row.geometry, model, file, SWITCHES[way]) for way in row.ways}
    found = in_turns(ways, row.geometry.ranks, rounds, WARM_UP, LIMIT)
    for way in row.ways[1:]:
        text, sides = f"{case}, {way}", (found[way], found["plain"])
        times = [[1e3 * seconds for seconds in side.seconds] for side in sides]
        yield compare("balanced", text, "step time", "ms", *times, "plain")
        times = [[1e3 * seconds for seconds in side.cpu] for side in sides]
        yield compare("balanced", text, "CPU time", "ms", *times, "plain")
        peaks = [[side.bytes / 2**20] for side in sides]
        yield compare("balanced", text, "peak memory", "MiB", *peaks, "plain")


def measure(
    rounds: int, *, pairs: Path | None = None, tokenizer: Path | None = None
) -> Iterator[Result]:
    check_tiny()
    source, name = (pairs, pairs.name) if pairs else (TINY / "train.jsonl", "tiny data")
    rows = conversations(source)
    there = [row for row in ROWS if measured_here(row.host)]
    if CUDA:
        there = [row for row in there if row.geometry.ranks <= torch.cuda.device_count()]
    with tempfile.TemporaryDirectory() as folder:
        model = larger_model(Path(folder) / "model", tokenizer, SHAPE)
        for row in there:
            # With a step for the memory, and one that is begun and never ended.
            count = (WARM_UP + rounds + 2) * row.geometry.step
            file = drawn(rows, count, Path(folder) / f"{row.host}.jsonl")
            case = f"{row.text}, {row.geometry.each} pairs, {name}"
            yield from predicted(row, case, file, model)
            yield from measured(row, case, file, model, rounds)
        if EQUAL.host in (row.host for row in there):
            steps = EQUAL_ROUNDS * rounds
            count = (WARM_UP + steps + 2) * EQUAL.geometry.step
            file = drawn(
                conversations(TINY / "train.jsonl")[:1], count, Path(folder) / "equal.jsonl"
            )
            case = f"{EQUAL.text}, {EQUAL.geometry.each} pairs of equal lengths"
            yield from measured(EQUAL, case, file, TINY / "model", steps)
        from transformers import AutoTokenizer

        loaded = AutoTokenizer.from_pretrained(tokenizer or TINY / "model")
        for host in row_lengths.READ:
            if measured_here(host):
                yield from row_lengths.measure(host, source, loaded)
