"""OpenRLHF's log-probabilities and our loss on the batch that every host gets."""

from __future__ import annotations

from types import SimpleNamespace

import one_batch
import pytest
import torch

from focalpo_plugins import focalpo_loss
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


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    "options",
    [{}, {"gamma": 1.0, "variant": "incorrect"}, {"gamma": 0.5, "variant": "correct_exact"}],
    ids=str,
)
def test_losses_and_gradients(forward_only, actors, options: dict, label_smoothing: float):
    """As in Axolotl's test of the same name: padded together, and each pair by itself."""
    seen: list[torch.Tensor] = []

    class Watched(PairwiseDPOLoss):
        def loss_of(self, margins: torch.Tensor):
            seen.append(margins)
            return super().loss_of(margins)

    loss_fn = Watched(one_batch.BETA, label_smoothing, **options)

    def slopes_of(logps: list[torch.Tensor]) -> torch.Tensor:
        """The gradient of the margins: beta times the chosen log-probability is part of them."""
        torch.testing.assert_close(logps[0].grad, -logps[1].grad, rtol=0, atol=0)
        return logps[0].grad.double() / one_batch.BETA

    z = torch.tensor(one_batch.MARGINS, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(one_batch.truth(), z.detach(), rtol=0, atol=1e-9)
    losses = focalpo_loss(z, **options, label_smoothing=label_smoothing)
    (slopes,) = torch.autograd.grad(losses.sum(), z)

    near = {"rtol": 0, "atol": 2e-5}
    logps = log_probs(forward_only, actors, [0, 1, 2, 3])
    whole = loss_fn(*logps)[0]
    whole.backward()
    torch.testing.assert_close(whole.double(), losses.mean(), **near)
    torch.testing.assert_close(seen[0].double(), z, **near)
    torch.testing.assert_close(slopes_of(logps) * 4, slopes, **near)
    for row in range(4):
        logps = log_probs(forward_only, actors, [row])
        one = loss_fn(*logps)[0]
        one.backward()
        torch.testing.assert_close(one.double(), losses[row], **near)
        torch.testing.assert_close(slopes_of(logps), slopes[row : row + 1], **near)
