"""The logged means, against batches worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from focalpo_plugins.diagnostics import margin_sums, means, of_ranks
from focalpo_plugins.registry import BoundLoss, PairwiseLoss, get_loss

LN3 = math.log(3)


def gamma_one() -> BoundLoss:
    return get_loss("focalpo").bind(gamma=1.0)


def test_means_by_hand():
    """Margins ln 3, 0, -ln 3: p is 3/4, 1/2, 1/4, with mean 1/2.

    The weight at gamma 1 is p (1 + ln p): 3/4 (1 - 0.287682) = 0.534238,
    1/2 (1 - 0.693147) = 0.153426, 1/4 (1 - 1.386294) = -0.096574; their mean is 0.197030 and one
    of three is negative (z* is -0.54).  One pair is ranked right, with margin ln 3; two are not,
    with mean margin -ln 3 / 2.
    """
    margins = torch.tensor([LN3, 0.0, -LN3], requires_grad=True)
    found = means(margin_sums(margins, gamma_one()), gamma_one())
    assert found == pytest.approx(
        {
            "focalpo/p": 0.5,
            "focalpo/weight": 0.197030,
            "focalpo/reversed": 1 / 3,
            "focalpo/margin_correct": LN3,
            "focalpo/margin_incorrect": -LN3 / 2,
        },
        abs=1e-6,
    )


def test_every_pair_counts_alike_however_the_batch_is_split():
    margins = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 5
    whole = margin_sums(margins, gamma_one())
    parts = sum(margin_sums(part, gamma_one()) for part in margins.split([1, 30, 3, 30]))
    torch.testing.assert_close(parts, whole, rtol=1e-14, atol=0)


def test_a_mean_over_no_pairs_is_left_out():
    found = means(margin_sums(torch.tensor([1.0, 2.0]), gamma_one()), gamma_one())
    assert "focalpo/margin_incorrect" not in found
    assert found["focalpo/margin_correct"] == 1.5


def test_a_loss_without_a_weight():
    hinge = PairwiseLoss("hinge", lambda margins: torch.relu(1 - margins)).bind()
    found = means(margin_sums(torch.tensor([0.0]), hinge), hinge)
    assert found == {"hinge/p": 0.5, "hinge/margin_incorrect": 0.0}


def test_tokens_of_a_step():
    """3 of 4 places in one batch and 5 of 12 in another, over two steps: 4 a step, and half saved.

    One rank waits for none.
    """
    loss = gamma_one()
    sums = margin_sums(torch.tensor([LN3]), loss)
    batches = [
        of_ranks(torch.tensor([tokens]), torch.tensor(of)) for tokens, of in ((3, 4), (5, 12))
    ]
    found = means(sums, loss, 2, sum(batches))
    assert (found["focalpo/tokens"], found["focalpo/tokens_saved"]) == (4, 0.5)
    assert "focalpo/idle" not in found
    assert "focalpo/tokens" not in means(sums, loss)


def test_ranks_wait_for_the_one_with_the_most_tokens():
    """Two ranks with 6 and 2 tokens, then with 4 and 4: 16 of ``2 * 6 + 2 * 4`` = 20, 20 % idle.
    Without shared prompts there is no padded batch to compare with."""
    loss = gamma_one()
    batches = [of_ranks(torch.tensor(tokens), torch.tensor(0)) for tokens in ([6, 2], [4, 4])]
    found = means(margin_sums(torch.tensor([LN3]), loss), loss, 1, sum(batches))
    assert found["focalpo/idle"] == pytest.approx(0.2)
    assert found["focalpo/tokens"] == 16
    assert "focalpo/tokens_saved" not in found
