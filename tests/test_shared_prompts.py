"""Shared prompts without a model: the place of each token, and attention that follows the
layout."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from focalpo_plugins.compute import shared_prompts
from focalpo_plugins.compute.shared_prompts import (
    Layout,
    Pair,
    Segments,
    kernel_for,
    layout_of_batch,
    layout_of_packed,
    shared_attention,
    torch_varlen,
)


def batch(*sequences: list[int]) -> tuple[Tensor, Tensor]:
    """Token ids and mask, padded with 0 at the end of each sequence."""
    width = max(map(len, sequences))
    ids = torch.tensor([[*s, *[0] * (width - len(s))] for s in sequences])
    return ids, torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences])


def test_layout_by_hand():
    """Two pairs: 7 8 | 1 2 3 and 7 8 | 4, and without a common start 5 6 and 9.

    The first takes 2 + 3 + 1 places, the second 0 + 2 + 1; positions go on from the start.
    """
    layout = layout_of_batch(*batch([7, 8, 1, 2, 3], [5, 6], [7, 8, 4], [9]))
    assert layout.pairs == [Pair(0, 2, 3, 1), Pair(6, 0, 2, 1)]
    assert layout.ids.tolist() == [[7, 8, 1, 2, 3, 4, 5, 6, 9]]
    assert layout.positions.tolist() == [[0, 1, 2, 3, 4, 2, 0, 1, 0]]
    assert layout.index.tolist() == [
        [0, 1, 2, 3, 4],
        [6, 7, 0, 0, 0],
        [0, 1, 5, 0, 0],
        [8, 0, 0, 0, 0],
    ]
    assert (layout.tokens, layout.tokens_before) == (9, 20)


def test_layout_of_a_packed_batch_by_hand():
    """The same sequences one behind the other: the same row, laid back to the packed order."""
    packed = torch.tensor([[7, 8, 1, 2, 3, 5, 6, 7, 8, 4, 9]])
    layout = layout_of_packed(packed, [5, 2, 3, 1])
    assert layout.pairs == [Pair(0, 2, 3, 1), Pair(6, 0, 2, 1)]
    assert layout.ids.tolist() == [[7, 8, 1, 2, 3, 4, 5, 6, 9]]
    assert layout.index.tolist() == [[0, 1, 2, 3, 4, 6, 7, 0, 1, 5, 8]]
    assert (layout.tokens, layout.tokens_before) == (9, 11)


@pytest.mark.parametrize(
    "chosen, rejected, start",
    [
        ([7, 8], [7, 8], 2),  # equal
        ([7, 8], [7, 8, 9], 2),  # one is the other's beginning
        ([7, 8, 9], [7, 8], 2),
        ([7], [8], 0),
        ([7, 0, 9], [7, 0, 8], 2),  # the padding's id among the tokens
    ],
)
def test_common_starts(chosen: list[int], rejected: list[int], start: int):
    layout = layout_of_batch(*batch(chosen, rejected))
    assert layout.pairs == [Pair(0, start, len(chosen) - start, len(rejected) - start)]
    row = layout.ids[0]
    for sequence, places in zip((chosen, rejected), layout.index, strict=True):
        assert row[places[: len(sequence)]].tolist() == sequence


def test_padding_before_a_sequence_is_refused():
    ids = torch.tensor([[0, 7, 8], [7, 8, 9]])
    with pytest.raises(ValueError, match="with the padding after each sequence, got another mask"):
        layout_of_batch(ids, torch.tensor([[0, 1, 1], [1, 1, 1]]))


@pytest.mark.parametrize("lengths", [[2, 2], [1, 1, 1]])
def test_lengths_that_do_not_fit_are_refused(lengths: list[int]):
    with pytest.raises(ValueError, match="must hold pairs whose lengths add up to 3 tokens, got "):
        layout_of_packed(torch.tensor([[1, 2, 3]]), lengths)


def by_sequence(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, lengths: list[int], window: int | None
) -> Tensor:
    """Softmax attention of each sequence by itself, its tokens taken from the row; as the row."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    out = torch.zeros_like(q)
    for places, length in zip(layout.index.tolist(), lengths, strict=True):
        at = torch.tensor(places[:length])
        scores = q[0][:, at] @ k[0][:, at].transpose(1, 2) / q.shape[-1] ** 0.5
        apart = torch.arange(length)[:, None] - torch.arange(length)
        seen = (apart >= 0) & (apart < (window or length))
        own = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[0][:, at]
        # Both sequences of a pair compute their start; it is the same.
        out = out.index_copy(2, at, own[None])
    return out.transpose(1, 2)


def slow_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    scale: float | None,
    window: int | None,
    dropout: float,
) -> Tensor:
    """What the kernels with variable lengths compute: the last query is aligned with the last key."""
    groups, outs = q.shape[1] // k.shape[1], []
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    ends = [segments.query_ends.tolist(), segments.key_ends.tolist()]
    for a, b, c, d in zip(ends[0], ends[0][1:], ends[1], ends[1][1:], strict=False):
        assert b - a <= segments.longest_query and d - c <= segments.longest_key
        queries, keys, values = (x.transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d]))
        scores = queries @ keys.transpose(1, 2) * (scale or q.shape[-1] ** -0.5)
        apart = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)
        seen = (apart >= 0) & (apart < (window or d))
        outs.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(outs)


@given(
    starts=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    own=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=3),
    window=st.sampled_from([None, 1, 3, 50]),
    groups=st.sampled_from([1, 2]),
    varlen=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_attention(starts, own, window, groups: int, varlen: bool):
    """Values and gradients, against each sequence by itself, in float64."""
    sides: list[list[list[int]]] = [[], []]
    for number, (start, counts) in enumerate(zip(starts, own, strict=False)):
        begin = [10 + number] * max(start, not all(counts))  # no sequence is empty
        for side, count in enumerate(counts):
            sides[side].append(begin + [20 + side] * count)
    sequences = [*sides[0], *sides[1]]
    layout = layout_of_batch(*batch(*sequences))
    generator = torch.Generator().manual_seed(0)

    def drawn(heads: int) -> Tensor:
        shape = (1, heads, layout.tokens, 4)
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    q, k, v = drawn(2 * groups), drawn(2), drawn(2)
    expected = by_sequence(q, k, v, layout, [len(s) for s in sequences], window)
    found = shared_attention(q, k, v, layout, window=window, kernel=slow_varlen if varlen else None)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    gradients = [torch.autograd.grad((out * weights).sum(), (q, k, v)) for out in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


class CutOff(TorchDispatchMode):
    """Counts the tokens of the gradients that slices along the row have."""

    tokens = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None):
        found = operation(*args, **(kwargs or {}))
        if operation is torch.ops.aten.slice_backward.default and args[2] == 2:
            self.tokens += found.shape[2]
        return found


def test_gradients_are_not_as_long_as_the_row_for_each_pair():
    """Ten pairs with a start of 3 tokens, and 2 and 4 of their own. Keys and values of each start
    are cut off from the 5 tokens of start and chosen: 2 * 10 * 5. If each part were cut off from
    the row of 90 tokens, eight cuts of each pair would have gradients of 8 * 10 * 90."""
    sequences = [
        [[1, 2, 3] + [answer] * count for _ in range(10)] for answer, count in ((4, 2), (5, 4))
    ]
    layout = layout_of_batch(*batch(*sequences[0], *sequences[1]))
    assert layout.tokens == 90
    q, k, v = (torch.randn(1, 2, 90, 4, requires_grad=True) for _ in range(3))
    out = shared_attention(q, k, v, layout)
    with CutOff() as cut:
        out.sum().backward()
    assert cut.tokens == 2 * 10 * 5


def of_torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
    raise AssertionError("it has no scale and no window")


def of_torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)
):
    """It says nothing of fewer heads of keys than of queries."""
    assert query.shape[1] == key.shape[1] == value.shape[1]
    left, right = window_size
    assert right == 0, "causal"
    segments = Segments(torch.arange(len(key)), cu_seq_q, cu_seq_k, max_q, max_k)
    return slow_varlen(query, key, value, segments, scale, None if left < 0 else left + 1, 0.0)


def of_torch_2_12(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1),
    enable_gqa=False,
):  # fmt: skip
    groups = query.shape[1] // key.shape[1]
    assert enable_gqa == (groups > 1)
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    ends = cu_seq_q, cu_seq_k, max_q, max_k
    return of_torch_2_11(query, key, value, *ends, scale=scale, window_size=window_size)


@pytest.fixture
def torch_has(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Gives torch the kernel of another release; its signature decides how it is called."""
    pytest.importorskip("torch.nn.attention.varlen", reason="torch before 2.10 has no kernel")

    def put(kernel: Any) -> None:
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
        shared_prompts._parameters_of_varlen_attn.cache_clear()
        kernel_for.cache_clear()

    yield put
    shared_prompts._parameters_of_varlen_attn.cache_clear()
    kernel_for.cache_clear()


@pytest.mark.parametrize("kernel", [of_torch_2_11, of_torch_2_12])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_torchs_kernel_in_each_release(torch_has, kernel: Any, window: int | None, groups: int):
    """The arguments that each release takes; benchmarks/gpu.py runs the kernel itself."""
    torch_has(kernel)
    sequences = [[7, 8, 1, 2, 3], [5, 6], [7, 8, 4], [9]]
    layout = layout_of_batch(*batch(*sequences))
    torch.manual_seed(0)
    shapes = ((1, heads, layout.tokens, 4) for heads in (2 * groups, 2, 2))
    q, k, v = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    expected = by_sequence(q, k, v, layout, [len(s) for s in sequences], window)
    found = shared_attention(q, k, v, layout, window=window, kernel=torch_varlen)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "capability, kernel, name",
    [
        ((8, 0), of_torch_2_12, "torch varlen_attn"),
        ((9, 0), of_torch_2_11, "torch varlen_attn"),
        ((9, 0), of_torch_2_10, "SDPA by segments"),
        ((7, 5), of_torch_2_12, "SDPA by segments"),
    ],
)
def test_the_kernel_of_a_gpu(torch_has, monkeypatch, capability, kernel: Any, name: str):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    torch_has(kernel)
    assert kernel_for(torch.device("cuda"))[0] == name


@pytest.mark.parametrize(
    "kernels, name",
    [
        ("varlen_fwd = None", "flash_attn_varlen_func"),
        ("", "torch varlen_attn"),  # only its Python part
        ("raise ImportError('undefined symbol: of another torch')", "torch varlen_attn"),
        (None, "torch varlen_attn"),  # version 4 has neither this module nor the function
    ],
)
@pytest.mark.parametrize("named", ["flash_attn_gpu", "flash_attn_cuda"])
def test_a_flash_attn_without_its_kernels(
    torch_has, monkeypatch, tmp_path: Path, kernels: str | None, name: str, named: str
):
    """Such a package imports without an error, and would fail in the first step."""
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").touch()
    if kernels is not None:
        (tmp_path / "flash_attn_2_cuda.py").write_text(kernels)
        interface = tmp_path / "flash_attn" / "flash_attn_interface.py"
        interface.write_text(f"import flash_attn_2_cuda as {named}\n")
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("flash_attn", "flash_attn.flash_attn_interface", "flash_attn_2_cuda"):
        monkeypatch.setitem(sys.modules, module, None)  # which is undone
        del sys.modules[module]
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    torch_has(of_torch_2_12)
    assert kernel_for(torch.device("cuda"))[0] == name


def test_states_go_back_with_their_gradients():
    """The start's state stands in both sequences, and its gradient is the sum of both."""
    layout = layout_of_batch(*batch([7, 8], [7]))
    row = torch.tensor([[[1.0], [2.0]]], requires_grad=True)
    states = layout.states_of_batch(row)
    assert states[..., 0].tolist()[0] == [1.0, 2.0]
    assert states[1, 0, 0] == 1.0
    (states[0].sum() + 10 * states[1, 0].sum()).backward()
    assert row.grad[0, :, 0].tolist() == [11.0, 1.0]


def test_the_kernel_of_a_cpu():
    assert kernel_for(torch.device("cpu")) == ("SDPA by segments", None)
