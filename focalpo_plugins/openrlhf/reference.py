"""The reference's log-probabilities, computed once and kept in a file, in place of its model.

A pair is identified by a digest of its inputs to the reference: the token ids of both sides,
without padding, and where the answers start.  So the order, the rank and the epoch of a pair don't
matter, and a pair without log-probabilities is found by its missing digest.

A file's key has digests of the reference, as it is in memory after loading, and of the set of
pairs.  A run can use the file if both are equal.  The pairs include the effect of data, chat
template, tokenizer and maximum length.  Where the weights came from doesn't matter.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from deepspeed import zero
from deepspeed.accelerator import get_accelerator
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import ConcatDataset
from tqdm import tqdm

from ..errors import InvalidValue
from ..guards.folders import write_whole
from ..guards.messages import say
from .ranks import on_rank_0, stop_all

_DIGEST = 16  # bytes
_MISSING = -torch.inf
_NOT_FINITE = torch.inf


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

    def __call__(
        self,
        chosen_ids: Tensor,
        chosen_mask: Tensor,
        rejected_ids: Tensor,
        rejected_mask: Tensor,
        prompt_lengths: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """Both sides ``(B,)`` for a batch of ids and masks ``(B, T)``, as ``DPOTrainer`` has them.

        NaN for a pair without precomputed log-probabilities: if one rank meets such a pair, all
        ranks have to stop.
        """
        batch = (chosen_ids, chosen_mask, rejected_ids, rejected_mask, prompt_lengths)
        rows = [self._rows.get(digest, -1) for digest in pair_digests(*batch)]
        if -1 in rows:
            self.unknown = (
                f"the reference's log-probabilities of pair {rows.index(-1)} of a batch were not "
                "precomputed: it is in neither data set as it was when training began. Leave out "
                "precompute_ref."
            )
        chosen, rejected = self._logps[rows].to(chosen_ids.device).unbind(1)
        return chosen, rejected


def precompute(
    trainer: Any, strategy: Any, folder: Path, flag: str, shared: bool
) -> ReferenceLogps:
    """Read or compute the log-probabilities of all pairs of ``trainer``, and free its reference.

    Call it on all ranks; only the first one reads and writes the file.  An ``Actor`` without a
    model stays in the reference's place.

    Args:
        trainer: OpenRLHF's trainer, ready to train.
        strategy: OpenRLHF's strategy.
        folder: the folder of the file.
        flag: the flag by which the user named ``folder``.
        shared: whether the forward pass shares prompts, which rounds differently.

    Raises:
        SystemExit: the folder can't be written to, or a log-probability is not finite.
    """
    started = time.monotonic()
    loaders = (trainer.train_dataloader, trainer.eval_dataloader)
    pairs = _Pairs([loader for loader in loaders if loader is not None], strategy)
    about = _about(trainer, strategy, shared) | {
        "pairs": hashlib.sha256(pairs.digests.numpy().data).hexdigest()
    }
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    path = folder / f"reference_logps-{key[:16]}.cache"

    logps = torch.full((len(pairs.digests), 2), _MISSING)
    if strategy.is_rank_0() and os.path.exists(path):
        try:
            logps = _read(path, key, pairs.digests)
        except Exception as error:  # any error, because the other ranks wait
            say(f"{path} is damaged ({error}) and is recreated.")
    # The maximum gives all ranks what the first one has read: all log-probs or none.
    logps = strategy.all_reduce(logps, "max")
    how = "read from"
    if not logps.isfinite().all():
        how = "computed and kept in"
        logps = _compute_and_write(trainer, strategy, pairs, path, flag, about | {"key": key})
    held = _free(trainer.ref_model)
    if strategy.is_rank_0():
        say(
            f"reference log-probs of {len(logps)} pairs {how} {path} in "
            f"{time.monotonic() - started:.1f} s; the reference is freed, {held / 2**20:.1f} MiB "
            "on this rank."
        )
    return ReferenceLogps(pairs.digests, logps)


class _Pairs:
    """The pairs of all data sets, each once, in an order that depends only on the pairs.

    Attributes:
        digests: digests of the pairs, ``(N, 16)``, bytes.
        places: each pair's place in the concatenated data sets.
        lengths: length of each pair's longer side, in tokens.
    """

    def __init__(self, loaders: Sequence[Any], strategy: Any) -> None:
        self.data: ConcatDataset[Any] = ConcatDataset([loader.dataset for loader in loaders])
        self._collate = loaders[0].collate_fn
        digests = torch.zeros(len(self.data), _DIGEST, dtype=torch.uint8)
        lengths = torch.zeros(len(self.data), dtype=torch.int64)
        # Each rank fills its share.  The maximum joins them: the other ranks have zeros there.
        share = range(strategy.get_rank(), len(self.data), strategy.world_size)
        for place in _bar(share, "Reading pairs", strategy):
            batch = self.batch([place])
            (digest,) = pair_digests(*batch)
            digests[place] = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
            lengths[place] = max(batch[0].shape[1], batch[2].shape[1])
        digests, lengths = (strategy.all_reduce(found, "max") for found in (digests, lengths))
        places = {bytes(digest): place for place, digest in enumerate(digests.numpy())}
        self.places = [place for _, place in sorted(places.items())]
        self.digests, self.lengths = digests[self.places], lengths[self.places].tolist()

    def batch(self, places: Iterable[int]) -> tuple[Any, ...]:
        """The batch as ``DPOTrainer`` takes it from its data loader."""
        *tensors, prompt_lengths = self._collate([self.data[place] for place in places])
        return (*(tensor.squeeze(1) for tensor in tensors), prompt_lengths)

    def name(self, row: int) -> str:
        place, trained = self.places[row], self.data.cumulative_sizes[0]
        if place < trained:
            return f"pair {place} of the training data"
        return f"pair {place - trained} of the evaluation data"


def pair_digests(
    chosen_ids: Tensor,
    chosen_mask: Tensor,
    rejected_ids: Tensor,
    rejected_mask: Tensor,
    prompt_lengths: Sequence[int],
) -> list[bytes]:
    """The digest of each pair of a batch; arguments as for calls of :class:`ReferenceLogps`."""
    sides = [
        [ids[mask.bool()] for ids, mask in zip(all_ids.cpu(), masks.cpu(), strict=True)]
        for all_ids, masks in ((chosen_ids, chosen_mask), (rejected_ids, rejected_mask))
    ]
    found = []
    for chosen, rejected, prompt_length in zip(*sides, prompt_lengths, strict=True):
        head = torch.tensor([len(chosen), len(rejected), int(prompt_length)])
        whole = torch.cat([head, chosen, rejected]).numpy().data
        found.append(hashlib.blake2b(whole, digest_size=_DIGEST).digest())
    return found


def _about(trainer: Any, strategy: Any, shared: bool) -> dict[str, Any]:
    """What the log-probabilities depend on, beside the pairs."""
    actor = trainer.ref_model
    model = actor.model.module
    config = json.loads(model.config.to_json_string(use_diff=False))
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    return {
        "weights": _weights(model, strategy),
        "config": config,
        "attention": getattr(model.config, "_attn_implementation", None),
        "experts": getattr(model.config, "_experts_implementation", None),
        # Liger's and 4-bit layers have their own class names, and remote code's names a commit.
        "layers": sorted({f"{type(m).__module__}.{type(m).__qualname__}" for m in model.modules()}),
        "packing": trainer.packing_samples,
        **({"shared": True} if shared else {}),
        "temperature": getattr(actor, "temperature", 1.0),
        **{
            name: getattr(strategy, name, None)
            for name in ("ring_attn_size", "ring_head_stride", "ds_tensor_parallel_size")
        },
        "device": next(trainer.model.parameters()).device.type,
        **{package: version(package) for package in ("openrlhf", "torch", "transformers")},
    }


def _weights(model: Any, strategy: Any) -> list[str]:
    """SHA-256 of the weights in memory; it takes about a second for each gigabyte.

    One for all ranks, or with tensor parallelism one for each slice of the weights.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if not isinstance(tensor, Tensor):
            continue
        with zero.GatheredParameters([tensor]):
            here = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(here.shape)} {here.dtype} ".encode())
        digest.update(here.flatten().view(torch.uint8).numpy().data)
    own = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
    return sorted({bytes(one).hex() for one in strategy.all_gather(own).view(-1, 32).numpy()})


def _compute_and_write(
    trainer: Any, strategy: Any, pairs: _Pairs, path: Path, flag: str, about: dict[str, Any]
) -> Tensor:
    nothing = torch.full((len(pairs.digests), 2), _MISSING)
    size = len(_as_bytes(pairs.digests, nothing, about))
    with ExitStack() as held:

        def reserve() -> None:
            """Reserve the file's size, so that a full disk fails now, and not an hour later."""
            with _writing(path, size, flag):
                path.parent.mkdir(parents=True, exist_ok=True)
                reserved = held.enter_context(
                    NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".tmp")
                )
                os.posix_fallocate(reserved.fileno(), 0, size)

        def write() -> None:
            held.close()
            with _writing(path, size, flag):
                write_whole(path, _as_bytes(pairs.digests, logps, about))

        on_rank_0(strategy, reserve)
        logps = _compute(trainer, strategy, pairs)
        on_rank_0(strategy, write)
    return logps


def _compute(trainer: Any, strategy: Any, pairs: _Pairs) -> Tensor:
    """Use OpenRLHF's own forward pass, on batches of pairs of similar length, longest first."""
    size, sampler = trainer.train_dataloader.batch_size, trainer.train_dataloader.sampler
    order = sorted(range(len(pairs.places)), key=lambda row: -pairs.lengths[row])
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    # All ranks need the same number of forward passes: the last round starts over at the longest.
    rounds = range(-(-len(batches) // sampler.num_replicas))
    device = next(trainer.model.parameters()).device
    logps: Tensor = torch.full((len(order), 2), _MISSING)
    trainer.ref_model.eval()
    for number in _bar(rounds, "Reference log-probs", strategy):
        rows = batches[(number * sampler.num_replicas + sampler.rank) % len(batches)]
        *tensors, prompt_lengths = pairs.batch(pairs.places[row] for row in rows)
        with torch.no_grad():
            chosen, rejected, *_ = trainer.concatenated_forward(
                trainer.ref_model, *(tensor.to(device) for tensor in tensors), prompt_lengths
            )
        found = torch.stack([chosen, rejected], 1).float().cpu()
        logps[rows] = found.where(found.isfinite(), _NOT_FINITE)
    logps = strategy.all_reduce(logps, "max")
    bad = (logps == _NOT_FINITE).any(1).nonzero().flatten().tolist()
    if bad:
        first = min(bad, key=lambda row: pairs.places[row])
        ids = pairs.batch([pairs.places[first]])[0][0]
        stop_all(
            strategy,
            f"the reference gives {pairs.name(first)}, without those that OpenRLHF dropped and "
            f"counted from 0, a log-probability that is not finite ({len(bad)} of {len(order)} "
            f"pairs): {trainer.tokenizer.decode(ids)[:80]!r}. Look at this pair and at the "
            "reference's weights; fp16 overflows where bf16 does not.",
        )
    return logps


def _as_bytes(digests: Tensor, logps: Tensor, about: dict[str, Any]) -> bytes:
    metadata = {"about": json.dumps(about, sort_keys=True), "key": about["key"]}
    metadata["sha256"] = hashlib.sha256(logps.numpy().data).hexdigest()
    content: bytes = save({"digests": digests, "logps": logps}, metadata)
    return content


@contextmanager
def _writing(path: Path, size: int, flag: str) -> Iterator[None]:
    try:
        yield
    except IsADirectoryError as error:
        raise InvalidValue(
            f"{flag} must be a folder where a file can have the name {path.name}, got "
            f"{str(path.parent)!r}: {error}. Remove what has that name, or name another folder."
        ) from None
    except OSError as error:
        raise InvalidValue(
            f"{flag} must be a folder with room for {size / 2**20:.1f} MiB that can be written to, "
            f"got {str(path.parent)!r}: {error}. Name another."
        ) from None


def _read(path: Path, key: str, digests: Tensor) -> Tensor:
    with safe_open(path, "pt") as file:
        metadata, found = file.metadata(), file.get_tensor("digests")
        logps: Tensor = file.get_tensor("logps")
    if metadata["key"] != key or not torch.equal(found, digests):
        raise ValueError("it is of another reference or other pairs")
    if metadata["sha256"] != hashlib.sha256(logps.numpy().data).hexdigest():
        raise ValueError("its checksum is wrong")
    return logps


def _free(actor: Any) -> int:
    """Free the engine in ``actor``, and return the bytes of weights it held on this rank."""
    engine, actor.model = actor.model, None
    engine.destroy()
    held = 0
    for parameter in engine.parameters():
        # With ZeRO-3 a parameter is empty, and an attribute has this rank's share.  DeepSpeed's
        # hooks keep parameters alive after their engine is destroyed, so we empty them.
        share = getattr(parameter, "ds_tensor", None)
        for tensor in (parameter,) if share is None else (parameter, share):
            held += tensor.nbytes
            tensor.data = tensor.new_empty(0)
    del engine
    gc.collect()
    get_accelerator().empty_cache()
    return held


def _bar(numbers: range, what: str, strategy: Any) -> Any:
    return tqdm(numbers, desc=what, disable=not strategy.is_rank_0())
