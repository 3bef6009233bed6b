"""What balanced batches save on more ranks than a machine has: simulated, in tokens.

Each row is a sum over the micro-steps of the largest micro-batch's tokens, over that of random
padded batches; micro-batches are formed by the package's own rule.  `ideal` is what a rank would
have if all tokens, without padding, were spread evenly.  A step has 128 pairs, or one micro-step if
that has more.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

from lengths import Lengths, ideal, lognormal, of_file, path
from measure import TINY, Result, compare

from focalpo_plugins.balanced import Geometry

BATCH = 128  # the paper's
RANKS, EACH = (8, 32, 64), (1, 2, 4)
QUANTITIES = ("balanced", "shared", "both", "ideal")
MADE_UP = "made-up lengths"


def geometries() -> list[Geometry]:
    return [
        Geometry(ranks, each, max(1, BATCH // (ranks * each)))
        for ranks, each in product(RANKS, EACH)
    ]


def named(geometry: Geometry) -> str:
    return f"{geometry.ranks} x {geometry.each}"


def tokens(lengths: Lengths, geometry: Geometry, what: str, seed: int) -> float:
    of = ideal(lengths, geometry, seed) if what == "ideal" else path(lengths, geometry, what, seed)
    return float(of)


def measure(
    rounds: int, *, pairs: Path | None = None, tokenizer: Path | None = None
) -> Iterator[Result]:
    """A round is an epoch in another order."""
    sets = {MADE_UP: lognormal()}
    if pairs is not None:
        from transformers import AutoTokenizer

        loaded = AutoTokenizer.from_pretrained(tokenizer or TINY / "model")
        sets = {pairs.name: of_file(pairs, loaded), **sets}
    for (name, lengths), geometry in product(sets.items(), geometries()):
        found = {what: [tokens(lengths, geometry, what, seed) for seed in range(rounds)]
                 for what in ("plain", *QUANTITIES)}  # fmt: skip
        for what in QUANTITIES:
            case = f"{named(geometry)}, {name}"
            yield compare("ranks", case, what, "tok", found[what], found["plain"], "plain")
