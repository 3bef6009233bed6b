"""ms-swift's own batches: those of all ranks, and balanced ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from accelerate.data_loader import SkipBatchSampler
from swift.dataloader import BatchSamplerShard

from ..balanced import BalancedSampler, Cost, Dealt, Geometry, unknown_batches


class AllRanks:
    """The rows of an epoch in the layout ``[micro-step][rank][place]``, drawn by ms-swift itself.

    The batches of the last micro-step may be smaller.

    Args:
        shard: the batches of a rank, or of a process without others.
        ranks: the number of ranks that they are drawn for.
    """

    def __init__(self, shard: BatchSamplerShard, ranks: int) -> None:
        total = shard.total_samples * shard.world_size
        self._shards = []
        for rank in range(ranks):
            of_rank = type("OfRank", (BatchSamplerShard,), {"rank": rank, "world_size": ranks})
            drawn: Any = object.__new__(of_rank)
            drawn.__dict__.update({**vars(shard), "total_samples": total // ranks})
            self._shards.append(drawn)

    def set_epoch(self, epoch: int) -> None:
        for shard in self._shards:
            shard.set_epoch(epoch)

    def __len__(self) -> int:
        """The number of micro-steps of an epoch."""
        return len(self._shards[0])

    def __iter__(self) -> Iterator[int]:
        # With group_by_length a rank may have a batch more than the others, which isn't trained.
        for batches in zip(*self._shards, strict=False):
            yield from chain.from_iterable(batches)


class BalancedShard(BatchSamplerShard):
    """One rank's batches, with the pairs of each optimizer step dealt to all ranks by length.

    At the end of an epoch, pairs that don't fill a micro-step stay with their rank.
    """

    _tokens: Sequence[int]
    _accumulation: int
    _cost: Cost
    _dealt: Dealt

    def __iter__(self) -> Iterator[list[int]]:
        geometry = Geometry(self.world_size, self.batch_size, self._accumulation)
        drawn: Any = AllRanks(self, self.world_size)
        sampler = BalancedSampler(drawn, self._tokens, geometry, self._cost)
        sampler.dealt = self._dealt
        rows = list(sampler)
        for start in range(0, len(rows), geometry.micro_step):
            step = rows[start : start + geometry.micro_step]
            each = len(step) // self.world_size
            yield step[self.rank * each : (self.rank + 1) * each]


def balance(loader: Any, tokens: Sequence[int], accumulation: int, cost: Cost, key: str) -> Dealt:
    """Balance the batches of ms-swift's data loader; seeds, epochs and resuming stay its own.

    Args:
        loader: the data loader.
        tokens: as in :func:`~focalpo_plugins.balanced.deal`.
        accumulation: the number of micro-batches in an optimizer step.
        cost: what a micro-batch costs.
        key: the key that asked for balanced batches, for messages.

    Returns:
        The tokens of the steps that were dealt, counted while the run trains.

    Raises:
        ValueError: it isn't known how the loader makes its batches.
    """
    shard: Any = getattr(loader, "batch_sampler", None)
    if type(shard) is SkipBatchSampler:
        shard = shard.batch_sampler
    if type(shard) is not BatchSamplerShard:
        raise unknown_batches(key, "a batch sampler", loader if shard is None else shard)
    # A data loader doesn't let its sampler be replaced.
    shard.__class__ = BalancedShard
    shard._tokens, shard._accumulation, shard._cost = tokens, accumulation, cost
    shard._dealt = dealt = Dealt()
    return dealt
