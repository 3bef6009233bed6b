"""What gpu.py measures of balanced batches: accumulated micro-batches in TRL, and the hosts' steps.

Lengths are the made-up ones of lengths.py, in Llama-3-8B's shape with random weights.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from hosts import (
    SWITCHES,
    recipe_axolotl,
    recipe_openrlhf,
    train_axolotl,
    train_openrlhf,
)
from lengths import WAYS, Lengths, lognormal
from measure import CUDA, TINY, check_tiny, seconds
from torch import Tensor
from ways_in_turns import Way, in_turns

from focalpo_plugins.balanced import Geometry, critical_path, deal

ACCUMULATION, EACH = 8, (1, 4)
FOUR = ("plain", "balanced", "shared", "both")
WARM_UP = 1
SHAPE = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
}
TINY_SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}


def lengths_of(tiny: bool, count: int) -> Lengths:
    """The lengths of the first made-up pairs; with ``tiny`` a 32nd, so that a CPU takes seconds."""
    parts = lognormal().parts[:count]
    return Lengths([tuple(max(1, n // 32) for n in each) for each in parts] if tiny else parts)


# Micro-batches of TRL's trainers.


def geometries(tiny: bool) -> list[Geometry]:
    """Eight ranks, whose micro-batches one GPU computes one after the other; and one rank."""
    cut = 4 if tiny else 1
    return [Geometry(8 // cut, 1, 8 // cut), Geometry(1, 4, 8 // cut)]


def micro_batches(lengths: Lengths, geometry: Geometry, way: str) -> list[list[int]]:
    """The rows of each micro-batch of a step, in the layout ``[micro-step][rank]``."""
    cost, balances = WAYS[way]
    order = list(range(geometry.step))
    if balances:
        order = deal(order, lengths.of(cost), geometry, cost)
    return [order[at : at + geometry.each] for at in range(0, len(order), geometry.each)]


def random_ids(lengths: Lengths, vocabulary: int) -> list[dict[str, list[int]]]:
    drawn = torch.Generator().manual_seed(0)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        {name: torch.randint(6, vocabulary, (count,), generator=drawn).tolist()
         for name, count in zip(names, parts, strict=True)}
        for parts in lengths.parts
    ]  # fmt: skip


def timed(
    trainer: Any, batches: list[list[dict[str, Any]]], ranks: int, step: Any, device: str
) -> tuple[float, float]:
    """Milliseconds of a step's critical path, and its loss."""
    milliseconds, losses = 0.0, []
    for at in range(0, len(batches), ranks):
        of_ranks = []
        for batch in batches[at : at + ranks]:
            given = trainer.data_collator(batch)
            given = {name: tensor.to(device) for name, tensor in given.items()}
            of_ranks.append(seconds(lambda given=given: losses.append(step(trainer, given))))
        milliseconds += 1e3 * max(of_ranks)
    return milliseconds, statistics.fmean(losses)


def accumulated(
    trainers: dict[str, Any], step: Any, gradients: Any, device: str, tiny: bool, rounds: int
) -> Iterator[str]:
    """Rows of a table: each way's time on the critical path, and what the tokens predict.

    Args:
        trainers: of each way, around one model.
        step: computes loss and gradients of a batch, and returns the loss.
        gradients: returns the model's gradients, and sets them to zero.

    Raises:
        SystemExit: balanced batches change the loss or the gradient of a step by more than
            rounding.
    """
    yield f"\nmicro-batches of {geometries(tiny)[0].ranks} ranks on one GPU, and of one rank\n"
    yield f"| ranks x pairs, accumulation | {' | '.join(FOUR)} | balanced are as drawn |"
    yield "| --- |" + " --- |" * (len(FOUR) + 1)
    network = trainers["plain"].model
    for geometry in geometries(tiny):
        lengths = lengths_of(tiny, geometry.step)
        rows = random_ids(lengths, network.config.vocab_size)
        times: dict[str, list[float]] = {way: [] for way in FOUR}
        found: dict[str, tuple[float, Tensor]] = {}
        for number in range(rounds):
            for way in FOUR[:: -1 if number % 2 else 1]:
                batches = [[rows[row] for row in batch]
                           for batch in micro_batches(lengths, geometry, way)]  # fmt: skip
                taken, loss = timed(trainers[way], batches, geometry.ranks, step, device)
                times[way].append(taken)
                found[way] = loss, gradients(network) / len(batches)
        shown, agree = balanced_as_drawn(found, tiny)
        if not agree:
            raise SystemExit(f"balanced batches differ by more than rounding: {shown}")
        middle = {way: statistics.median(each) for way, each in times.items()}
        tokens = {way: tokens_of(lengths, geometry, way) for way in FOUR}
        cells = [f"{middle['plain']:.0f} ms"]
        cells += [f"{middle[way] / middle['plain']:.2f}, tokens {tokens[way] / tokens['plain']:.2f}"
                  for way in FOUR[1:]]  # fmt: skip
        title = f"{geometry.ranks} x {geometry.each}, {geometry.accumulation}"
        yield f"| {title} | " + " | ".join([*cells, shown]) + " |"


def tokens_of(lengths: Lengths, geometry: Geometry, way: str) -> int:
    cost, _ = WAYS[way]
    order = [row for batch in micro_batches(lengths, geometry, way) for row in batch]
    return critical_path(order, lengths.of(cost), geometry, cost)[0]


def balanced_as_drawn(found: dict[str, tuple[float, Tensor]], tiny: bool) -> tuple[str, bool]:
    """How far balanced batches are from the same pairs as drawn, in loss and gradient."""
    apart, off = 0.0, 0.0
    for drawn, balanced in (("plain", "balanced"), ("shared", "both")):
        (one, first), (other, second) = found[drawn], found[balanced]
        apart = max(apart, abs(one - other))
        off = max(off, ((first - second).norm() / first.norm()).item())
    shown = f"loss ± {apart:.1g}, gradients ± {off:.1g}"
    return shown, apart < (1e-5 if tiny else 0.05) and off < (1e-3 if tiny else 0.25)


# Whole steps of the hosts, in processes of their own.


def save_model(folder: Path, device: str, tiny: bool, layers: int) -> Path:
    """Random weights in bf16, with the tokenizer of the tiny model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    shape = TINY_SHAPE if tiny else {**SHAPE, "num_hidden_layers": layers}
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    ids = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    config = LlamaConfig(**shape, **ids, max_position_embeddings=4096, rope_theta=500_000.0)
    torch.manual_seed(0)
    with torch.device(device):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    network.save_pretrained(folder)
    del network
    torch.cuda.empty_cache()
    tokenizer.save_pretrained(folder)
    return folder


def save_pairs(file: Path, lengths: Lengths) -> Path:
    """Conversations of random words that are a token each, so that parts have these lengths."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    known = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    words = [word for word in known if word[:1] == " " and word[1:].isalpha()]
    drawn = random.Random(0)

    def text(tokens: int) -> str:
        return "".join(drawn.choices(words, k=tokens)).strip()

    lines = []
    for prompt, *answers in lengths.parts:
        asked = {"role": "user", "content": text(prompt)}
        sides = [[asked, {"role": "assistant", "content": text(answer)}] for answer in answers]
        lines.append(json.dumps(dict(zip(("chosen", "rejected"), sides, strict=True))))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def attention() -> str:
    return "flash_attention_2" if CUDA and find_spec("flash_attn_2_cuda") else "sdpa"


def way_of_axolotl(model: Path, data: Path, each: int, switches: tuple[str, ...]) -> Way:
    config = recipe_axolotl()
    for key in ("test_datasets", "eval_steps", "eval_batch_size", "save_total_limit"):
        del config[key]
    config["datasets"] = [{**config["datasets"][0], "path": str(data), "ds_type": "json"}]
    config |= {
        "base_model": str(model),
        "plugins": ["focalpo_plugins.axolotl.FocalPOPlugin"],
        "micro_batch_size": each,
        "gradient_accumulation_steps": ACCUMULATION,
        "save_steps": 10_000,
        "attn_implementation": attention(),
        **{f"focalpo_{switch}": True for switch in switches},
    }
    if not CUDA:
        config |= {"bf16": False, "tf32": False}
    return Way(train_axolotl, {"config": config, "zero3": False})


def way_of_openrlhf(model: Path, data: Path, each: int, switches: tuple[str, ...]) -> Way:
    flags, kept = [], True
    for word in recipe_openrlhf():
        if word.startswith("--"):
            kept = not word.startswith(("--eval.", "--logger.", "--ckpt."))
        flags += [word] * kept
    values = {
        "--model.model_name_or_path": model,
        "--data.dataset": data,
        "--train.batch_size": ACCUMULATION * each,
        "--train.micro_batch_size": each,
        "--ds.attn_implementation": attention() if CUDA else "eager",
    }
    flags += [str(word) for flag in values.items() for word in flag]
    flags += [f"--focalpo.{switch}" for switch in switches]
    return Way(train_openrlhf, {"flags": flags, "accumulation": ACCUMULATION})


PRECOMPUTED = "shared + precomputed"
OF_HOST = {
    "axolotl": (way_of_axolotl, {way: SWITCHES[way] for way in FOUR}, 1),
    # It also holds a copy of the model for the reference.
    "openrlhf": (
        way_of_openrlhf,
        {way: SWITCHES[way] for way in FOUR} | {PRECOMPUTED: ("shared_prompts", "precompute_ref")},
        2,
    ),
}


def layers_that_fit(ways: int, copies: int) -> int:
    """All ways are in memory together, and half of it is for the one that computes."""
    free = torch.cuda.mem_get_info()[0]
    # 0.44 GB of weights a layer in bf16 and 0.17 GB of adapter and optimizer, 2.1 GB for both
    # embeddings.
    return max(1, min(32, int((free / 2 / ways / copies - 2.1e9) / 0.61e9)))


def whole_steps(
    host: str, device: str, tiny: bool, rounds: int, layers: int | None
) -> Iterator[str]:
    """Rows of a table: time and peak memory of a step, with the recipe's keys and our switches."""
    check_tiny()
    way_of, ways, copies = OF_HOST[host]
    if layers is None:
        layers = layers_that_fit(len(ways), copies) if CUDA else TINY_SHAPE["num_hidden_layers"]
    with tempfile.TemporaryDirectory() as name:
        model = save_model(Path(name) / "model", device, tiny, layers)
        yield f"\n{host}: {layers} layers, accumulation {ACCUMULATION}, {attention()}\n"
        yield f"| pairs | {' | '.join(ways)} |"
        yield "| --- |" + " --- |" * len(ways)
        for each in EACH:
            count = (WARM_UP + rounds + 2) * each * ACCUMULATION
            data = save_pairs(Path(name) / f"{each}.jsonl", lengths_of(tiny, count))
            made = {way: way_of(model, data, each, keys) for way, keys in ways.items()}
            found = in_turns(made, 1, rounds, WARM_UP)
            middle = {way: 1e3 * statistics.median(of.seconds) for way, of in found.items()}
            peaks = {way: of.bytes / 2**30 for way, of in found.items()}
            cells = [f"{middle['plain']:.0f} ms, {peaks['plain']:.2f} GiB"]
            cells += [f"{middle[way] / middle['plain']:.2f}, {peaks[way] / peaks['plain']:.2f}"
                      for way in ways if way != "plain"]  # fmt: skip
            yield f"| {each} | " + " | ".join(cells) + " |"
