"""Balanced batches: the pairs of each optimizer step, dealt to ranks and micro-batches by length.

A micro-batch is padded to its longest sequence, and all ranks wait for the slowest in every
micro-step.  So the pairs of one optimizer step are exchanged among its micro-batches.  No pair
changes its step, and every micro-batch keeps its number of pairs: the step's mean loss and its
gradient stay what they are, up to rounding.

A step's pairs are a flat list in the layout ``[micro-step][rank][place]``, which every host cuts
into micro-batches.  Nothing here depends on a host, and only :class:`BalancedSampler` needs torch.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from torch.utils.data import Sampler

from .errors import InvalidValue, conflict
from .registry import BoundLoss

#: What a micro-batch costs: ``padded`` is its sequences times the longest of them, ``unpadded`` the
#: sum of its pairs' tokens.  ``unpadded_backbone`` is that sum too, but the output layer still
#: computes the padded batch.
Cost = Literal["padded", "unpadded_backbone", "unpadded"]

#: Why a term of a loss can't be combined with balanced batches.
MEAN_OF_TOKENS = "is a mean over the tokens of a micro-batch, whose pairs would change"


@dataclass(frozen=True)
class Geometry:
    """How a host cuts an epoch into micro-batches.

    Attributes:
        ranks: the number of ranks that get pairs of their own.
        each: the number of pairs of a micro-batch on one rank.
        accumulation: the number of micro-batches of a rank in one optimizer step.
    """

    ranks: int
    each: int
    accumulation: int

    @property
    def micro_step(self) -> int:
        """The number of pairs that all ranks compute at a time."""
        return self.ranks * self.each

    @property
    def step(self) -> int:
        """The number of pairs of an optimizer step."""
        return self.micro_step * self.accumulation


def check_loss(loss: BoundLoss, key: str) -> None:
    """Refuse a loss that, for a pair, depends on the other pairs of its batch.

    Args:
        key: the key that asked for balanced batches, for the message.

    Raises:
        ValueError: the losses of a batch differ from those of its pairs one by one.
    """
    margins = torch.linspace(-3, 3, 8).double()
    for at in (loss.at(0.0), loss.at(1.0)):
        alone = torch.cat([at(margin[None]) for margin in margins])
        if not torch.allclose(at(margins), alone, equal_nan=True):
            why = "its loss for a pair depends on the other pairs of the batch"
            raise conflict(key, "the loss", loss.name, why, f"Remove {key}")


def deal(
    pairs: Sequence[int],
    tokens: Sequence[int],
    geometry: Geometry,
    cost: Cost,
    *,
    largest_first: bool = True,
) -> list[int]:
    """The pairs of one optimizer step in the order in which they are dealt.

    The ranks of a micro-step keep the order in which the host drew their pairs, because a host may
    log the numbers of only one rank: the longest or the shortest pairs would be a biased sample.

    Args:
        pairs: rows of the data, in the host's order.  Pairs after the last whole micro-step stay
            where they are, because a smaller batch gives its pairs more weight.
        tokens: for each row of the data, the tokens of its longer sequence if ``cost`` is
            ``padded``, else its tokens without padding.
        geometry: ``accumulation`` isn't read: a step at the end of an epoch may be shorter.
        cost: what a micro-batch costs.
        largest_first: whether the micro-step with the largest micro-batch comes first, so that a
            step that can't fit into memory fails at once.  The others come as the host drew them.
    """
    whole = len(pairs) // geometry.micro_step * geometry.micro_step
    costs = [tokens[pair] for pair in pairs[:whole]]
    places = _longest_first(costs)
    if cost == "unpadded":
        batches = _even(places, costs, geometry.each)
    else:
        size = geometry.micro_step
        batches = []
        for start in range(0, whole, size):
            step = places[start : start + size]
            if cost == "unpadded_backbone":
                # The output layer still sees the padded batch: only similar pairs are exchanged.
                batches += _even(step, costs, geometry.each)
            else:
                batches += [step[i : i + geometry.each] for i in range(0, size, geometry.each)]
    dealt = _as_drawn(batches, geometry.ranks, largest_first)
    return [*(pairs[place] for place in dealt), *pairs[whole:]]


def _longest_first(costs: Sequence[int]) -> list[int]:
    return sorted(range(len(costs)), key=lambda place: (-costs[place], place))


def _even(places: Sequence[int], costs: Sequence[int], each: int) -> list[list[int]]:
    """Batches of ``each`` places with similar sums of costs, the largest first.

    The longest pair goes to the emptiest batch that has a place left.

    Args:
        places: the longest first.
    """
    batches: list[list[int]] = [[] for _ in range(len(places) // each)]
    heap, full = [(0, number) for number in range(len(batches))], []
    for place in places:
        total, number = heapq.heappop(heap)
        batches[number].append(place)
        total += costs[place]
        if len(batches[number]) < each:
            heapq.heappush(heap, (total, number))
        else:
            full.append((-total, number))
    return [batches[number] for _, number in sorted(full)]


def _as_drawn(batches: Sequence[list[int]], ranks: int, first_stays: bool) -> list[int]:
    """The places of all micro-steps as they were drawn, or only of those after the first one."""
    steps = [sorted(batches[at : at + ranks], key=min) for at in range(0, len(batches), ranks)]
    steps[first_stays:] = sorted(steps[first_stays:], key=lambda step: min(step[0]))
    return [place for step in steps for batch in step for place in batch]


def unknown_batches(key: str, what: str, got: object) -> InvalidValue:
    """The error for a data loader whose batches can't be predicted.

    Args:
        key: the key that asked for balanced batches.
        what: the part of the host's data loader that isn't known.
        got: that part.
    """
    why = "focalpo_plugins doesn't know which pairs it puts into a batch"
    return conflict(key, what, type(got).__name__, why, f"Remove {key}")


def steps_of_epoch(
    order: Iterable[int], geometry: Geometry, completed: bool
) -> Iterator[list[int]]:
    """The pairs of each optimizer step of an epoch, before they are dealt.

    The host's order is drawn from a step at a time, as it is without this package.

    Args:
        completed: whether the last micro-step is completed with the epoch's first pairs.
    """
    pairs, size = iter(order), geometry.micro_step
    first: list[int] = []
    while step := list(islice(pairs, geometry.step)):
        first = first or step[:size]
        rest = len(step) % size
        if rest and completed:
            step += (first * -(-size // len(first)))[: size - rest]
        yield step


@dataclass
class Dealt:
    """Tokens on the critical path of the steps that were dealt.

    Attributes:
        plain: in the host's order.
        path: as they were dealt.
    """

    plain: int = 0
    path: int = 0

    def add(
        self,
        step: Sequence[int],
        dealt: Sequence[int],
        tokens: Sequence[int],
        geometry: Geometry,
        cost: Cost,
    ) -> None:
        """Add a step; ``step`` and ``dealt`` are its pairs before and after :func:`deal`."""
        self.plain += critical_path(step, tokens, geometry, cost)[0]
        self.path += critical_path(dealt, tokens, geometry, cost)[0]


class BalancedSampler(Sampler[int]):
    """A host's order of rows, with the pairs of each optimizer step dealt.

    Args:
        order: the host's sampler.
        tokens: as in :func:`deal`.
        geometry: how the host cuts the order.
        cost: what a micro-batch costs.
        completed: whether the host completes the last micro-step of an epoch with the epoch's first
            pairs.  They would be other pairs once they are dealt, so they are appended here.
    """

    def __init__(
        self,
        order: Any,
        tokens: Sequence[int],
        geometry: Geometry,
        cost: Cost,
        *,
        completed: bool = False,
    ) -> None:
        self.order = order
        self.tokens = tokens
        self.geometry = geometry
        self.cost = cost
        self.dealt = Dealt()
        self._completed = completed

    def __len__(self) -> int:
        count, size = len(self.order), self.geometry.micro_step
        return -(-count // size) * size if self._completed else count

    def __iter__(self) -> Iterator[int]:
        for step in steps_of_epoch(self.order, self.geometry, self._completed):
            dealt = deal(step, self.tokens, self.geometry, self.cost)
            self.dealt.add(step, dealt, self.tokens, self.geometry, self.cost)
            yield from dealt

    def __getattr__(self, name: str) -> Any:
        """Pass on what the host asks its own sampler for, such as ``set_epoch``."""
        if name == "order":  # before __init__, as when it is copied
            raise AttributeError(name)
        return getattr(self.order, name)


def critical_path(
    order: Sequence[int], tokens: Sequence[int], geometry: Geometry, cost: Cost
) -> tuple[int, int]:
    """Tokens on the critical path of an epoch, and those of its largest micro-batch.

    Both count the places of a padded batch of ``2 * each`` sequences, or its tokens if nothing is
    padded.

    Args:
        order: rows in the layout ``[micro-step][rank][place]``; those after the last whole
            micro-step are left out.
        tokens: as in :func:`deal`.
    """
    each, size = geometry.each, geometry.micro_step
    path = largest = 0
    for start in range(0, len(order) // size * size, size):
        slowest = 0
        for at in range(start, start + size, each):
            of_pairs = [tokens[row] for row in order[at : at + each]]
            batch = 2 * each * max(of_pairs) if cost == "padded" else sum(of_pairs)
            slowest = max(slowest, batch)
        path += slowest
        largest = max(largest, slowest)
    return path, largest
