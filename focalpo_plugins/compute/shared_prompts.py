"""Each pair's common start computed once, and no padding: the same log-probs from fewer tokens.

DPO runs a prompt twice, before the chosen and before the rejected answer, and pads the batch to its
longest sequence.  Here a batch of ``B`` pairs becomes one row of tokens

    start_1  chosen_1  rejected_1  start_2  chosen_2  rejected_2  ...

``start`` is the longest common start of a pair's two sequences, after they were cut and collated.
All layers except attention compute each token by itself.  Attention gets a :class:`Layout`: a
chosen token sees the start and the chosen tokens before it, and a rejected token sees the start and
the rejected tokens before it.  The positions of both answers continue from the start.

Nothing here depends on a model: :mod:`focalpo_plugins.sharing` puts it into one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InvalidValue


class Pair(NamedTuple):
    """The place of one pair in the row: ``offset``, then the number of tokens of each part."""

    offset: int
    start: int
    chosen: int
    rejected: int


class Segments(NamedTuple):
    """The row in the form that attention with variable lengths takes.

    Each pair has two segments of queries: start and chosen together, and then rejected.  Each
    segment is aligned with the end of its keys.

    Attributes:
        keys: the keys' places in the row ``(K,)``.
        query_ends: cumulative lengths of the queries ``(segments + 1,)``, int32, from 0.
        key_ends: the same for the keys.
        longest_query: length of the longest segment of queries, in tokens.
        longest_key: the same for the keys.
    """

    keys: Tensor
    query_ends: Tensor
    key_ends: Tensor
    longest_query: int
    longest_key: int


#: ``kernel(q, k, v, segments, scale, window, dropout)`` with q ``(T, H, D)``, and k and v
#: ``(K, H', D)``; returns ``(T, H, D)``.
Kernel = Callable[[Tensor, Tensor, Tensor, Segments, float | None, int | None, float], Tensor]


@dataclass
class Layout:
    """The places of a batch's tokens in the row of length ``T``.

    Attributes:
        pairs: the pairs, in the row's order.
        ids: the row's token ids ``(1, T)``.
        positions: each token's position in its sequence ``(1, T)``.
        index: for each place of the batch its place in the row, in the batch's shape; 0 at padding.
        tokens_before: number of places of the batch, padding included.
        calls: number of times that attention was asked to follow this layout.
    """

    pairs: list[Pair]
    ids: Tensor
    positions: Tensor
    index: Tensor
    tokens_before: int
    calls: int = 0
    _segments: Segments | None = None
    _masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """``T``."""
        return self.ids.shape[1]

    @property
    def longest(self) -> int:
        """Length of the longest sequence, in tokens."""
        return max(pair.start + max(pair.chosen, pair.rejected) for pair in self.pairs)

    def states_of_batch(self, row: Tensor) -> Tensor:
        """The row's hidden states ``(1, T, H)`` at their places in the batch.

        The states of padding have no meaning.
        """
        # The gradient of a state adds up over its places, as the start needs it.
        return F.embedding(self.index.to(row.device), row[0])

    def mask(
        self, start: int, own: int, window: int | None, device: torch.device | None = None
    ) -> Tensor:
        """Which of ``start + own`` keys the last ``own`` tokens see, ``(own, start + own)``.

        Args:
            window: number of tokens that a token sees, itself included; None: all.
            device: the mask's device.
        """
        if (start, own, window) not in self._masks:
            query = start + torch.arange(own, device=device)[:, None]
            key = torch.arange(start + own, device=device)
            seen = key <= query
            if window is not None:
                seen &= query - key < window
            self._masks[start, own, window] = seen
        return self._masks[start, own, window].to(device)

    def segments(self, device: torch.device) -> Segments:
        """The segments for a kernel with variable lengths, on ``device``."""
        if self._segments is None or self._segments.keys.device != device:
            queries, keys, places = [0], [0], []
            for offset, start, chosen, rejected in self.pairs:
                own = offset + start + chosen
                if start + chosen:
                    queries.append(start + chosen)
                    keys.append(start + chosen)
                    places.append(torch.arange(offset, own))
                if rejected:
                    queries.append(rejected)
                    keys.append(start + rejected)
                    places += [torch.arange(offset, offset + start)]
                    places += [torch.arange(own, own + rejected)]

            def ends(lengths: Sequence[int]) -> Tensor:
                return torch.tensor(lengths).cumsum(0).to(device, torch.int32)

            where = torch.cat(places).to(device)
            self._segments = Segments(where, ends(queries), ends(keys), max(queries), max(keys))
        return self._segments


def layout_of_batch(ids: Tensor, mask: Tensor) -> Layout:
    """The layout of a collated batch.

    Args:
        ids: token ids ``(2B, S)``, the chosen sequences first.
        mask: ``(2B, S)``, 1 for a token and 0 for the padding behind it.

    Raises:
        ValueError: a sequence does not begin at its row's first place.
    """
    width = ids.shape[1]
    real = mask.bool()
    chosen, rejected = ids.chunk(2)
    first, second = real.chunk(2)
    common = ((chosen == rejected) & first & second).long().cumprod(1).sum(1)
    lengths = real.sum(1)
    in_front = real == (torch.arange(width, device=ids.device) < lengths[:, None])
    # The only place that waits for the device.
    table = torch.stack([common, *lengths.chunk(2), *in_front.all(1).chunk(2)], 1).tolist()
    if not all(row[3] and row[4] for row in table):
        raise InvalidValue(
            "shared prompts need batches with the padding after each sequence, got another mask. "
            "Use the host's own collator, or switch shared prompts off."
        )
    starts, of_chosen, of_rejected = ([row[i] for row in table] for i in range(3))
    begins = [row * width for row in range(len(ids))]
    return _layout(ids, starts, [*of_chosen, *of_rejected], begins)


def layout_of_packed(ids: Tensor, lengths: Sequence[int]) -> Layout:
    """The layout of a packed batch.

    Args:
        ids: token ids ``(1, T)``, one sequence behind the other, the chosen ones first.
        lengths: lengths of the ``2B`` sequences, in tokens.

    Raises:
        ValueError: the lengths don't add up to the row's length.
    """
    if sum(lengths) != ids.shape[1] or len(lengths) % 2:
        raise InvalidValue(
            f"the packed batch must hold pairs whose lengths add up to {ids.shape[1]} tokens, "
            f"got {list(lengths)}. Switch packing or shared prompts off."
        )
    count = len(lengths) // 2
    sequences = torch.split(ids[0], list(lengths))
    starts = []
    for chosen, rejected in zip(sequences[:count], sequences[count:], strict=True):
        shorter = min(len(chosen), len(rejected))
        starts.append((chosen[:shorter] == rejected[:shorter]).long().cumprod(0).sum())
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    return _layout(ids, torch.stack(starts).tolist(), list(lengths), ends[:-1])


def _layout(ids: Tensor, starts: list[int], lengths: list[int], begins: list[int]) -> Layout:
    """The layout of sequences that begin at ``begins`` in the flattened batch, chosen first."""
    count = len(starts)
    index = torch.zeros(ids.numel(), dtype=torch.long)
    pairs, take, positions, offset = [], [], [], 0
    for i, start in enumerate(starts):
        of_chosen, of_rejected = lengths[i], lengths[count + i]
        first, second = begins[i], begins[count + i]
        own = offset + of_chosen  # where the rejected answer is in the row
        pairs.append(Pair(offset, start, of_chosen - start, of_rejected - start))
        take += [torch.arange(first, first + of_chosen)]
        take += [torch.arange(second + start, second + of_rejected)]
        positions += [torch.arange(of_chosen), torch.arange(start, of_rejected)]
        index[first : first + of_chosen] = torch.arange(offset, own)
        index[second : second + start] = torch.arange(offset, offset + start)
        index[second + start : second + of_rejected] = torch.arange(own, own + of_rejected - start)
        offset = own + of_rejected - start
    device = ids.device
    return Layout(
        pairs,
        ids.reshape(-1)[torch.cat(take).to(device)][None],
        torch.cat(positions)[None].to(device),
        index.view(ids.shape).to(device),
        ids.numel(),
    )


def shared_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scale: float | None = None,
    window: int | None = None,
    dropout: float = 0.0,
    kernel: Kernel | None = None,
) -> Tensor:
    """Causal attention in each sequence of ``layout``, ``(1, T, H, D)``.

    Args:
        query: ``(1, H, T, D)``.
        key: ``(1, H', T, D)``; ``H`` is a multiple of ``H'``.
        value: ``(1, H', T, D)``.
        layout: the row's layout.
        scale: factor on the scores; ``D ** -0.5`` by default.
        window: number of tokens that a token sees, itself included; None: all.
        dropout: probability with which a weight is dropped.
        kernel: one with variable lengths; by default torch's attention, segment by segment.
    """
    if kernel is not None:
        segments = layout.segments(query.device)
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        k, v = k.index_select(0, segments.keys), v.index_select(0, segments.keys)
        return kernel(q, k, v, segments, scale, window, dropout)[None]
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))

    # Of each pair start and chosen together, and then rejected.  They are split off at once: the
    # gradient of a slice is as long as the whole row.
    lengths = [n for pair in layout.pairs for n in (pair.start + pair.chosen, pair.rejected)]
    queries, keys, values = (torch.split(x, lengths, 2) for x in (query, key, value))

    def attend(segment: int, start: int) -> Tensor:
        """Attention of a segment to the ``start`` of the one before it, and to itself."""
        own, k, v = lengths[segment], keys[segment], values[segment]
        if start:
            k = torch.cat([keys[segment - 1][:, :, :start], k], 2)
            v = torch.cat([values[segment - 1][:, :, :start], v], 2)
        narrow = window if window is not None and start + own > window else None
        causal = not start and narrow is None
        return F.scaled_dot_product_attention(
            queries[segment],
            k,
            v,
            attn_mask=None if causal else layout.mask(start, own, narrow, query.device),
            is_causal=causal,
            dropout_p=dropout,
            scale=scale,
        )

    starts = [n for pair in layout.pairs for n in (0, pair.start)]
    parts = [attend(at, start) for at, start in enumerate(starts) if lengths[at]]
    return torch.cat(parts, 2).transpose(1, 2)


@cache
def kernel_for(device: torch.device) -> tuple[str, Kernel | None]:
    """Name, for messages, and kernel for tensors on ``device``.

    It is flash-attn's if that was built for this torch, else torch's own from 2.11 on, else
    attention segment by segment. Both need compute capability 8.0 (an A100's) or above.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        if _flash_attn_works():
            return "flash_attn_varlen_func", flash_attn
        if "window_size" in _parameters_of_varlen_attn():
            return "torch varlen_attn", torch_varlen
    return "SDPA by segments", None


def _flash_attn_works() -> bool:
    """False if flash-attn's kernels are missing or built for another torch, or if the release has
    other functions, as version 4 does."""
    try:
        interface = importlib.import_module("flash_attn.flash_attn_interface")
    except (ImportError, OSError):
        return False
    names = ("flash_attn_gpu", "flash_attn_cuda")  # the second before 2.7
    return any(hasattr(getattr(interface, name, None), "varlen_fwd") for name in names)


def flash_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    scale: float | None,
    window: int | None,
    dropout: float,
) -> Tensor:
    """The kernel of the package flash-attn, as a :data:`Kernel`."""
    attend: Any = importlib.import_module("flash_attn").flash_attn_varlen_func
    out: Tensor = attend(
        q,
        k,
        v,
        *segments[1:],
        dropout_p=dropout,
        softmax_scale=scale,
        causal=True,
        window_size=_left_and_right(window),
    )
    return out


def torch_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    scale: float | None,
    window: int | None,
    dropout: float,
) -> Tensor:
    """torch's own kernel, from torch 2.11 on, as a :data:`Kernel`; it has no dropout."""
    if dropout:
        raise InvalidValue(
            f"attention dropout must be 0 for torch's varlen_attn, got {dropout}. Install "
            "flash-attn, or set attention_dropout to 0."
        )
    attend: Any = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    groups, grouped = q.shape[1] // k.shape[1], {}
    if groups > 1 and "enable_gqa" in _parameters_of_varlen_attn():
        grouped["enable_gqa"] = True
    elif groups > 1:  # torch 2.11
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    window_size = _left_and_right(window)
    out: Tensor = attend(q, k, v, *segments[1:], scale=scale, window_size=window_size, **grouped)
    return out


@cache
def _parameters_of_varlen_attn() -> frozenset[str]:
    """Names of the parameters of torch's kernel; none before torch 2.10, which has no kernel."""
    if find_spec("torch.nn.attention.varlen") is None:
        return frozenset()
    kernel = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    return frozenset(signature(kernel).parameters)


def _left_and_right(window: int | None) -> tuple[int, int]:
    """Numbers of tokens that a query sees: on its left, -1 for all; on its right, 0 (causal)."""
    return (-1 if window is None else window - 1, 0)
