"""A gamma that moves over a run, in TRL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_trl import PAIRS, SGD, batch, margins_of, model, trainer
from transformers import EarlyStoppingCallback

from focalpo_plugins import SCHEDULES, FocalPOTrainer, focalpo_loss

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
    """Four steps of two micro-batches; each evaluation has the gamma of the end."""
    host = trainer(
        FocalPOTrainer, tokenizer, tmp_path, **MOVING, focalpo_gamma_schedule=schedule, max_steps=4,
        gradient_accumulation_steps=2, per_device_train_batch_size=1,
        eval_dataset=Dataset.from_list(PAIRS[:3]), eval_strategy="steps", eval_steps=1,
        eval_on_start=True,
    )  # fmt: skip
    trained: dict[int, list[float]] = {}
    count = host._count

    def watched(margins: torch.Tensor) -> None:
        count(margins)
        if host.model.training:
            trained.setdefault(host.state.global_step, []).append(host._run.loss.now["gamma"])

    host._count = watched
    host.train()
    assert gammas(host) == pytest.approx(expected, abs=1e-12)
    assert gammas(host, "eval_focalpo/gamma") == [0.0] * 5
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


@pytest.mark.releases
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("epochs, resumed_at", [(1, 1), (1, 3), (2, 1), (2, 5)])
def test_resuming_inside_an_epoch(schedule, epochs, resumed_at, tokenizer, tmp_path, capsys):
    """An epoch has four steps of two pairs. Each resumed step has the gamma of the uninterrupted
    run, without a message, because the number of steps is the same."""
    arguments = {
        **MOVING, "focalpo_gamma_schedule": schedule, "max_steps": -1, "num_train_epochs": epochs,
        "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 1,
    }  # fmt: skip
    if schedule == "constant":
        arguments |= {"focalpo_gamma_end": None, "focalpo_gamma_schedule": None}

    def build() -> tuple[FocalPOTrainer, list[float]]:
        host = trainer(FocalPOTrainer, tokenizer, tmp_path, **arguments)
        used, count = [], host._count

        def watched(margins: torch.Tensor) -> None:
            count(margins)
            used.append(host._run.loss.now["gamma"])

        host._count = watched
        return host, used

    whole, of_whole = build()
    whole.train()
    assert len(of_whole) == 4 * epochs
    if schedule != "constant":
        assert of_whole == gammas(whole) and of_whole[0] == 0.6 and of_whole[-1] == 0.0
    again, of_again = build()
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{resumed_at}"))
    assert of_again == of_whole[resumed_at:]
    for ours, theirs in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert "changes over the run" not in capsys.readouterr().err


@pytest.mark.releases
@pytest.mark.parametrize("moving", [True, False])
def test_resuming_with_another_number_of_steps(moving: bool, tokenizer, tmp_path, capsys):
    """Gamma is .6 (1 - t): .3 would be next of three steps (t = 1/2), and is .4 of four (t = 1/3).
    Both lengths are named, once for the two micro-batches of a step."""
    gamma = MOVING if moving else SGD
    saving = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2,
              "per_device_train_batch_size": 1}  # fmt: skip
    trainer(FocalPOTrainer, tokenizer, tmp_path, **gamma, **saving, max_steps=3).train()
    assert "changes over the run" not in capsys.readouterr().err
    again = trainer(FocalPOTrainer, tokenizer, tmp_path, **gamma, **saving, max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    said = [line for line in capsys.readouterr().err.splitlines() if "changes over the run" in line]
    assert len(said) == moving
    if moving:
        assert gammas(again) == pytest.approx([0.6, 0.4, 0.2, 0.0], abs=1e-12)
        assert (
            "focalpo_plugins: warning: focalpo_gamma changes over the run, and the checkpoint's run "
            "had 3 steps, but this one has 4" in said[0]
        )


# How transformers compares evaluation losses, and where a run shows it.
COMPARED: dict[str, dict[str, Any]] = {
    "loaded at the end": {
        "load_best_model_at_end": True,
        "save_strategy": "steps",
        "save_steps": 1,
    },
    "saved": {"save_strategy": "best", "metric_for_best_model": "loss"},
    "plateau": {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5, "threshold": 0.0},
    },
}


@pytest.mark.parametrize("what", COMPARED)
def test_evaluation_losses_of_a_moving_gamma_can_be_compared(what: str, tokenizer, tmp_path: Path):
    """Gamma falls from .6 to 0, so a model's loss at margin 0 rises from .457 to .693, while the
    model learns the pairs that it is evaluated on: the loss at the end's gamma falls with each
    evaluation. The last model is the best, nothing stops the run, and no learning rate is cut."""
    pairs = Dataset.from_list(PAIRS[:4])
    stopping = EarlyStoppingCallback(early_stopping_patience=1)
    host = trainer(
        FocalPOTrainer, tokenizer, tmp_path, **{**MOVING, "learning_rate": 0.002, **COMPARED[what]}, max_steps=4,
        reference=model(0), pairs=pairs, eval_dataset=pairs, eval_strategy="steps", eval_steps=1,
        per_device_eval_batch_size=4,
    )  # fmt: skip
    if what != "plateau":
        host.add_callback(stopping)
    host.train()
    losses = [entry["eval_loss"] for entry in host.state.log_history if "eval_loss" in entry]
    assert len(losses) == 4 and losses == sorted(losses, reverse=True)
    trained = [entry["loss"] for entry in host.state.log_history if "loss" in entry]
    assert trained[-1] > trained[0]  # so the losses of the steps could not choose
    assert gammas(host, "eval_focalpo/gamma") == [0.0] * 4
    if what == "plateau":
        rates = {entry["learning_rate"] for entry in host.state.log_history if "loss" in entry}
        assert rates == {0.002}
    else:
        assert Path(host.state.best_model_checkpoint).name == "checkpoint-4"
    # The current model, evaluated again: the same loss from evaluate() and predict().
    again = host.evaluate()
    assert again["eval_loss"] == pytest.approx(losses[-1], rel=1e-6)
    assert again["eval_focalpo/gamma"] == 0.0
    predicted = host.predict(host.eval_dataset).metrics
    assert predicted["test_loss"] == pytest.approx(losses[-1], rel=1e-6)
    assert predicted["test_focalpo/gamma"] == 0.0
    z = margins_of(host, host.data_collator([*host.eval_dataset]))
    assert losses[-1] == pytest.approx(-torch.nn.functional.logsigmoid(z).mean().item(), rel=1e-5)


def test_the_log_of_a_step_has_its_own_gamma_after_an_evaluation(tokenizer, tmp_path: Path):
    """The second of three steps, t = 1/2, and an evaluation before its log."""
    held_out = Dataset.from_list(PAIRS[:3])
    host = trainer(FocalPOTrainer, tokenizer, tmp_path, **MOVING, eval_dataset=held_out)
    host.state.max_steps, host.state.global_step = 3, 1
    host.model.train()
    host.compute_loss(host.model, batch(host))
    host.model.eval()
    host.evaluate()
    host.model.train()
    host.log(logs := {"loss": 0.0})
    assert logs["focalpo/gamma"] == pytest.approx(0.3, abs=1e-12)


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
    # An evaluation of any such loss is at its end: relu(1 - z).
    host.eval_dataset = host.train_dataset
    losses = [
        torch.relu(1 - margins_of(host, host.data_collator([row]))).item()
        for row in host.train_dataset
    ]
    found = host.evaluate()
    assert found["eval_closing/offset"] == 1.0
    assert found["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
