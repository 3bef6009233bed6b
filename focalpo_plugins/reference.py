"""The reference's log-probabilities, computed once and kept in a file, in place of its model.

A pair is identified by a digest of its inputs to the reference: the token ids of both sides,
without padding, and where the answers start.  So the order, the rank and the epoch of a pair don't
matter, and a pair without log-probabilities is found by its missing digest.

A file's key is a digest of everything that the log-probabilities depend on: the reference as it is
in memory after loading, the set of pairs, and what the host adds.  The pairs include the effect of
data, chat template, tokenizer and maximum length.  Where the weights came from doesn't matter.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from .errors import InvalidValue
from .guards.messages import say
from .guards.ranks import Ranks, on_first
from .reference_file import MISSING, ReferenceFile

_DIGEST = 16  # bytes
_NOT_FINITE = torch.inf


class Pairs(NamedTuple):
    """A batch: token ids and masks of both sides, ``(B, T)``, and the number of prompt tokens."""

    chosen_ids: Tensor
    chosen_mask: Tensor
    rejected_ids: Tensor
    rejected_mask: Tensor
    prompt_lengths: Sequence[int]


class PairsAndReference(Protocol):
    """A host's pairs and its reference, on one rank.

    Attributes:
        pairs: the number of pairs in all data sets, which are numbered one after the other.
        batch_size: the number of pairs in a forward pass.
        share: this rank's number among the ranks that get pairs of their own, and their number.
    """

    pairs: int
    batch_size: int
    share: tuple[int, int]

    def batch(self, numbers: Sequence[int]) -> Pairs:
        """The pairs with these numbers."""

    def logps(self, batch: Pairs) -> tuple[Tensor, Tensor]:
        """The reference's summed log-probabilities of both sides, ``(B,)``."""

    def name(self, number: int) -> str:
        """What messages call a pair, such as ``pair 3 of the training data``."""

    def text(self, number: int) -> str:
        """A pair's chosen side, decoded."""

    def free(self) -> int:
        """Free the reference, and return the bytes of weights that it held on this rank."""


class ReferenceLogps:
    """Looks up the reference's summed log-probabilities of a batch.

    Args:
        digests: digests of the pairs, ``(N, 16)``, bytes.
        logps: log-probabilities of the chosen and the rejected answers, ``(N, 2)``.

    Attributes:
        unknown: a message about a pair that was looked up and is missing; empty until then.
    """

    def __init__(self, digests: Tensor, logps: Tensor) -> None:
        self._rows = {bytes(digest): row for row, digest in enumerate(digests.numpy())}
        # The last row is for a pair that is missing.
        self._logps = torch.cat([logps, torch.full((1, 2), torch.nan)])
        self.unknown = ""

    def __call__(self, *batch: Any) -> tuple[Tensor, Tensor]:
        """Both sides ``(B,)`` for a batch, given as the parts of :class:`Pairs`.

        NaN for a pair without precomputed log-probabilities: if one rank meets such a pair, all
        ranks have to stop.
        """
        pairs = Pairs(*batch)
        rows = [self._rows.get(digest, -1) for digest in pair_digests(pairs)]
        if -1 in rows:
            self.unknown = (
                f"the reference's log-probabilities of pair {rows.index(-1)} of a batch were not "
                "precomputed: the pair was in neither data set when training began. Switch "
                "the precomputed reference off."
            )
        chosen, rejected = self._logps[rows].to(pairs.chosen_ids.device).unbind(1)
        return chosen, rejected


def pair_digests(pairs: Pairs) -> list[bytes]:
    sides = [
        [ids[mask.bool()] for ids, mask in zip(all_ids.cpu(), masks.cpu(), strict=True)]
        for all_ids, masks in (pairs[:2], pairs[2:4])
    ]
    found = []
    for chosen, rejected, prompt_length in zip(*sides, pairs.prompt_lengths, strict=True):
        head = torch.tensor([len(chosen), len(rejected), int(prompt_length)])
        whole = torch.cat([head, chosen, rejected]).numpy().data
        found.append(hashlib.blake2b(whole, digest_size=_DIGEST).digest())
    return found


def describe_model(
    model: Any, ranks: Ranks, gathered: Callable[[Tensor], AbstractContextManager[Any]]
) -> dict[str, Any]:
    """The parts of a transformers model that the log-probabilities depend on.

    Args:
        model: the reference as it is in memory, without wrappers.
        ranks: all of them, since each may hold a part of the weights.
        gathered: a context in which a weight is whole, for weights that are sharded.
    """
    config = json.loads(model.config.to_json_string(use_diff=False))
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    return {
        # One for all ranks, or with tensor parallelism one for each slice of the weights.
        "weights": sorted(set(ranks.gather(_digest_of_weights(model, gathered)))),
        "config": config,
        "attention": getattr(model.config, "_attn_implementation", None),
        "experts": getattr(model.config, "_experts_implementation", None),
        # Liger's and 4-bit layers have their own class names, and remote code's names a commit.
        "layers": sorted({f"{type(m).__module__}.{type(m).__qualname__}" for m in model.modules()}),
        **{package: version(package) for package in ("torch", "transformers")},
    }


def _digest_of_weights(
    model: Any, gathered: Callable[[Tensor], AbstractContextManager[Any]]
) -> str:
    """SHA-256 of the weights in memory; it takes about a second for each gigabyte."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if not isinstance(tensor, Tensor):
            continue
        with gathered(tensor):
            here = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(here.shape)} {here.dtype} ".encode())
        digest.update(here.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def emptied(model: Any) -> int:
    """Free a model's weights in place, and return the bytes that they held on this rank.

    DeepSpeed's hooks keep parameters alive after their engine is destroyed.
    """
    held = 0
    for parameter in model.parameters():
        # With ZeRO-3 a parameter is empty, and an attribute has this rank's share.
        share = getattr(parameter, "ds_tensor", None)
        for tensor in (parameter,) if share is None else (parameter, share):
            held += tensor.nbytes
            tensor.data = tensor.new_empty(0)
    return held


def precompute(
    source: PairsAndReference, ranks: Ranks, settings: Mapping[str, Any], folder: Path, key: str
) -> ReferenceLogps:
    """Read or compute the log-probabilities of all pairs, and free the reference.

    Call it on all ranks; only the first one reads and writes the file.

    Args:
        source: the pairs and the reference.
        ranks: the collectives of all ranks.
        settings: what else the log-probabilities depend on, as values for JSON;
            :func:`describe_model` gives the model's.
        folder: the folder of the file.
        key: the key or flag by which the user named ``folder``.

    Raises:
        InvalidValue: the folder can't be written to, or a log-probability is not finite; on all
            ranks.
    """
    started = time.monotonic()
    pairs = _AllPairs(source, ranks)
    file = ReferenceFile(folder, key, pairs.digests, settings)
    logps = torch.full((len(pairs.digests), 2), MISSING)
    if ranks.rank == 0:
        logps = file.read()
    # The maximum gives all ranks what the first one has read: all log-probs or none.
    logps = ranks.reduce(logps, "max")
    how = "read from"
    if not logps.isfinite().all():
        how = "computed and kept in"
        with ExitStack() as reserved:
            on_first(ranks, lambda: reserved.enter_context(file.reserved()))
            logps = _compute(source, ranks, pairs)
            reserved.close()
            on_first(ranks, lambda: file.write(logps))
    held = source.free()
    if ranks.rank == 0:
        say(
            f"reference log-probs of {len(logps)} pairs {how} {file.path} in "
            f"{time.monotonic() - started:.1f} s; the reference is freed, {held / 2**20:.1f} MiB "
            "on this rank."
        )
    return ReferenceLogps(pairs.digests, logps)


class _AllPairs:
    """The pairs of all data sets, each once, in an order that depends only on the pairs.

    Attributes:
        digests: digests of the pairs, ``(N, 16)``, bytes.
        numbers: each pair's number in the data sets.
        lengths: length of each pair's longer side, in tokens.
    """

    def __init__(self, source: PairsAndReference, ranks: Ranks) -> None:
        digests = torch.zeros(source.pairs, _DIGEST, dtype=torch.uint8)
        lengths = torch.zeros(source.pairs, dtype=torch.int64)
        # Each rank fills its share.  The maximum joins them: the other ranks have zeros there.
        first, step = source.share
        for number in _bar(range(first, source.pairs, step), "Reading pairs", ranks):
            batch = source.batch([number])
            (digest,) = pair_digests(batch)
            digests[number] = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
            lengths[number] = max(batch.chosen_ids.shape[1], batch.rejected_ids.shape[1])
        digests, lengths = (ranks.reduce(found, "max") for found in (digests, lengths))
        numbers = {bytes(digest): number for number, digest in enumerate(digests.numpy())}
        self.numbers = [number for _, number in sorted(numbers.items())]
        self.digests, self.lengths = digests[self.numbers], lengths[self.numbers].tolist()


def _compute(source: PairsAndReference, ranks: Ranks, pairs: _AllPairs) -> Tensor:
    """Use the host's own forward pass, on batches of pairs of similar length, longest first."""
    order = sorted(range(len(pairs.numbers)), key=lambda row: -pairs.lengths[row])
    size, (number, number_of_ranks) = source.batch_size, source.share
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    # All ranks need the same number of forward passes: the last round starts over at the longest.
    rounds = range(-(-len(batches) // number_of_ranks))
    logps = torch.full((len(order), 2), MISSING)
    for done in _bar(rounds, "Reference log-probs", ranks):
        rows = batches[(done * number_of_ranks + number) % len(batches)]
        with torch.no_grad():
            sides = source.logps(source.batch([pairs.numbers[row] for row in rows]))
        found = torch.stack(sides, 1).float().cpu()
        logps[rows] = found.where(found.isfinite(), _NOT_FINITE)
    logps = ranks.reduce(logps, "max")
    bad = (logps == _NOT_FINITE).any(1).nonzero().flatten().tolist()
    if bad:
        first = min(pairs.numbers[row] for row in bad)
        raise InvalidValue(
            f"the reference's log-probabilities are not finite for {len(bad)} of {len(order)} "
            f"pairs. The first is {source.name(first)}: {source.text(first)[:80]!r}. Check this "
            "pair and the reference's weights; fp16 can overflow when bf16 doesn't."
        )
    return logps


def _bar(numbers: range, what: str, ranks: Ranks) -> Any:
    return tqdm(numbers, desc=what, disable=ranks.rank != 0)
