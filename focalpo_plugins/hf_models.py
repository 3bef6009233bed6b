"""Weights of transformers models: whether two models share them, and gathering sharded ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

# Elements of a weight that are compared.
_COMPARED = 1024


def same_weights(policy: Any, reference: Any) -> bool:
    """Whether both are known to start with the same weights.

    They are known to if the host makes the reference from the policy, if it loads both from one
    place, or if two models are equal.  Two models from one place may differ: the policy may hold an
    adapter, or have one merged into it.

    Args:
        policy: a model, or its folder or hub name.
        reference: the same; None if the host makes it from the policy.
    """
    if reference is None:
        return True
    weights = [
        {} if isinstance(model, str) else dict(model.named_parameters())
        for model in (policy, reference)
    ]
    # Under ZeRO-3 the parameters themselves are empty.
    if not all(any(weight.numel() for weight in of.values()) for of in weights):
        places = [
            model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
            for model in (policy, reference)
        ]
        return bool(places[0]) and places[0] == places[1]
    ours, theirs = weights
    return ours.keys() == theirs.keys() and all(_alike(ours[name], theirs[name]) for name in ours)


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, by the numbers at their start."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    few = [weight.detach().flatten()[:_COMPARED].cpu() for weight in (one, other)]
    return few[0].equal(few[1])


@contextmanager
def gathered(*parameters: Tensor | None) -> Iterator[None]:
    """Inside, the parameters are in one piece, even if DeepSpeed's ZeRO-3 has them in parts."""
    # By identity: a tied or shared parameter comes twice, and DeepSpeed accepts each only once.
    parts = {
        id(p): p
        for p in parameters
        if getattr(getattr(p, "ds_status", None), "name", "AVAILABLE") != "AVAILABLE"
    }
    if not parts:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parts.values())):
        yield
