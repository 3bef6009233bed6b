"""The first step of a run whose policy starts as its reference: every margin is 0, or the reference
is another than was meant."""

from __future__ import annotations

from .messages import say

#: Nats by which rounding explains that two log-probs of a sequence differ: in float32, and below.
ROUNDING = (0.01, 1.0)


def check_first_margins(largest: float, beta: float, narrow: bool) -> None:
    """Say the largest margin of the first step, and warn where it is beyond rounding.

    To be called on one rank, where nothing but rounding can make a margin.

    Args:
        largest: absolute reward margin of any pair on any rank.
        beta: that the margins were multiplied by.
        narrow: whether the model computes in 16 bits.
    """
    nats = largest / beta
    if nats <= ROUNDING[narrow]:
        say(f"first step: policy and reference agree, largest margin {largest:.2g}.")
        return
    say(
        "warning: at the first step every margin should be 0, as the policy starts as its "
        f"reference, got {largest:.2g} at most, {nats:.2g} nats. Look for another reference than "
        "was meant, weights that were changed after they were loaded, an adapter that does not "
        "start at 0, dropout, a wrong attention mask, or packing without an attention for it."
    )
