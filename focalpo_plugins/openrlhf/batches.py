"""OpenRLHF's training batches: which rows are in them, and how they are balanced."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from openrlhf.utils.distributed_sampler import DistributedSampler
from torch import Tensor
from tqdm import tqdm

from ..balanced import Cost, Dealt, Geometry, deal, unknown_batches
from ..errors import conflict
from ..guards.messages import say
from ..guards.ranks import Ranks, together
from ..sharing import rope_depends_on_batch

_LONG = 5.0  # seconds; reading lengths that takes longer is reported
_SHOWN_AFTER = 2.0  # seconds until the progress bar


class BalancedDistributedSampler(DistributedSampler):
    """OpenRLHF's sampler, with the pairs of each optimizer step dealt to the ranks by length.

    :func:`balance` makes it of a sampler that OpenRLHF has constructed.  Only places within a step
    are exchanged, so seeds, epochs and resuming stay OpenRLHF's.

    Attributes:
        tokens: of each row, as in :func:`~focalpo_plugins.balanced.deal`.
        geometry: how OpenRLHF cuts an epoch.
        cost: what a micro-batch costs.
        trained: returns the number of micro-batches that the run has trained, those before it was
            resumed included.
        before: what ``trained`` was when the epoch began.
        dealt: what it has dealt.
    """

    tokens: Sequence[int]
    geometry: Geometry
    cost: Cost
    trained: Callable[[], int]
    before: int
    dealt: Dealt

    def set_epoch(self, epoch: int, consumed_samples: int = 0) -> None:
        """Begin an epoch, after the one before it was trained."""
        super().set_epoch(epoch, consumed_samples)
        # Only counted here: the order must stay the same while the epoch is trained.
        self.before = self.trained()

    def __iter__(self) -> Iterator[int]:
        return self._dealt(self._of_all_ranks(), self.before)

    def _of_all_ranks(self) -> list[list[int]]:
        """The rows of each rank in this epoch, in OpenRLHF's order."""
        found = []
        for rank in range(self.num_replicas):
            of_rank = copy.copy(self)
            of_rank.rank = rank
            found.append(list(DistributedSampler.__iter__(of_rank)))
        return found

    def _dealt(self, rows: list[list[int]], before: int) -> Iterator[int]:
        """This rank's rows in the order in which they are dealt."""
        each, accumulation = self.geometry.each, self.geometry.accumulation
        whole = len(rows[0]) // each  # micro-batches of a rank in this epoch
        # OpenRLHF's optimizer steps go on over the end of an epoch.
        end = accumulation - before % accumulation
        begin = 0
        while begin < whole:
            end = min(end, whole)
            window = [
                row
                for at in range(begin, end)
                for of_rank in rows
                for row in of_rank[at * each : (at + 1) * each]
            ]
            # The epoch's first step is the one to fail in if the run can't fit.  In the others the
            # longest pairs must not come first: OpenRLHF logs the rewards of a step's last
            # micro-batches, which would be a biased sample.
            dealt = deal(window, self.tokens, self.geometry, self.cost, largest_first=not begin)
            self.dealt.add(window, dealt, self.tokens, self.geometry, self.cost)
            for at in range(end - begin):
                place = (at * self.geometry.ranks + self.rank) * each
                yield from dealt[place : place + each]
            begin, end = end, end + accumulation
        # OpenRLHF's loader drops a last micro-batch that is not full.
        yield from rows[self.rank][whole * each :]


def check_model(model: Any, max_len: int, key: str, flag: str) -> None:
    """Refuse a model that makes a pair's loss depend on the other pairs of its batch.

    Args:
        model: a model without wrappers; adapters' models may be around it.
        max_len: the number of tokens that sequences are cut to.
        key: the flag that asked for balanced batches, for the message.
        flag: the flag of ``max_len``.

    Raises:
        ValueError: its RoPE depends on the longest sequence of a batch.
    """
    if hasattr(model, "get_base_model"):  # PEFT's
        model = model.get_base_model()
    if rope_depends_on_batch(model.config, max_len):
        why = (
            f"the RoPE of {type(model).__name__} depends on the longest sequence of a batch, if it "
            "is longer than those that the model was first trained on"
        )
        raise conflict(key, flag, max_len, why, f"Lower {flag}, or remove {key}")


def check_loader(loader: Any, key: str) -> None:
    """Refuse a data loader whose batches can't be predicted.

    Args:
        key: the flag that asked for balanced batches, for the message.

    Raises:
        ValueError: its sampler isn't OpenRLHF's, or its batches aren't that sampler's.
    """
    sampler, batches = (getattr(loader, name, None) for name in ("sampler", "batch_sampler"))
    if type(sampler) is not DistributedSampler:
        raise unknown_batches(key, "a sampler", sampler)
    # torch leaves the batch size out if the loader was given its batches.
    if loader.batch_size is None or getattr(batches, "sampler", None) is not sampler:
        raise unknown_batches(key, "a batch sampler", batches)


def balance(
    loader: Any,
    tokens: Sequence[int],
    accumulation: int,
    cost: Cost,
    trained: Callable[[], int],
) -> None:
    """Deal the pairs of each optimizer step of a training loader by length, from now on.

    Args:
        loader: a data loader that :func:`check_loader` accepts.
        tokens: of each row of its data, as in :func:`~focalpo_plugins.balanced.deal`.
        accumulation: the number of micro-batches of a rank in an optimizer step.
        cost: what a micro-batch costs.
        trained: see :class:`BalancedDistributedSampler`.
    """
    # The loader accepts no other sampler once it is constructed.
    sampler = loader.sampler
    sampler.__class__ = BalancedDistributedSampler
    sampler.tokens, sampler.cost, sampler.trained = tokens, cost, trained
    sampler.geometry = Geometry(sampler.num_replicas, loader.batch_size, accumulation)
    sampler.before, sampler.dealt = trained(), Dealt()


def cost_of(packed: bool, shared: bool) -> Cost:
    """What a micro-batch costs.

    Args:
        packed: whether OpenRLHF computes a batch without its padding.
        shared: whether prompts are shared.
    """
    if packed:
        return "unpadded"
    return "unpadded_backbone" if shared else "padded"


def read_tokens(dataset: Any, cost: Cost, shared: bool, ranks: Ranks) -> list[int]:
    """The tokens of each row that :func:`~focalpo_plugins.balanced.deal` sorts by.

    The data set holds texts, and only its own tokenization tells their lengths.  Each rank reads a
    part of the rows; call it on all of them.

    Args:
        dataset: OpenRLHF's ``RewardDataset``.
        cost: what a micro-batch costs.
        shared: whether prompts are shared.
        ranks: all ranks.

    Raises:
        RuntimeError: a rank could not read a row.
    """
    begin, count, is_first = time.monotonic(), len(dataset), ranks.rank == 0
    own = tqdm(
        range(ranks.rank, count, ranks.count),
        desc="lengths of the pairs",
        unit="pair",
        delay=_SHOWN_AFTER,
        disable=not is_first,
    )
    tokens: list[int] = []
    together(ranks, lambda: tokens.extend(_tokens_of(dataset[row], cost, shared) for row in own))
    found = [0] * count
    for rank, part in enumerate(ranks.gather(tokens)):
        found[rank :: ranks.count] = part
    seconds = time.monotonic() - begin
    if is_first and seconds > _LONG:
        say(f"balanced batches: reading the lengths of {count} pairs took {seconds:.0f} s.")
    return found


def _tokens_of(pair: Any, cost: Cost, shared: bool) -> int:
    chosen, rejected = pair[0].flatten(), pair[2].flatten()
    if cost == "padded":
        return max(len(chosen), len(rejected))
    shorter = min(len(chosen), len(rejected))
    same = chosen[:shorter] == rejected[:shorter]
    common = int(same.long().cumprod(0).sum()) if shared else 0
    return len(chosen) + len(rejected) - common


def computed_tokens(chosen_mask: Tensor, rejected_mask: Tensor, packed: bool, ranks: int) -> int:
    """The tokens that a rank computes of a batch without shared prompts.

    Args:
        chosen_mask: ``(B, S)``, 1 for a token and 0 for padding.
        rejected_mask: ``(B, S')``.
        packed: whether padding isn't computed.
        ranks: the number of ranks that compute the batch together.
    """
    if packed:
        tokens = int((chosen_mask.sum() + rejected_mask.sum()).item())
    else:
        tokens = 2 * len(chosen_mask) * max(chosen_mask.shape[1], rejected_mask.shape[1])
    return -(-tokens // ranks)


def rows_of_batch(loader: Any, place: int) -> list[int] | None:
    """The rows of this rank's batch number ``place``, from 0, of a training loader's epoch.

    None if the loader has another sampler than OpenRLHF's, whose order never changes in an epoch.
    """
    if type(loader.sampler) not in (DistributedSampler, BalancedDistributedSampler):
        return None
    each = loader.batch_size
    return list(islice(loader.sampler, place * each, (place + 1) * each))
