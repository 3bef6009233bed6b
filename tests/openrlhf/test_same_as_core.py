"""OpenRLHF's way from tokens to log-probabilities, with our loss at its end, against the core alone.

The expected values start from the logits of the two models, and from there on are computed here,
in float64: log-softmax, answer tokens only, sum, margin, loss.  OpenRLHF computes the same from
the logits in float32, so the two may differ by what float32 rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from focalpo_plugins import focalpo_loss
from focalpo_plugins.openrlhf import FocalPOLoss

BETA = 0.5
# The sums have up to 30 terms of size up to about 10, each rounded in float32 a few times.
LOGP_ROUNDING = 30 * 10 * 4 * torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def models(openrlhf: SimpleNamespace, tiny: Path) -> SimpleNamespace:
    """OpenRLHF's actor on the tiny model as reference, and on one that differs as policy."""
    policy, reference = (
        openrlhf.Actor(str(tiny / "model"), attn_implementation="eager", param_dtype="bf16")
        for _ in range(2)
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += (0.1 * parameter.float().std() * noise).to(parameter.dtype)
    return SimpleNamespace(policy=policy.eval(), reference=reference.eval())


@pytest.fixture(scope="module")
def trainer(openrlhf: SimpleNamespace, tiny: Path):
    """OpenRLHF's trainer, with just what its log-probabilities are computed from."""
    from transformers import AutoTokenizer

    trainer = object.__new__(openrlhf.DPOTrainer)
    trainer.tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    trainer.tokenizer.padding_side = "right"
    trainer.strategy = SimpleNamespace(ring_attn_group=None)
    return trainer


@pytest.fixture(scope="module")
def dataset(openrlhf: SimpleNamespace, trainer, tiny: Path):
    from datasets import load_dataset

    data = SimpleNamespace(
        prompt_key=None, chosen_key="chosen", rejected_key="rejected", apply_chat_template=True
    )
    strategy = SimpleNamespace(args=SimpleNamespace(data=data))
    rows = load_dataset("json", data_files=str(tiny / "train.jsonl"), split="train[:8]")
    return openrlhf.RewardDataset(rows, trainer.tokenizer, 64, strategy, is_dpo=True, num_processors=1)


def openrlhf_side(trainer, models: SimpleNamespace, batch: Sequence, **options) -> SimpleNamespace:
    """What OpenRLHF's training step does with a batch, up to the gradient of the log-probabilities."""
    chosen, chosen_mask, rejected, rejected_mask, prompt_lens = batch
    inputs = [x.squeeze(1) for x in (chosen, chosen_mask, rejected, rejected_mask)]
    logps = []
    for model in (models.policy, models.reference):
        with torch.no_grad():
            logps += trainer.concatenated_forward(model, *inputs, prompt_lens)[:2]
    logps[0].requires_grad_()
    logps[1].requires_grad_()
    margins: list[torch.Tensor] = []
    loss_fn = FocalPOLoss(BETA, **options)
    loss_fn.record = margins.append
    loss, _, _ = loss_fn(*logps)
    loss.backward()
    return SimpleNamespace(loss=loss.item(), margins=margins[0].detach(), grads=[x.grad for x in logps[:2]])


def by_hand(models: SimpleNamespace, batch: Sequence) -> torch.Tensor:
    """The margins ``(B,)`` in float64 from the models' logits, one unpadded sequence at a time."""
    chosen, chosen_mask, rejected, rejected_mask, prompt_lens = batch

    def logp(model, ids: torch.Tensor, mask: torch.Tensor, prompt_len: int) -> torch.Tensor:
        ids = ids[:, : mask.sum()]  # padded on the right
        with torch.no_grad():
            logits = model.model(ids, attention_mask=torch.ones_like(ids))["logits"]
        logps = torch.log_softmax(logits[0, :-1].double(), -1)
        answer = range(prompt_len, ids.shape[1])  # the token at i is predicted at i - 1
        return sum(logps[i - 1, ids[0, i]] for i in answer)

    rows = []
    for row, prompt_len in enumerate(prompt_lens):
        pair = (chosen[row], chosen_mask[row], prompt_len), (rejected[row], rejected_mask[row], prompt_len)
        policy, reference = (
            logp(model, *pair[0]) - logp(model, *pair[1]) for model in (models.policy, models.reference)
        )
        rows.append(BETA * (policy - reference))
    return torch.stack(rows)


OPTIONS = [
    {"gamma": 0.05},
    {"gamma": 1.0, "variant": "incorrect"},
    {"gamma": 0.5, "variant": "correct_exact"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("label_smoothing", (0.0, 0.1))
def test_unpadded(trainer, models, dataset, options: dict, label_smoothing: float):
    """One pair at a time whose sequences are equally long or padded at most to their own partner:
    the mean over one pair is its loss."""
    for row in range(len(dataset)):
        batch = dataset.collate_fn([dataset[row]])
        got = openrlhf_side(trainer, models, batch, label_smoothing=label_smoothing, **options)
        z = got.margins.double().requires_grad_()
        expected = focalpo_loss(z, label_smoothing=label_smoothing, **options)
        (slope,) = torch.autograd.grad(expected.sum(), z)
        assert got.loss == pytest.approx(expected.item(), rel=1e-5)
        assert got.grads[0].item() == pytest.approx(BETA * slope.item(), rel=1e-5)
        assert got.grads[1].item() == pytest.approx(-BETA * slope.item(), rel=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_padded(trainer, models, dataset, options: dict):
    """A batch of pairs of eight lengths: the loss is the mean of the pairs' own, and each pair's
    gradient is its own slope times beta over the batch size."""
    batch = dataset.collate_fn([dataset[row] for row in range(len(dataset))])
    assert len({int(mask.sum()) for mask in batch[1]}) > 1, "no row is padded"
    got = openrlhf_side(trainer, models, batch, **options)
    z = got.margins.double().requires_grad_()
    expected = focalpo_loss(z, **options)
    (slope,) = torch.autograd.grad(expected.sum(), z)
    assert got.loss == pytest.approx(expected.mean().item(), rel=1e-5)
    torch.testing.assert_close(got.grads[0].double(), BETA * slope / len(z), rtol=1e-5, atol=0)
    torch.testing.assert_close(got.grads[1].double(), -BETA * slope / len(z), rtol=1e-5, atol=0)
