"""The batches of a ``transformers.Trainer``: pairs of the same weight, and balanced if asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, SeedableRandomSampler
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import TrainingArguments

from .balanced import BalancedSampler, Cost, Dealt, Geometry, unknown_batches
from .errors import InvalidValue, conflict


def check_batches(args: TrainingArguments) -> None:
    """Raise ``ValueError`` if the host's batches would give pairs different weights."""
    # A value that transformers has from 5.17 on.
    if getattr(args, "train_sampling_strategy", None) == "batch_rebalance":
        raise InvalidValue(
            "train_sampling_strategy must be another one, got 'batch_rebalance': its micro-"
            "batches have different numbers of pairs, and TRL takes the mean of each, so a "
            "pair's weight would depend on its length. Remove it, and set focalpo_balanced_batches "
            "instead."
        )


def order_of(loader: Any) -> tuple[Any, list[str]]:
    """The sampler that draws the pairs of an epoch, before this package balances them.

    Args:
        loader: the data loader of a trainer that is built as the run's.

    Returns:
        The sampler, and a note if the run would draw another order than this one.
    """
    batches = loader.batch_sampler
    batches = getattr(batches, "batch_sampler", batches)  # before accelerate splits them
    order = getattr(batches.sampler, "order", batches.sampler)
    if isinstance(order, (SeedableRandomSampler, SequentialSampler)):
        return order, []
    note = (
        "this run draws its pairs without a fixed seed (accelerator_config.use_seedable_sampler): "
        "the critical path and the largest micro-batch are for another order"
    )
    return order, [note]


def balance(loader: Any, tokens: Sequence[int], accumulation: int, cost: Cost, key: str) -> Dealt:
    """Balance the batches of a data loader, which accelerate has prepared.

    This replaces only its innermost sampler: seeds, epochs, resuming and the split over ranks stay
    the host's.

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
    if isinstance(loader, DataLoaderDispatcher):
        why = "the first rank pads the batches of all ranks to one length"
        raise conflict(key, "dispatch_batches", True, why, "Set dispatch_batches to false")
    batches = loader.batch_sampler
    shard = batches if type(batches) is BatchSamplerShard else None
    if shard is not None:
        batches = shard.batch_sampler
    if type(batches) is not BatchSampler:
        raise unknown_batches(key, "a batch sampler", batches)
    ranks, each, drop_last = 1, batches.batch_size, batches.drop_last
    if shard is not None:
        ranks = shard.num_processes
        each = each // ranks if shard.split_batches else each
    sampler = BalancedSampler(
        batches.sampler,
        tokens,
        Geometry(ranks, each, accumulation),
        cost,
        completed=shard is not None and shard.even_batches and not drop_last,
    )
    batches.sampler = sampler
    return sampler.dealt
