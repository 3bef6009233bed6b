"""ms-swift's batches, balanced: each step has the pairs that ms-swift draws for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.data_loader import SkipBatchSampler
from swift.dataloader import BatchSamplerShard

from focalpo_plugins.balanced import Dealt
from focalpo_plugins.run import _not_finite
from focalpo_plugins.swift.batches import BalancedShard, balance
from focalpo_plugins.swift.pairs import EncodedPairs

TOKENS = [(37 * row) % 101 + 10 for row in range(64)]


def shard_of(kind: type, rank: int, ranks: int, **given: Any) -> Any:
    """A rank's batches without a process group."""
    of_rank = type("OfRank", (kind,), {"rank": rank, "world_size": ranks})
    made = of_rank(**{"total_samples": 29, "batch_size": 3, "shuffle": True, "drop_last": False,
                      "data_seed": 7, **given})  # fmt: skip
    if kind is BalancedShard:
        made._tokens, made._accumulation, made._cost = TOKENS, 2, "padded"
        made._dealt = Dealt()
    return made


def steps(shards: list[Any]) -> list[set[int]]:
    """The rows of each optimizer step of two micro-batches, over all ranks."""
    of_ranks = [list(shard) for shard in shards]
    count = len(of_ranks[0])
    assert all(len(batches) == count for batches in of_ranks)
    return [
        {row for batches in of_ranks for batch in batches[at : at + 2] for row in batch}
        for at in range(0, count, 2)
    ]


@pytest.mark.releases
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("epoch", [0, 3])
def test_each_step_has_the_same_pairs(ranks: int, drop_last: bool, epoch: int):
    """Of 29 rows in batches of 3; what is left over at the epoch's end too, on the same ranks."""
    made = {}
    for kind in (BatchSamplerShard, BalancedShard):
        made[kind] = [shard_of(kind, r, ranks, drop_last=drop_last) for r in range(ranks)]
        for shard in made[kind]:
            shard.set_epoch(epoch)
    assert steps(made[BalancedShard]) == steps(made[BatchSamplerShard])
    for ours, own in zip(made[BalancedShard], made[BatchSamplerShard], strict=True):
        rows = [row for batch in ours for row in batch]
        assert len(rows) == len(set(rows)) == sum(map(len, own))
        assert [len(batch) for batch in ours] == [len(batch) for batch in own]
        if len(list(own)[-1]) < 3:
            assert list(ours)[-1] == list(own)[-1]


def test_the_longest_batches_are_at_the_same_time():
    """Over an epoch, the longest batch of each round: fewer tokens than as drawn."""

    def waited(kind: type) -> int:
        rounds = zip(*(shard_of(kind, rank, 2, total_samples=60) for rank in range(2)), strict=True)
        return sum(max(TOKENS[row] for batch in both for row in batch) for both in rounds)

    assert waited(BalancedShard) < waited(BatchSamplerShard)


@pytest.mark.releases
def test_a_resumed_loader():
    """Where ms-swift skips batches, the rest is as without a stop."""
    given = {"total_samples": 30, "batch_size": 3, "shuffle": True, "drop_last": False}
    whole, rest = (BatchSamplerShard(**given, data_seed=7) for _ in range(2))
    loaders = (
        SimpleNamespace(batch_sampler=whole),
        SimpleNamespace(batch_sampler=SkipBatchSampler(rest, skip_batches=4)),
    )
    for loader in loaders:
        balance(loader, TOKENS, 2, "padded", "focalpo_balanced_batches")
    assert list(loaders[1].batch_sampler) == list(whole)[4:]
    assert isinstance(whole, BalancedShard)


def test_other_batches_are_refused():
    with pytest.raises(ValueError, match="can't be combined with a batch sampler, got 'list'"):
        balance(SimpleNamespace(batch_sampler=[]), TOKENS, 2, "padded", "focalpo_balanced_batches")


class Rows(list):
    """Rows that are encoded, and which of them were read."""

    def __init__(self) -> None:
        lengths = [(3 + row % 5, 2 + row % 3) for row in range(11)]
        names = ("chosen", "rejected")
        super().__init__(
            {
                f"{name}_{what}": [1] * length
                for name, length in zip(names, both, strict=True)
                for what in ("input_ids", "labels")
            }
            for both in lengths
        )
        self.read: list[int] = []

    def __getitem__(self, row: int) -> Any:
        self.read.append(row)
        return super().__getitem__(row)


def test_each_rank_reads_a_part_of_the_lengths():
    """Of 11 pairs three ranks read 4, 4 and 3; all of them then know all, and read nothing again."""
    whole = EncodedPairs(Rows(), None).tokens("padded")
    assert whole == [max(3 + row % 5, 2 + row % 3) for row in range(11)]
    parts = {rank: whole[rank::3] for rank in range(3)}
    for rank in range(3):

        def gather(thing: Any, rank: int = rank) -> list[Any]:
            if thing is None:  # no error
                return [None] * 3
            assert thing == parts[rank]
            return [*parts.values()]

        rows = Rows()
        found = EncodedPairs(rows, None)
        found.read_tokens("padded", SimpleNamespace(rank=rank, count=3, gather=gather))
        assert found.tokens("padded") == whole
        assert rows.read == list(range(rank, 11, 3))


class ManyRows(Rows):
    """The same eleven rows again and again."""

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, row: int) -> Any:
        self.read.append(row)
        return list.__getitem__(self, row % 11)


def test_a_row_is_searched_for_seconds_only():
    """The other ranks wait for the one that names the row of a NaN: a template takes two
    milliseconds for a row.  If it isn't found, the row of the batch is named."""
    rows = ManyRows()
    found = EncodedPairs(rows, None)
    there, missing = ([1] * 5, [1] * 4), ([2], [3])
    assert found.rows_of([there]) == [2] and rows.read == [0, 1, 2]
    rows.read.clear()
    assert found.rows_of([there, missing]) == [2, None] and len(rows.read) == 10_000
    margins = torch.tensor([1.0, float("nan")])
    said = _not_finite(margins, 0, lambda: found.rows_of([there, missing]))
    assert said == "rank 0, row 1 of 2 (nan, float32)"
