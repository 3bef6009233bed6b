"""OpenRLHF's log-probabilities and our loss on the batch that every host gets."""

from __future__ import annotations

from types import SimpleNamespace

import one_batch
import pytest
import torch

from focalpo_plugins.openrlhf import PairwiseDPOLoss

pytestmark = pytest.mark.xdist_group("in one process")


@pytest.fixture(scope="module")
def actors(openrlhf: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> list:
    """Policy and reference as OpenRLHF loads them, then in float64, so that the only rounding is
    that of OpenRLHF's own float32 log-probabilities."""
    found = []
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp("model")
        one_batch.model(seed).save_pretrained(folder)
        actor = openrlhf.Actor(str(folder), attn_implementation="eager", param_dtype="bf16")
        found.append(actor.double().eval())
    return found


def log_probs(forward_only, actors: list, rows: list[int]) -> list[torch.Tensor]:
    """The rows through OpenRLHF: chosen and rejected under the policy, then under the reference."""
    batch, prompts = one_batch.padded(rows)
    found = []
    for actor in actors:
        with torch.no_grad():
            forward = forward_only.concatenated_forward(actor, *batch, prompts)
        found += [logps.requires_grad_() for logps in forward[:2]]
    return found


@one_batch.LOSSES
def test_losses_and_gradients(forward_only, actors, options: dict, label_smoothing: float):
    seen: list[torch.Tensor] = []

    class Watched(PairwiseDPOLoss):
        def loss_of(self, margins: torch.Tensor):
            seen.append(margins)
            return super().loss_of(margins)

    loss_fn = Watched(one_batch.BETA, label_smoothing, **options)

    def step(rows: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gradient of the margins: beta times the chosen log-probability is part of them."""
        logps = log_probs(forward_only, actors, rows)
        loss = loss_fn(*logps)[0]
        loss.backward()
        torch.testing.assert_close(logps[0].grad, -logps[1].grad, rtol=0, atol=0)
        return loss, seen[-1], logps[0].grad.double() / one_batch.BETA

    one_batch.check_losses_and_gradients(step, options, label_smoothing)
