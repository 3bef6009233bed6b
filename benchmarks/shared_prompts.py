"""Shared prompts against the host's own DPO, in TRL: what a step computes, but for its optimizer.

Each side has a trainer of its own with the same random weights, and both compute loss and gradients
of the same batches in turns.  The pairs are those of a file, or drawn with lengths that are fixed.
"""

from __future__ import annotations

import contextlib
import copy
import io
import random
import tempfile
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
    conversations,
    in_turns,
    peak_bytes,
    seconds,
)

# Name, hidden size, layers; the second is large enough that a step is no overhead.
MODELS = (("10 M", 384, 6), ("60 M", 640, 12))
# Prompt, each answer, pairs a batch; in tokens.
FIXED = ((64, 256, 2), (256, 256, 2), (1024, 256, 1), (0, 512, 1))
OWN = "DPOTrainer"


def model(vocabulary: int, hidden: int, layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 128),
        max_position_embeddings=4096,
    )
    return LlamaForCausalLM(config)


def trainer(network: Any, tokenizer: Any, folder: str, pairs: int, **ours: Any) -> Any:
    """The host's own trainer, or this package's with the given keys."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from focalpo_plugins import FocalPOConfig, FocalPOTrainer

    cls, config = (FocalPOTrainer, FocalPOConfig) if ours else (DPOTrainer, DPOConfig)
    precomputed = ours.pop("precomputed", False)
    args = config(
        folder,
        per_device_train_batch_size=pairs,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=not CUDA,
        **dict.fromkeys(ours, True),
    )
    some = Dataset.from_list([{"prompt": "a", "chosen": " b c", "rejected": " d e"}] * 2)
    built = cls(
        copy.deepcopy(network), copy.deepcopy(network), args=args, train_dataset=some,
        processing_class=tokenizer,
    )  # fmt: skip
    built.model.train()
    built.precompute_ref_logps = precomputed
    return built


def of_file(path: Path, tokenizer: Any, pairs: int, count: int) -> list[list[dict[str, Any]]]:
    """Batches of the pairs of a file of conversations, in an order drawn once."""
    rows = conversations(path)
    found = []
    for row in random.Random(0).sample(rows, pairs * count):
        prompt = tokenizer.apply_chat_template(
            row["chosen"][:-1], add_generation_prompt=True, tokenize=False
        )
        texts = [prompt, *(tokenizer.apply_chat_template(row[side], tokenize=False)[len(prompt) :]
                           for side in ("chosen", "rejected"))]  # fmt: skip
        ids = tokenizer(texts, add_special_tokens=False).input_ids
        found.append(dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), ids, strict=True)))
    return [found[start : start + pairs] for start in range(0, len(found), pairs)]


def of_lengths(prompt: int, answer: int, pairs: int, vocabulary: int) -> list[dict[str, Any]]:
    drawn = random.Random(0)

    def ids(count: int) -> list[int]:
        return [drawn.randrange(6, vocabulary) for _ in range(count)]

    names = (("prompt_ids", prompt), ("chosen_ids", answer), ("rejected_ids", answer))
    return [{name: ids(count) for name, count in names} for _ in range(pairs)]


def step(built: Any, batch: dict[str, Any]) -> None:
    built.compute_loss(built.model, dict(batch)).backward()
    built.model.zero_grad(set_to_none=True)


def measure(
    rounds: int, *, pairs: Path | None = None, tokenizer: Path | None = None
) -> Iterator[Result]:
    from transformers import AutoTokenizer

    check_tiny()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer or TINY / "model")
    data, name = (pairs, pairs.name) if pairs else (TINY / "train.jsonl", "tiny data")
    # What is measured: batches by their name, and with them the keys of our side.
    shared, both = {"focalpo_shared_prompts": True}, {"focalpo_fused": True}
    both |= shared
    cases: list[tuple[str, list[list[dict[str, Any]]], list[dict[str, bool]]]] = []
    for size in (4, 8):
        batches = of_file(data, tokenizer, size, 6)
        sides = [shared, both, *([{**both, "precomputed": True}] if size == 8 else [])]
        cases.append((f"{name}, {size} pairs", batches, sides))
    for prompt, answer, size in FIXED:
        drawn = of_lengths(prompt, answer, size, len(tokenizer))
        text = f"prompt {prompt}, answers {answer}, {size} pair{'s' * (size > 1)}"
        cases.append((text, [drawn], [both] if prompt else [shared]))
    for label, hidden, layers in MODELS:
        network = model(len(tokenizer), hidden, layers)
        smallest = network.config.hidden_size == MODELS[0][1]
        for text, batches, sides in cases if smallest else cases[:2]:
            for keys in sides if smallest else [both]:
                quiet = io.StringIO()
                with (
                    tempfile.TemporaryDirectory() as folder,
                    contextlib.redirect_stdout(quiet),
                    contextlib.redirect_stderr(quiet),
                ):
                    size = len(batches[0])
                    theirs = trainer(network, tokenizer, folder, size)
                    ours = trainer(network, tokenizer, folder, size, **keys)
                    found = compared(f"{label}: {text}", keys, ours, theirs, batches, rounds)
                yield from found


@torch.no_grad()
def log_probs(network: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The log-probabilities of each sequence's answer."""
    logits = network(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    of_tokens = logits.log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None]).squeeze(2)
    return (of_tokens * batch["completion_mask"][:, 1:]).sum(1)


def compared(
    case: str,
    keys: dict[str, bool],
    ours: Any,
    theirs: Any,
    batches: list[list[dict[str, Any]]],
    rounds: int,
) -> list[Result]:
    collated = [theirs.data_collator(batch) for batch in batches]
    collated = [{k: v.to(theirs.accelerator.device) for k, v in b.items()} for b in collated]
    if keys.get("precomputed"):
        # The reference's own: with any others the weights of the pairs, and so the gradients, are
        # too small for a processor to be fast with.
        for batch in collated:
            chosen, rejected = log_probs(theirs.ref_model, batch).chunk(2)
            batch |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    for built in (ours, theirs):
        step(built, collated[0])  # the first one compares, and allocates
    at = {id(ours): 0, id(theirs): 0}

    def timed(built: Any) -> float:
        batch = collated[at[id(built)] % len(collated)]
        at[id(built)] += 1
        return 1e3 * seconds(lambda: step(built, batch))

    times = in_turns(lambda: timed(ours), lambda: timed(theirs), rounds)
    words = {"focalpo_shared_prompts": "shared", "focalpo_fused": "fused"}
    named = " + ".join(sorted((words.get(key, key) for key in keys), reverse=True))
    peaks = [[peak_bytes(lambda b=b: step(b, collated[0])) / 2**20] for b in (ours, theirs)]
    case = f"{case}, {named}"
    return [
        compare("shared", case, "step time", "ms", *times, against=OWN),
        compare("shared", case, "peak memory", "MiB", *peaks, against=OWN),
    ]
