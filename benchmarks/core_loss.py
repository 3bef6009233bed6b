"""The loss by itself, forward and backward, against DPO's and against the formula as written."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from measure import DEVICE, Result, compare, in_turns, seconds
from torch import Tensor

from focalpo_plugins import focalpo_loss
from focalpo_plugins.diagnostics import margin_sums
from focalpo_plugins.registry import get_loss

GAMMA = 0.05
PAIRS = (2, 8, 32, 128, 10_000, 1_000_000)


def dpo(z: Tensor) -> Tensor:
    return -F.logsigmoid(z)


def naive(z: Tensor) -> Tensor:
    p = z.sigmoid()
    return -(p**GAMMA * p.log())


def forward_and_backward(loss: Callable[[Tensor], Tensor], z: Tensor) -> None:
    z.grad = None
    loss(z).sum().backward()


def saved_bytes(loss: Callable[[Tensor], Tensor], z: Tensor) -> int:
    """Bytes that the graph of the loss keeps for its backward, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = loss(z)
    del losses
    return sum(kept.values())


def of_micro_batch(rounds: int) -> Result:
    """The loss of 16 pairs, and the sums that are logged of them."""
    z, loss = torch.randn(16, device=DEVICE, requires_grad=True), get_loss("focalpo").bind()

    def ours() -> None:
        forward_and_backward(focalpo_loss, z)
        margin_sums(z.detach(), loss)

    works = [ours, functools.partial(forward_and_backward, dpo, z)]
    times = in_turns(*(functools.partial(seconds, work, 2000) for work in works), rounds)
    both = [[1e6 * s for s in side] for side in times]
    return compare(
        "loss", "with what is logged, 16 pairs", "time", "us", *both, against="-logsigmoid"
    )


def measure(rounds: int) -> Iterator[Result]:
    torch.manual_seed(0)
    yield of_micro_batch(rounds)
    for dtype in (torch.float32, torch.bfloat16):
        for pairs in PAIRS:
            z = torch.randn(pairs, device=DEVICE, dtype=dtype, requires_grad=True)
            losses = {"ours": focalpo_loss, "-logsigmoid": dpo, "naive": naive}
            kinds = {"eager": losses}
            if pairs == 1_000_000:
                torch.compiler.reset()
                kinds["compiled"] = {k: torch.compile(v) for k, v in losses.items()}
            for kind, of_kind in kinds.items():
                works = {
                    k: functools.partial(forward_and_backward, v, z) for k, v in of_kind.items()
                }
                for work in works.values():
                    for _ in range(3):
                        work()
                repeats = max(3, 30_000 // pairs) if pairs < 1_000_000 else 3
                times = {k: functools.partial(seconds, w, repeats) for k, w in works.items()}
                case = f"{kind}, {str(dtype)[6:]}, {pairs} pairs"
                for against in ("-logsigmoid", "naive"):
                    ours, theirs = in_turns(times["ours"], times[against], rounds)
                    both = [[1e6 * s for s in side] for side in (ours, theirs)]
                    yield compare("loss", case, "time", "us", *both, against=against)
            case = f"eager, {str(dtype)[6:]}, {pairs} pairs"
            for against in ("-logsigmoid", "naive"):
                kept = [[float(saved_bytes(losses[k], z))] for k in ("ours", against)]
                yield compare("loss", case, "saved for backward", "bytes", *kept, against=against)
