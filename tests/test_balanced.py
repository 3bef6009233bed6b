"""Balanced batches without a host: which pairs each micro-batch gets.

Expected values derived by hand
-------------------------------
Two ranks, two pairs each, two micro-steps: rows 0 to 7 with 1, 8, 2, 7, 3, 6, 4, 5 tokens.

*Padded.*  By length the rows are 1, 3, 5, 7, 6, 4, 2, 0 (8, 7, 6, 5, 4, 3, 2, 1 tokens).  The first
micro-step gets batches {1, 3} and {5, 7}, the second {6, 4} and {2, 0}.  In a micro-step the batch
with the smaller row comes first, as it was drawn: 1, 3, 5, 7, then 2, 0, 6, 4.  As drawn, the
critical path is ``4 * (8 + 6) = 56`` (longest of {0, 1, 2, 3} and of {4, 5, 6, 7}, four sequences a
batch), and dealt ``4 * (8 + 4) = 48``.

*Unpadded.*  The four batches take 8, 7, 6, 5 and then, to the emptiest with a place, 4 to
the batch of 5, 3 to that of 6, 2 to that of 7, 1 to that of 8: all sums are 9.

*Unpadded but for the output layer.*  Inside the first micro-step (8, 7, 6, 5) batches {8, 5} and {7, 6}, 13 each; in the
second (4, 3, 2, 1) {4, 1} and {3, 2}, 5 each: 13 + 5 = 18, as 9 + 9 is.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from focalpo_plugins.balanced import BalancedSampler, Geometry, check_loss, critical_path, deal
from focalpo_plugins.registry import PairwiseLoss, get_loss

TOKENS = [1, 8, 2, 7, 3, 6, 4, 5]
TWO = Geometry(ranks=2, each=2, accumulation=2)
COSTS = ["padded", "unpadded_backbone", "unpadded"]


def test_padded_batches_by_hand():
    dealt = deal(range(8), TOKENS, TWO, "padded")
    assert dealt == [1, 3, 5, 7, 2, 0, 6, 4]
    assert critical_path(range(8), TOKENS, TWO, "padded") == (56, 32)
    assert critical_path(dealt, TOKENS, TWO, "padded") == (48, 32)
    sampler = BalancedSampler(range(8), TOKENS, TWO, "padded")
    assert list(sampler) == dealt
    assert (sampler.dealt.plain, sampler.dealt.path) == (56, 48)
    as_drawn = deal(range(8), TOKENS, TWO, "padded", largest_first=False)
    assert as_drawn == [2, 0, 6, 4, 1, 3, 5, 7]


@pytest.mark.parametrize(
    ("cost", "sums"), [("unpadded", (9, 9, 9, 9)), ("unpadded_backbone", (13, 13, 5, 5))]
)
def test_unpadded_batches_by_hand(cost, sums):
    dealt = deal(range(8), TOKENS, TWO, cost)
    assert tuple(sum(TOKENS[row] for row in dealt[at : at + 2]) for at in (0, 2, 4, 6)) == sums
    assert critical_path(dealt, TOKENS, TWO, cost) == (18, max(sums))


geometries = st.builds(Geometry, st.integers(1, 5), st.integers(1, 4), st.integers(1, 5))


@settings(deadline=None)
@given(geometries, st.lists(st.integers(1, 500), min_size=1, max_size=90), st.sampled_from(COSTS))
def test_no_pair_leaves_its_step(geometry, tokens, cost):
    """It also keeps the batches that aren't full, whose pairs have another weight."""
    order = list(range(len(tokens)))[::-1]
    dealt = list(BalancedSampler(order, tokens, geometry, cost))
    for start in range(0, len(order), geometry.step):
        step = slice(start, start + geometry.step)
        assert Counter(dealt[step]) == Counter(order[step])
        whole = len(order[step]) // geometry.micro_step * geometry.micro_step
        assert dealt[step][whole:] == order[step][whole:]


@settings(deadline=None)
@given(geometries, st.lists(st.integers(1, 500), min_size=1, max_size=90), st.sampled_from(COSTS))
def test_the_largest_micro_batch_is_in_the_first_micro_step(geometry, tokens, cost):
    dealt = list(BalancedSampler(range(len(tokens)), tokens, geometry, cost))
    for start in range(0, len(dealt) // geometry.micro_step * geometry.micro_step, geometry.step):
        step = dealt[start : start + geometry.step]
        first = critical_path(step[: geometry.micro_step], tokens, geometry, cost)[1]
        assert first == critical_path(step, tokens, geometry, cost)[1]


def test_a_loss_that_depends_on_its_batch():
    """Centred on the batch's mean margin, a pair's loss differs between batches."""
    check_loss(get_loss("focalpo").bind(gamma=0.5, gamma_end=0.0), "focalpo_balanced_batches")
    centred = PairwiseLoss("centred", lambda z: -torch.nn.functional.logsigmoid(z - z.mean()))
    with pytest.raises(ValueError, match="the other pairs of the batch") as refused:
        check_loss(centred.bind(), "focalpo_balanced_batches")
    assert "focalpo_balanced_batches" in str(refused.value)
    assert "'centred'" in str(refused.value)
