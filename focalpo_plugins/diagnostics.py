"""What a pairwise loss does to the pairs ranked right and wrong, as numbers for a host's log."""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import BoundLoss

#: The places of the sums of margins; these are finite only if every margin is.
MARGINS = slice(4, 7, 2)


def margin_sums(margins: Tensor, loss: BoundLoss) -> Tensor:
    """Sums over a batch of reward margins ``(B,)`` that :func:`means` turns into means.

    Sums can be added over steps and ranks, so every pair has the same weight in any split of the
    batch.

    Returns:
        ``(8,)``, float64 if the device has it: pairs; sum of p; sum of weights; pairs ranked right;
        sum of their margins; pairs ranked wrong; sum of their margins; pairs past ``z*``.
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


def of_ranks(tokens: Tensor, places: Tensor) -> Tensor:
    """What :func:`means` needs of the tokens that all ranks computed at a time.

    The sums of several batches can be added, as those of :func:`margin_sums`.

    Args:
        tokens: the number of tokens that each rank computed ``(R,)``; 0 if it isn't known.
        places: with shared prompts, the number of tokens of all ranks' padded batches; else 0.

    Returns:
        ``(3,)``: tokens computed; with several ranks, the tokens that they would have computed if
        none had waited for the one with the most; ``places``.
    """
    room = tokens.amax() * len(tokens) * (len(tokens) > 1)
    return torch.stack([tokens.sum(), room, places])


def means(
    sums: Tensor, loss: BoundLoss, steps: int = 1, tokens: Tensor | None = None
) -> dict[str, float]:
    """The diagnostics of the pairs summed in ``sums``, by the name they are logged under.

    ==========================  =================================================================
    ``NAME/p``                  mean preference probability, sigmoid of the margin
    ``NAME/weight``             mean of the factor on DPO's gradient
    ``NAME/margin_correct``     mean margin of the pairs now ranked right (margin above 0)
    ``NAME/margin_incorrect``   mean margin of the others
    ``NAME/reversed``           share of pairs that the loss pushes the wrong way (past ``z*``)
    ``NAME/tokens``             tokens that the policy computes in a step
    ``NAME/tokens_saved``       with shared prompts, share of the padded batch not computed
    ``NAME/idle``               share of a step's tokens that ranks wait for, if there are several
    ==========================  =================================================================

    A mean over no pairs is left out.  The last three are logged with shared prompts and with
    balanced batches.

    Args:
        sums: the sums of :func:`margin_sums`.
        steps: number of steps that the sums cover.
        tokens: the sums of :func:`of_ranks`, if there are any.
    """
    n, p, weight, n_right, right, n_wrong, wrong, n_reversed = sums.tolist()
    computed, room, places = (0, 0, 0) if tokens is None else tokens.tolist()
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
    if computed:
        found["tokens"] = computed / steps
    if places:
        found["tokens_saved"] = 1 - computed / places
    if room:
        found["idle"] = 1 - computed / room
    return {f"{loss.name}/{key}": value for key, value in found.items()}
