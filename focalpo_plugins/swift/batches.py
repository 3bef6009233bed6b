"""ms-swift's own batches, balanced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from accelerate.data_loader import SkipBatchSampler
from swift.dataloader import BatchSamplerShard

from ..balanced import BalancedSampler, Cost, Geometry, unknown_batches


class _AllRanks(BatchSamplerShard):
    """The rows of all ranks in the order in which ms-swift draws them."""

    rank, world_size = 0, 1

    def __init__(self, shard: BatchSamplerShard) -> None:
        self.__dict__.update(vars(shard))
        self.total_samples = shard.total_samples * shard.world_size
        self.drop_last = False


class BalancedShard(BatchSamplerShard):
    """One rank's batches, with the pairs of each optimizer step dealt to all ranks by length.

    ms-swift gives row ``i`` of an epoch to rank ``i % ranks``.  What fills no round of batches at
    the end of an epoch stays with that rank.
    """

    _tokens: Sequence[int]
    _accumulation: int
    _cost: Cost

    def __iter__(self) -> Iterator[list[int]]:
        geometry = Geometry(self.world_size, self.batch_size, self._accumulation)
        drawn = list(chain.from_iterable(_AllRanks(self)))
        rows = list(BalancedSampler(drawn, self._tokens, geometry, self._cost))
        whole = len(rows) // geometry.micro_step * geometry.micro_step
        for start in range(0, whole, geometry.micro_step):
            at = start + self.rank * self.batch_size
            yield rows[at : at + self.batch_size]
        left = rows[whole + self.rank :: self.world_size]
        if left and not self.drop_last:
            yield left


def balance(loader: Any, tokens: Sequence[int], accumulation: int, cost: Cost, key: str) -> None:
    """Balance the batches of ms-swift's data loader; seeds, epochs and resuming stay its own.

    Args:
        loader: the data loader.
        tokens: as in :func:`~focalpo_plugins.balanced.deal`.
        accumulation: the number of micro-batches in an optimizer step.
        cost: what a micro-batch costs.
        key: the key that asked for balanced batches, for messages.

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
