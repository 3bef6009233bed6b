"""The loss with the interface of OpenRLHF's loss, against numbers by hand and OpenRLHF's own
``DPOLoss``."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from focalpo_plugins.openrlhf import PairwiseDPOLoss

pytestmark = [pytest.mark.releases, pytest.mark.xdist_group("in one process")]

LN2, LN3 = math.log(2), math.log(3)


def four_logps(dtype: torch.dtype = torch.float32, count: int = 64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        (-50 + 20 * torch.randn(count, generator=generator, dtype=torch.float64)).to(dtype)
        for _ in range(4)
    ]


def test_by_hand():
    """Two pairs, beta 1/2.

    First: policy -2 and -5, reference -4 and -4, so z = 1/2 * (3 - 0) = 3/2 for the margin and the
    rewards are 1/2 * 2 = 1 and 1/2 * -1 = -1/2.  Second: the policy is the reference, z = 0.
    With gamma 1 the loss is -p log p: at z = 3/2, p = 0.8175745 and -log p = 0.2014133, product
    0.1646703; at z = 0, 1/2 ln 2 = 0.3465736; mean 0.2556219.
    """
    tensors = (
        torch.tensor(x, dtype=torch.float64) for x in ([-2, -7], [-5, -9], [-4, -7], [-4, -9])
    )
    loss, chosen, rejected = PairwiseDPOLoss(0.5, gamma=1.0)(*tensors)
    assert loss.item() == pytest.approx(0.2556219, abs=1e-7)
    assert chosen.tolist() == [1, 0]
    assert rejected.tolist() == [-0.5, 0]


def test_label_smoothing_by_hand():
    """At z = ln 3 with gamma 1: L(z) = 3/4 ln(4/3), L(-z) = 1/4 ln 4, mixed 0.9 to 0.1."""
    tensors = (torch.tensor([x], dtype=torch.float64) for x in (LN3, 0.0, 0.0, 0.0))
    loss, _, _ = PairwiseDPOLoss(1.0, 0.1, gamma=1.0)(*tensors)
    expected = 0.9 * 0.75 * math.log(4 / 3) + 0.1 * 0.25 * math.log(4)
    assert loss.item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("label_smoothing", (0.0, 0.1))
def test_gamma_zero_is_openrlhfs_own_to_the_last_bit(
    openrlhf: SimpleNamespace, label_smoothing: float, dtype: torch.dtype
):
    """Loss, rewards and gradients, also with label smoothing: OpenRLHF multiplies by beta in each
    of the two terms, and one rounding less would make a run end differently."""
    results = []
    for loss_fn in (
        openrlhf.DPOLoss(0.1, label_smoothing, False),
        PairwiseDPOLoss(0.1, label_smoothing, False, gamma=0.0),
    ):
        tensors = [tensor.requires_grad_() for tensor in four_logps(dtype)]
        loss, chosen, rejected = loss_fn(*tensors)
        loss.backward()
        results.append([loss.detach(), chosen, rejected, *(tensor.grad for tensor in tensors)])
    for own, ours in zip(*results, strict=True):
        assert own.dtype == ours.dtype
        assert torch.equal(own, ours)


def test_rewards_are_openrlhfs_own_and_detached(openrlhf: SimpleNamespace):
    tensors = [tensor.requires_grad_() for tensor in four_logps()]
    own, ours = openrlhf.DPOLoss(0.1)(*tensors), PairwiseDPOLoss(0.1)(*tensors)
    for rewards, expected in zip(ours[1:], own[1:], strict=True):
        assert torch.equal(rewards, expected)
        assert not rewards.requires_grad
    assert not torch.equal(ours[0], own[0])


def test_a_trainer_chooses_the_loss_by_the_margins():
    """The margins are (-2 - -5) - (-4 - -4) = 3 and (-7 - -9) - (-7 - -9) = 0, times 0.5."""
    seen: list[list[float]] = []

    class Chosen(PairwiseDPOLoss):
        def loss_of(self, margins: torch.Tensor):
            seen.append(margins.tolist())
            return lambda signed: signed - 1

    losses = Chosen(0.5)(
        *(torch.tensor(x) for x in ([-2.0, -7], [-5.0, -9], [-4.0, -7], [-4.0, -9]))
    )
    assert seen == [[1.5, 0.0]]
    assert losses[0].item() == (1.5 - 1 + 0.0 - 1) / 2


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((0.0,), {}, "beta must be a finite number above 0, got 0.0"),
        ((0.1, 0.5), {}, "label_smoothing must be at least 0 and below 0.5, got 0.5"),
        ((0.1, 0.0, True), {}, "ipo must be false with the loss 'focalpo', got True"),
        ((0.1,), {"gamma": -1.0}, "gamma must be a finite number of at least 0, got -1.0"),
        (
            (0.1,),
            {"gama": 1.0},
            "gama is not an option of the loss 'focalpo'; did you mean 'gamma'?",
        ),
        (
            (0.1,),
            {"loss": "focalp"},
            "loss must be one of focalpo, got 'focalp'; did you mean 'focalpo'?",
        ),
    ],
)
def test_refusals(arguments: tuple, options: dict, message: str):
    with pytest.raises(ValueError) as error:
        PairwiseDPOLoss(*arguments, **options)
    assert str(error.value).startswith(message)
