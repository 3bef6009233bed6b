"""Reward margins that are not finite: the pair's loss and all later weights would be NaN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from torch import Tensor

from ..errors import NotFinite


def not_finite(margins: Tensor, rank: int) -> str:
    """Text on a rank's reward margins ``(B,)`` that are NaN or infinite; empty if none is."""
    bad = (~margins.isfinite()).nonzero().flatten().tolist()
    if not bad:
        return ""
    rows = f"row{'s' * (len(bad) > 1)} {', '.join(map(str, bad[:8]))}{', ...' * (len(bad) > 8)}"
    values = sorted({str(value) for value in margins[bad].tolist()})
    dtype = str(margins.dtype).removeprefix("torch.")
    return f"rank {rank}, {rows} of {len(margins)} ({', '.join(values)}, {dtype})"


def stop(loss: str, when: str, where: Sequence[str]) -> NoReturn:
    """Raise an error with the margins that :func:`not_finite` found on any rank.

    Raises:
        FloatingPointError: always; the loss of such a pair, and all weights after it, would be NaN.
    """
    raise NotFinite(
        f"{loss}: reward margins are not finite, {when}: {'; '.join(where)}. The host's "
        "log-probabilities of the policy or of the reference are NaN or infinite there. Look at "
        "those pairs and at the weights; lower the learning rate, or train in bf16 or fp32 if it "
        "is fp16. The last checkpoint was saved earlier."
    )
