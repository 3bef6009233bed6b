"""What a pairwise loss does to the pairs ranked right and wrong, as numbers for a host's log."""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import BoundLoss

#: The places of the sums of margins; these are finite only if every margin is.
MARGINS = slice(4, 7, 2)


def margin_sums(margins: Tensor, loss: BoundLoss, tokens: tuple[int, int] = (0, 0)) -> Tensor:
    """Sums over a batch of reward margins ``(B,)`` that :func:`means` turns into means.

    Sums can be added over steps and ranks, so every pair has the same weight in any split of the
    batch.

    Args:
        tokens: with shared prompts, the numbers of tokens computed and of the padded batch.

    Returns:
        ``(10,)``, float64 if the device has it: pairs; sum of p; sum of weights; pairs ranked
        right; sum of their margins; pairs ranked wrong; sum of their margins; pairs past ``z*``;
        both of ``tokens``.
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
            *margins.new_tensor(tokens),
        ]
    )


def means(sums: Tensor, loss: BoundLoss, steps: int = 1) -> dict[str, float]:
    """The diagnostics of the pairs summed in ``sums`` ``(10,)``, by the name they are logged under.

    ==========================  =================================================================
    ``NAME/p``                  mean preference probability, sigmoid of the margin
    ``NAME/weight``             mean of the factor on DPO's gradient
    ``NAME/margin_correct``     mean margin of the pairs now ranked right (margin above 0)
    ``NAME/margin_incorrect``   mean margin of the others
    ``NAME/reversed``           share of pairs that the loss pushes the wrong way (past ``z*``)
    ``NAME/tokens``             with shared prompts, tokens that the policy computes in a step
    ``NAME/tokens_saved``       with shared prompts, share of the padded batch not computed
    ==========================  =================================================================

    A mean over no pairs is left out.

    Args:
        steps: number of steps that the sums cover.
    """
    n, p, weight, n_right, right, n_wrong, wrong, n_reversed, tokens, places = sums.tolist()
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
    if places:
        found["tokens"] = tokens / steps
        found["tokens_saved"] = 1 - tokens / places
    return {f"{loss.name}/{key}": value for key, value in found.items()}
