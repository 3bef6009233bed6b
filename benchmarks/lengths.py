"""How long pairs are, and what a step costs with them: tokens on the critical path, four ways.

All ranks wait for the slowest in every micro-step, so the tokens of the largest micro-batches add
up.  Micro-batches are formed by the package's own rule.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

from measure import conversations

from focalpo_plugins.balanced import Cost, Geometry, critical_path, deal

#: Each way, what it pays for in a micro-batch, and whether its batches are balanced.
WAYS: dict[str, tuple[Cost, bool]] = {
    "plain": ("padded", False),
    "balanced": ("padded", True),
    "shared": ("unpadded_backbone", False),
    "both": ("unpadded_backbone", True),
    "both + fused": ("unpadded", True),
    "both + precomputed": ("unpadded_backbone", True),
}


class Lengths:
    """Tokens of each pair.

    Attributes:
        parts: of its common start, and of the rest of its chosen and its rejected sequence.
        longest: of its longer sequence.
        shared: of its row with shared prompts.
    """

    def __init__(self, parts: list[tuple[int, int, int]]) -> None:
        self.parts = parts
        self.longest = [prompt + max(answers) for prompt, *answers in parts]
        self.shared = [sum(of_pair) for of_pair in parts]

    def of(self, cost: Cost) -> list[int]:
        return self.longest if cost == "padded" else self.shared


def of_file(path: Path, tokenizer: Any) -> Lengths:
    """The lengths of a file of conversations, with the tokenizer's chat template."""
    texts: list[str] = []
    for row in conversations(path):
        prompt = tokenizer.apply_chat_template(
            row["chosen"][:-1], add_generation_prompt=True, tokenize=False
        )
        texts.append(prompt)
        for side in ("chosen", "rejected"):
            texts.append(tokenizer.apply_chat_template(row[side], tokenize=False)[len(prompt) :])
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    parts = []
    for prompt, chosen, rejected in zip(ids[::3], ids[1::3], ids[2::3], strict=True):
        # Answers may begin alike, and shared prompts also compute that start once.
        alike = len(os.path.commonprefix([chosen, rejected]))
        parts.append((len(prompt) + alike, len(chosen) - alike, len(rejected) - alike))
    return Lengths(parts)


def lognormal(count: int = 6400) -> Lengths:
    """Made-up pairs with lengths like UltraFeedback's, always the same ones.

    The medians are 110 tokens of prompt, 245 of the chosen answer and 200 of the rejected one.  No
    part is longer than 1024, so no sequence than the 2048 tokens of the Llama-3 recipe.  These
    numbers were chosen by us.  They are not fitted to that data set.
    """
    drawn = random.Random(1)

    def tokens(mean: float, deviation: float) -> int:
        return min(1024, max(1, int(drawn.lognormvariate(mean, deviation))))

    return Lengths([(tokens(4.7, 1.0), tokens(5.5, 0.7), tokens(5.3, 0.8)) for _ in range(count)])


def path(lengths: Lengths, geometry: Geometry, way: str, seed: int = 0) -> int:
    """Tokens on the critical path of an epoch in an order drawn with ``seed``, whole steps only."""
    cost, balances = WAYS[way]
    tokens = lengths.of(cost)
    order = list(range(len(tokens)))
    random.Random(seed).shuffle(order)
    size = geometry.step
    steps = [order[at : at + size] for at in range(0, len(order) // size * size, size)]
    if balances:
        steps = [deal(pairs, tokens, geometry, cost) for pairs in steps]
    return critical_path([row for pairs in steps for row in pairs], tokens, geometry, cost)[0]


def ideal(lengths: Lengths, geometry: Geometry, seed: int = 0) -> float:
    """Tokens of a rank if all ranks always had the same number, without padding."""
    order = list(range(len(lengths.shared)))
    random.Random(seed).shuffle(order)
    whole = order[: len(order) // geometry.step * geometry.step]
    return sum(lengths.shared[row] for row in whole) / geometry.ranks
