"""Checks the first step of a run whose policy starts as its reference.

If a margin is not 0, something is wrong: for example, the reference is not the intended one.
"""

from __future__ import annotations

from .messages import say

#: Largest difference of two log-probs of a sequence that rounding explains, in nats: in float32,
#: and below float32.
ROUNDING = (0.01, 1.0)


def check_first_margins(largest: float, beta: float, narrow: bool) -> None:
    """Print the largest margin of the first step, and warn if rounding can't explain it.

    Call it on one rank only, and only if nothing but rounding can make a margin.

    Args:
        largest: largest absolute reward margin of all pairs on all ranks.
        beta: the factor in the margins.
        narrow: whether the model computes in 16 bits.
    """
    nats = largest / beta
    if nats <= ROUNDING[narrow]:
        say(f"first step: policy and reference agree, largest margin {largest:.2g}.")
        return
    say(
        "warning: at the first step every margin should be 0, as the policy starts as its "
        f"reference, got {largest:.2g} at most, {nats:.2g} nats. Look for a reference other than "
        "the intended one, weights that were changed after they were loaded, an adapter that does "
        "not start at 0, dropout, NEFTune's noise, a wrong attention mask, or packing without an "
        "attention for it."
    )
