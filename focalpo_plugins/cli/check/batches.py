"""What a run's micro-batches cost: plain, with balanced batches, with shared prompts, with both.

The hosts draw their order of pairs from a seed, so it is known before the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...balanced import Cost, Geometry, critical_path, deal
from ...plan import Plan, Window
from .counts import Counts


@dataclass(frozen=True)
class Largest:
    """The largest micro-batch of a run.

    Attributes:
        tokens: what is computed of it, padding included.
        pairs: its number of pairs.
        epoch: the epoch in which it comes first, from 1.
        step: the optimizer step in which it comes first, from 1.
    """

    tokens: int
    pairs: int
    epoch: int
    step: int


@dataclass(frozen=True)
class Way:
    """A run in one of the four ways.

    Attributes:
        tokens_per_step: tokens on the critical path of a step, on average: in each micro-step, the
            tokens that the slowest rank computes.
        largest: the largest micro-batch.
        logits: the largest number of tokens of a micro-batch whose logits are computed.
    """

    tokens_per_step: float
    largest: Largest
    logits: int


@dataclass(frozen=True)
class FourWays:
    """The four ways of a run.

    Attributes:
        ways: by their names, ``plain``, ``balanced``, ``shared`` and ``both``.
        of_run: the name of the way that the run is planned in.
    """

    ways: dict[str, Way]
    of_run: str

    @property
    def planned(self) -> Way:
        """The way of the run."""
        return self.ways[self.of_run]


def four_ways(plan: Plan, counts: Counts) -> FourWays | None:
    """The four ways on the pairs that were counted; None if not one batch of them is trained on."""
    lengths = list(zip(counts.lengths[::2], counts.lengths[1::2], strict=True))
    both = [a + b for a, b in lengths]
    shared = [tokens - common for tokens, common in zip(both, counts.in_common, strict=True)]
    plain = _Tokens(both, "unpadded") if plan.packed else _Tokens(list(map(max, lengths)), "padded")
    row = _Tokens(shared, "unpadded" if plan.fused or plan.packed else "unpadded_backbone")
    sums = {
        (False, False): _Sums(plan.geometry, False, plain, plain),
        (True, False): _Sums(plan.geometry, True, plain, plain),
        (False, True): _Sums(plan.geometry, False, row, plain),
        (True, True): _Sums(plan.geometry, True, row, plain),
    }
    for window in plan.windows:
        for of_way in sums.values():
            of_way.add(window)
    found = [of_way.way() for of_way in sums.values() if of_way.micro_steps]
    if not found:
        return None
    names = ("plain", "balanced", "shared", "both")
    of_run = dict(zip(sums, names, strict=True))[plan.balanced_batches, plan.shared_prompts]
    return FourWays(dict(zip(names, found, strict=True)), of_run)


@dataclass(frozen=True)
class _Tokens:
    """The tokens of each pair, and what a micro-batch of them costs."""

    of_pairs: Sequence[int]
    cost: Cost


@dataclass
class _Sums:
    """One way, over the windows that were added.

    Attributes:
        geometry: how the host cuts the order.
        balanced: whether each window is dealt.
        computed: what the model computes.
        padded: what the host's own batches hold, and so the output layer without the fused path.
    """

    geometry: Geometry
    balanced: bool
    computed: _Tokens
    padded: _Tokens
    path: int = 0
    micro_steps: int = 0
    logits: int = 0
    largest: Largest = Largest(0, 0, 0, 0)

    def add(self, window: Window) -> None:
        tokens, cost = self.computed.of_pairs, self.computed.cost
        order = window.pairs
        if self.balanced:
            order = deal(order, tokens, self.geometry, cost)
        for part, geometry in _parts(order, self.geometry):
            path, largest = critical_path(part, tokens, geometry, cost)
            self.path += path
            self.micro_steps += len(part) // geometry.micro_step
            if largest > self.largest.tokens:
                self.largest = Largest(largest, geometry.each, window.epoch, window.step)
            if cost == "unpadded_backbone":
                padded = self.padded
                largest = critical_path(part, padded.of_pairs, geometry, padded.cost)[1]
            self.logits = max(self.logits, largest)

    def way(self) -> Way:
        """What was summed up."""
        per_step = self.path / self.micro_steps * self.geometry.accumulation
        return Way(per_step, self.largest, self.logits)


def _parts(order: Sequence[int], geometry: Geometry) -> Iterator[tuple[Sequence[int], Geometry]]:
    """The whole micro-steps of a window, and the smaller batches that its ranks may end with."""
    whole = len(order) // geometry.micro_step * geometry.micro_step
    if whole:
        yield order[:whole], geometry
    if rest := order[whole:]:
        yield rest, Geometry(geometry.ranks, len(rest) // geometry.ranks, 1)
