"""A model's hidden states on shared prompts, compared with those of its own attention."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..compute.shared_prompts import Layout, layout_of_batch, layout_of_packed
from ..errors import FocalPOError
from .attention import refusal, row_inputs

#: Inputs of a backbone that the row has in another form.
REPLACED = {"input_ids", "attention_mask", "position_ids", "cache_position"}
# Largest relative difference of hidden states that rounding explains: in float32 and above, and
# below float32.
_ROUNDING = (1e-3, 0.1)


def compare(
    key: str,
    backbone: Any,
    kwargs: Mapping[str, Any],
    given: Mapping[str, Tensor | None],
    layout: Layout,
) -> None:
    """Refuse a model whose hidden states of a pair on shared prompts differ by more than rounding.

    Args:
        key: the key that asked for shared prompts.
        backbone: the model without its output layer; its own attention runs without a layout.
        kwargs: the backbone's inputs for the whole batch.
        given: the inputs of one pair; :func:`longest_pair` takes the longest.
        layout: the layout of that pair.

    Raises:
        ValueError: they differ, the model fails on a row, or embeddings have noise.
    """
    own = {name: value for name, value in kwargs.items() if name not in REPLACED}
    with _without_traces(backbone):
        plain = backbone(**{**own, **given}).last_hidden_state
        shared = layout.states_of_batch(_states_of_row(key, backbone, kwargs, layout))
        _refuse_noise(key, backbone, given["input_ids"])
    narrow = plain.dtype.itemsize < 4 or torch.is_autocast_enabled(plain.device.type)
    off = (shared - plain).float().norm(dim=-1) / plain.float().norm(dim=-1)
    # If the model's own states are not finite, the check of the margins stops the step.
    real = plain.isfinite().all(-1)
    mask = given["attention_mask"]
    if mask is not None:
        real &= mask.bool()
    off = off[real]
    furthest = off.max().item() if len(off) else 0.0
    if not furthest <= _ROUNDING[narrow]:
        raise refusal(
            key,
            f"can't be used with {type(backbone).__name__}: its hidden states differ by "
            f"{furthest:.3g} of their size from those of its own attention, more than the rounding "
            f"of {plain.dtype}",
        )


def longest_pair(
    ids: Tensor, mask: Any, pairs: int, lengths: Sequence[int] | None
) -> tuple[dict[str, Tensor | None], Layout]:
    """The pair with the longest sequence: inputs of the backbone, and their layout."""
    if lengths is None:
        longest = mask.sum(1)
        pair = int(torch.maximum(*longest.chunk(2)).argmax())
        rows = torch.tensor([pair, pairs + pair], device=ids.device)
        width = int(longest[rows].max())
        few, real = ids[rows, :width], mask[rows, :width]
        return {"input_ids": few, "attention_mask": real}, layout_of_batch(few, real)
    sides = list(zip(lengths[:pairs], lengths[pairs:], strict=True))
    pair = max(range(pairs), key=lambda i: max(sides[i]))
    begins = sum(lengths[:pair]), sum(lengths[: pairs + pair])
    places = [torch.arange(length) for length in sides[pair]]
    taken = [begin + place for begin, place in zip(begins, places, strict=True)]
    few = ids[:, torch.cat(taken).to(ids.device)]
    positions = torch.cat(places)[None].to(ids.device)
    given = {"input_ids": few, "attention_mask": None, "position_ids": positions}
    return given, layout_of_packed(few, sides[pair])


def next_limit(backbone: Any, longest: int) -> float:
    """The length up to which sequences show no more than those of length ``longest`` did.

    A window shows only in longer sequences.  Its name in a config is the model's own, so every
    number of the config may be one.
    """
    numbers = _numbers(backbone.config.to_dict())
    return min((number for number in numbers if number >= longest), default=math.inf)


def _numbers(values: Any) -> Iterator[int]:
    """The whole numbers in a config, and in what it nests."""
    if isinstance(values, Mapping):
        values = list(values.values())
    if isinstance(values, list | tuple):
        yield from chain.from_iterable(map(_numbers, values))
    elif isinstance(values, int) and not isinstance(values, bool):
        yield values


def _states_of_row(
    key: str, backbone: nn.Module, kwargs: Mapping[str, Any], layout: Layout
) -> Tensor:
    """The row's last hidden states; the model has just computed the same pair by itself."""
    try:
        states: Tensor = backbone(**row_inputs(kwargs, layout)).last_hidden_state
    except (FocalPOError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and "allocate memory" in str(error):
            raise  # of a CPU
        raise refusal(
            key,
            f"can't be used with {type(backbone).__name__}, which fails on a row of shared "
            f"prompts ({type(error).__name__}: {error})",
        ) from error
    return states


def _refuse_noise(key: str, backbone: Any, ids: Tensor | None) -> None:
    """Refuse embeddings that a hook changes in training, as NEFTune's does.

    NEFTune's noise depends on the shape of the batch.
    """
    embeddings = backbone.get_input_embeddings()
    if not (embeddings._forward_hooks or embeddings._forward_pre_hooks):
        return
    mode, quiet = embeddings.training, embeddings(ids)
    embeddings.training = True
    try:
        noisy = embeddings(ids)
    finally:
        embeddings.training = mode
    if not torch.equal(quiet, noisy):
        raise refusal(
            key,
            "can't be combined with noise on the embeddings, such as NEFTune's, got a hook on "
            f"{type(embeddings).__name__} that acts in training: it would read the row's shape "
            "instead of the batch's. Remove it",
        )


@contextmanager
def _without_traces(backbone: nn.Module) -> Iterator[None]:
    """Inside, a forward pass has no gradient and no dropout, and changes no state."""
    modes = {module: module.training for module in backbone.modules()}
    for module in modes:
        # Except bitsandbytes' 4-bit layers: on a CPU they repack their weights in eval mode, and
        # every gradient after that is wrong.
        four_bit = hasattr(getattr(module, "weight", None), "quant_state")
        module.training = four_bit and module.training
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        # Before 2.11 torch gives autocast's copies of the weights, made without a gradient, to the
        # forward pass around this one.
        torch.clear_autocast_cache()
