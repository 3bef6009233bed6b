"""OpenRLHF's way from tokens to log-probabilities, with our loss at its end, against the core alone.

The expected values start from the logits of two models, and from there on are computed here, in
float64: log-softmax, the answer's tokens, sum, margin, loss.  The models compute in float64, so
that what OpenRLHF rounds is what its own float32 log-probabilities round.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from focalpo_plugins import focalpo_loss
from focalpo_plugins.openrlhf import PairwiseDPOLoss

pytestmark = pytest.mark.xdist_group("in one process")

BETA = 0.5
OPTIONS = [
    {"gamma": 0.05},
    {"gamma": 1.0, "variant": "incorrect"},
    {"gamma": 0.5, "variant": "correct_exact"},
    {"gamma": 0.05, "label_smoothing": 0.1},
]


@pytest.fixture(scope="module")
def models(openrlhf: SimpleNamespace, tiny: Path) -> tuple:
    """OpenRLHF's actor on the tiny model with noise on its weights, as policy, and without."""
    policy, reference = (
        openrlhf.Actor(str(tiny / "model"), attn_implementation="eager", param_dtype="bf16")
        for _ in range(2)
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += (0.2 * parameter.float().std() * noise).to(parameter.dtype)
    return policy.double().eval(), reference.double().eval()


@pytest.fixture(scope="module")
def trainer(openrlhf: SimpleNamespace, tiny: Path):
    """OpenRLHF's trainer, with only the parts that compute log-probabilities."""
    from transformers import AutoTokenizer

    trainer = object.__new__(openrlhf.DPOTrainer)
    trainer.tokenizer = AutoTokenizer.from_pretrained(tiny / "model", padding_side="right")
    trainer.strategy = SimpleNamespace(ring_attn_group=None)
    return trainer


@pytest.fixture(scope="module")
def dataset(openrlhf: SimpleNamespace, trainer, few: Path):
    from datasets import load_dataset

    keys = {"prompt_key": None, "chosen_key": "chosen", "rejected_key": "rejected"}
    data = SimpleNamespace(**keys, apply_chat_template=True)
    rows = load_dataset("json", data_files=str(few / "train.jsonl"), split="train[:8]")
    strategy = SimpleNamespace(args=SimpleNamespace(data=data))
    return openrlhf.RewardDataset(
        rows, trainer.tokenizer, 128, strategy, is_dpo=True, num_processors=1
    )


@pytest.fixture(scope="module")
def batches(dataset) -> dict[str, tuple]:
    """Pairs of eight lengths in one batch, and a batch without padding whose rejected answer is the
    chosen one backwards."""
    padded = dataset.collate_fn([dataset[row] for row in range(len(dataset))])
    masks = torch.cat([padded[1], padded[3]]) if padded[1].shape == padded[3].shape else None
    assert masks is None or not masks.all(), "no row is padded"
    ids, mask, _, _, prompt_len = dataset[0]
    backwards = ids.clone()
    backwards[0, prompt_len:-1] = ids[0, prompt_len:-1].flip(0)
    unpadded = dataset.collate_fn([(ids, mask, backwards, mask, prompt_len)])
    assert unpadded[1].all() and unpadded[3].all()
    return {"padded": padded, "unpadded": unpadded}


def sum_of_answer(model, ids: torch.Tensor, mask: torch.Tensor, prompt_len: int) -> torch.Tensor:
    """The log-probability of one sequence ``(T,)``'s answer, without its padding, in float64."""
    ids = ids[mask.bool()]
    with torch.no_grad():
        logits = model.model(ids[None], attention_mask=torch.ones_like(ids)[None])["logits"][0]
    logps = torch.log_softmax(logits, -1)
    assert logps.dtype == torch.float64
    # The token at i is predicted at i - 1.
    return torch.stack([logps[i - 1, ids[i]] for i in range(prompt_len, len(ids))]).sum()


@pytest.mark.parametrize("kind", ("padded", "unpadded"))
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_losses_and_gradients(trainer, models, batches, kind: str, options: dict):
    *tensors, prompt_lens = batches[kind]
    chosen, chosen_mask, rejected, rejected_mask = (tensor.squeeze(1) for tensor in tensors)
    count = len(chosen)

    # OpenRLHF's side: its training step, up to the gradient of the log-probabilities.
    logps = []
    for model in models:
        with torch.no_grad():
            forward = trainer.concatenated_forward(
                model, chosen, chosen_mask, rejected, rejected_mask, prompt_lens
            )
        logps += [logp.requires_grad_() for logp in forward[:2]]
    assert all(logp.dtype == torch.float32 for logp in logps)
    label_smoothing = options.get("label_smoothing", 0.0)
    of_loss = {name: value for name, value in options.items() if name != "label_smoothing"}
    loss_fn = PairwiseDPOLoss(BETA, label_smoothing, **of_loss)
    loss, chosen_rewards, rejected_rewards = loss_fn(*logps)
    gradients = torch.autograd.grad(loss, logps)
    each = [loss_fn(*(logp[row : row + 1] for logp in logps))[0].item() for row in range(count)]

    # Our side, from the logits.
    policy, reference = models
    sums = torch.tensor(
        [
            [
                sum_of_answer(model, ids[row], mask[row], prompt_lens[row])
                for model, ids, mask in (
                    (policy, chosen, chosen_mask),
                    (policy, rejected, rejected_mask),
                    (reference, chosen, chosen_mask),
                    (reference, rejected, rejected_mask),
                )
            ]
            for row in range(count)
        ]
    )
    z = (BETA * ((sums[:, 0] - sums[:, 1]) - (sums[:, 2] - sums[:, 3]))).requires_grad_()
    assert z.detach().abs().min() > 0.01, "policy and reference hardly differ"
    losses = focalpo_loss(z, **options)
    (slopes,) = torch.autograd.grad(losses.sum(), z)

    # Each sum rounds once per token, at most by half an eps of the sum so far.  No loss or slope
    # here changes faster than the margin does.
    eps = torch.finfo(torch.float32).eps
    rounding = BETA * 4 * max(chosen.shape[1], rejected.shape[1]) * eps * sums.abs().max().item()
    assert rounding < 0.02
    near = {"rtol": 0, "atol": rounding}
    torch.testing.assert_close(torch.tensor(each).double(), losses.detach(), **near)
    torch.testing.assert_close(loss.double(), losses.detach().mean(), **near)
    rewards = BETA * (sums[:, 0] - sums[:, 2]), BETA * (sums[:, 1] - sums[:, 3])
    torch.testing.assert_close(chosen_rewards.double(), rewards[0], **near)
    torch.testing.assert_close(rejected_rewards.double(), rewards[1], **near)
    # The policy's chosen and the reference's rejected pull one way, the other two the other way.
    for gradient, sign in zip(gradients, (1, -1, -1, 1), strict=True):
        torch.testing.assert_close(gradient.double() * count, sign * BETA * slopes, **near)
