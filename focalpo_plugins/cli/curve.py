"""The curve of one loss: its values, its gradient, and the points of it that mean something."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..loss import check_gamma, focalpo_loss, reversal_margin


@dataclass(frozen=True)
class Curve:
    """One loss as a function of the margin; ``gamma`` 0 is DPO."""

    variant: str
    gamma: float

    @property
    def label(self) -> str:
        if self.gamma == 0:
            return "DPO"
        factor = {
            "correct": r"$p^{\gamma}$",
            "correct_exact": r"$(1-p)^{-\gamma}$",
            "incorrect": r"$(1-p)^{\gamma}$",
        }[self.variant]
        return rf"{factor}, $\gamma$ = {self.gamma:g}"

    @property
    def column(self) -> str:
        """For the header of a CSV."""
        return "dpo" if self.gamma == 0 else f"{self.variant}_gamma_{self.gamma:g}"

    def loss(self, z: Tensor) -> Tensor:
        return focalpo_loss(z, self.gamma, self.variant, allow_reversed=True)

    def push(self, z: Tensor) -> Tensor:
        """``-dL/dz``: how strongly a pair at margin ``z`` is pushed to the right order."""
        z = z.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.loss(z).sum(), z)
        return -slope

    def peak(self) -> tuple[float, float] | None:
        """Margin and height of the largest push; None if it grows without a peak, as DPO's."""
        low, high = -80.0, 80.0
        for _ in range(4):  # each round searches closer around the last result
            z = torch.linspace(low, high, 4001, dtype=torch.float64)
            push = self.push(z)
            top = int(push.argmax())
            if top in (0, len(z) - 1) or push[top] - max(push[0], push[-1]) < 1e-12:
                return None
            low, high = float(z[top - 1]), float(z[top + 1])
            if high - low < 1e-6:
                break
        return float(z[top]), float(push[top])

    def reversal(self) -> float:
        return reversal_margin(self.gamma, self.variant)

    def refused(self) -> str:
        """Why training refuses this gamma; empty if it doesn't."""
        try:
            check_gamma(self.gamma, self.variant)
        except ValueError as error:
            return str(error)
        return ""

    def summary(self) -> str:
        """The curve's row in the table that ``focalpo curves`` prints."""
        zero = torch.zeros(1, dtype=torch.float64)
        peak, reversal = self.peak(), self.reversal()
        name = "dpo" if self.gamma == 0 else f"{self.variant} gamma={self.gamma:g}"
        at, height = (f"{peak[0]:.2f}", f"{peak[1]:.4f}") if peak else ("none", "")
        star = f"{reversal:.2f}" if reversal > -math.inf else "none"
        refused = "  refused in training" * bool(self.refused())
        return (
            f"{name:<28} {self.loss(zero).item():>8.4f} {self.push(zero).item():>10.4f} {at:>10} "
            f"{height:>8} {star:>9}{refused}"
        )
