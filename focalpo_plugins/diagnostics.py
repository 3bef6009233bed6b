"""What a pairwise loss does to the pairs ranked right and wrong, as numbers for a host's log."""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import BoundLoss

#: Where the sums of margins are, which are finite only if every margin is.
MARGINS = slice(4, 7, 2)


def margin_sums(margins: Tensor, loss: BoundLoss) -> Tensor:
    """Sums over a batch of reward margins ``(B,)`` that :func:`means` turns into means.

    Sums add up over steps and ranks, so that every pair counts alike however the batch was split.

    Returns:
        ``(8,)``, float64 where the device has it: pairs; sum of p; sum of weights; pairs ranked
        right; sum of their margins; pairs ranked wrong; sum of their margins; pairs past ``z*``.
    """
    margins = margins.detach()
    margins = margins.float() if margins.device.type == "mps" else margins.double()
    weights = loss.weight(margins)
    if weights is None:
        weights = torch.full_like(margins, torch.nan)
    # As in the hosts' accuracy, a margin of exactly 0 is not ranked right.
    right = margins > 0
    return torch.stack(
        [
            torch.ones_like(margins).sum(),
            margins.sigmoid().sum(),
            weights.sum(),
            right.sum(),
            margins[right].sum(),
            (~right).sum(),
            margins[~right].sum(),
            (weights < 0).sum(),
        ]
    )


def means(sums: Tensor, loss: BoundLoss) -> dict[str, float]:
    """The diagnostics of the pairs summed in ``sums`` ``(8,)``, by the name they are logged under.

    ==========================  =================================================================
    ``NAME/p``                  mean preference probability, sigmoid of the margin
    ``NAME/weight``             mean of what DPO's gradient is multiplied by
    ``NAME/margin_correct``     mean margin of the pairs now ranked right (margin above 0)
    ``NAME/margin_incorrect``   mean margin of the others
    ``NAME/reversed``           share of pairs that the loss pushes the wrong way (past ``z*``)
    ==========================  =================================================================

    A mean over no pairs is left out.
    """
    n, p, weight, n_right, right, n_wrong, wrong, n_reversed = sums.tolist()
    found = {}
    if n:
        found["p"] = p / n
        if loss.source.weight is not None:
            found["weight"] = weight / n
            found["reversed"] = n_reversed / n
    if n_right:
        found["margin_correct"] = right / n_right
    if n_wrong:
        found["margin_incorrect"] = wrong / n_wrong
    return {f"{loss.name}/{key}": value for key, value in found.items()}
