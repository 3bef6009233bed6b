"""A gamma that moves over a run, in TRL."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny_trl import PAIRS, SGD, batch, margins_of, trainer

from focalpo_plugins import FocalPOTrainer, focalpo_loss

MOVING = {"focalpo_gamma": 0.6, "focalpo_gamma_end": 0.0, **SGD}


def gammas(host: FocalPOTrainer, name: str = "focalpo/gamma") -> list[float]:
    return [entry[name] for entry in host.state.log_history if name in entry]


@pytest.mark.parametrize(
    "schedule, expected",
    [
        # .6 * (1 - t) at t = 0, 1/3, 2/3, 1
        (None, [0.6, 0.4, 0.2, 0.0]),
        ("linear", [0.6, 0.4, 0.2, 0.0]),
        # .6 * (1 + cos pi t) / 2, with the cosines 1, 1/2, -1/2, -1
        ("cosine", [0.6, 0.45, 0.15, 0.0]),
    ],
)
@pytest.mark.releases
def test_gamma_of_each_step(schedule: str | None, expected: list[float], tokenizer, tmp_path: Path):
    """Four steps of two micro-batches; an evaluation has the gamma of the step before it, and the
    one before the first step that of the first."""
    host = trainer(
        FocalPOTrainer, tokenizer, tmp_path, **MOVING, focalpo_gamma_schedule=schedule, max_steps=4,
        gradient_accumulation_steps=2, per_device_train_batch_size=1,
        eval_dataset=Dataset.from_list(PAIRS[:3]), eval_strategy="steps", eval_steps=1,
        eval_on_start=True,
    )  # fmt: skip
    trained: dict[int, list[float]] = {}
    record = host._record

    def watched(margins: torch.Tensor) -> None:
        record(margins)
        if host._mode() == "train":
            trained.setdefault(host.state.global_step, []).append(host._loss_now().now["gamma"])

    host._record = watched
    host.train()
    assert gammas(host) == pytest.approx(expected, abs=1e-12)
    assert gammas(host, "eval_focalpo/gamma") == pytest.approx([0.6, *expected], abs=1e-12)
    # Both micro-batches of a step have one gamma.
    assert list(trained.values()) == [[gamma, gamma] for gamma in gammas(host)]
    assert host.pairwise_loss.options["gamma"] == 0.6


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=pytest.mark.fused)])
def test_the_loss_of_a_step_is_that_of_its_gamma(fused: bool, tokenizer, tmp_path: Path):
    """At the third of four steps t = 2/3 and gamma = .2."""
    host = trainer(FocalPOTrainer, tokenizer, tmp_path, **MOVING, focalpo_fused=fused)
    host.state.max_steps, host.state.global_step = 4, 2
    host.model.train()
    inputs = batch(host)
    expected = focalpo_loss(margins_of(host, inputs), 0.2).mean()
    assert host.compute_loss(host.model, inputs).item() == pytest.approx(expected.item(), rel=1e-5)
    host.log(logs := {"loss": 0.0})
    assert logs["focalpo/gamma"] == pytest.approx(0.2, abs=1e-12)


def test_resuming_is_exact(tokenizer, tmp_path: Path):
    """Progress is of the step alone: the second half has the gammas of the uninterrupted run."""
    whole = trainer(
        FocalPOTrainer, tokenizer, tmp_path, **MOVING, max_steps=4, save_strategy="steps",
        save_steps=2,
    )  # fmt: skip
    whole.train()
    again = trainer(FocalPOTrainer, tokenizer, tmp_path, **MOVING, max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert gammas(again) == gammas(whole)
    for ours, theirs in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    changed = trainer(
        FocalPOTrainer, tokenizer, tmp_path, **{**MOVING, "focalpo_gamma_end": 0.1}, max_steps=4
    )
    with pytest.raises(ValueError, match=r"focalpo_gamma_end was 0.0, got 0.1"):
        changed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_gamma_that_stays_is_not_logged(tokenizer, tmp_path: Path):
    host = trainer(FocalPOTrainer, tokenizer, tmp_path, focalpo_gamma=0.3)
    host.train()
    assert not gammas(host)


def test_a_third_partys_loss_that_changes(tokenizer, tmp_path: Path, add_loss):
    """A hinge whose offset falls from 2 to 1 over three steps: 2, 1.5, 1."""

    add_loss(
        "closing",
        lambda margins, offset: torch.relu(offset - margins),
        options={"first": 2.0, "last": 1.0},
        at=lambda progress, first, last: {"offset": first + (last - first) * progress},
    )
    host = trainer(FocalPOTrainer, tokenizer, tmp_path, focalpo_pairwise_loss="closing")
    host.train()
    assert gammas(host, "closing/offset") == [2.0, 1.5, 1.0]
