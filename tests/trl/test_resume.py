"""Checkpoints of TRL's trainer: resumed if they were trained with the same loss, else refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_trl import (
    model,
    trainer,
)
from trl_features import FIELDS

from focalpo_plugins import FocalPOTrainer

pytestmark = pytest.mark.releases


def test_resume_without_an_output_folder(tokenizer, tmp_path):
    """As on a second node that doesn't share it."""
    host = trainer(FocalPOTrainer, tokenizer, tmp_path / "none", save_strategy="no")
    (tmp_path / "none").rmdir()
    with pytest.raises(ValueError, match="needs a checkpoint in output_dir, got none in"):
        host.train(resume_from_checkpoint=True)


def test_resume_with_another_loss(tokenizer, tmp_path):
    """A checkpoint's trainer_state.json records what it was trained with."""
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer(FocalPOTrainer, tokenizer, tmp_path, **saving).train()
    again = {**saving, "max_steps": 3}
    for changed, message in (
        (
            {"focalpo_gamma": 0.5},
            "focalpo_gamma was 0.05, got 0.5: resuming would change the loss of the checkpoint",
        ),
        ({"beta": 0.1}, "^beta was 0.3, got 0.1: resuming would change the loss of the checkpoint"),
        ({"loss_type": ["sigmoid_norm"]}, r"loss_type was \['sigmoid'\], got \['sigmoid_norm'\]"),
    ):
        host = trainer(FocalPOTrainer, tokenizer, tmp_path, **{**again, **changed})
        with pytest.raises(ValueError, match=message):
            host.train(resume_from_checkpoint=True)
        assert host.state.global_step == 0
    host = trainer(
        FocalPOTrainer, tokenizer, tmp_path, **again, focalpo_gamma=0.5, focalpo_allow_changed=True
    )
    host.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert host.state.global_step == 3
    with pytest.raises(ValueError, match="focalpo_gamma was 0.5, got 0.05"):
        trainer(FocalPOTrainer, tokenizer, tmp_path, **again).train(resume_from_checkpoint=True)
    same = trainer(
        FocalPOTrainer, tokenizer, tmp_path, **{**again, "max_steps": 4}, focalpo_gamma=0.5
    )
    same.train(resume_from_checkpoint=True)
    assert same.state.global_step == 4


# For each of TRL's values that go into the loss: the checkpoint's run, and the resumed one.
CHANGED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "loss_weights": (
        {"loss_type": ["sigmoid", "sft"]}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 9]},
        r"loss_weights was [1.0, 1.0], got [1, 9]",
    ),
    "ld_alpha": ({}, {"ld_alpha": 0.2}, "ld_alpha was None, got 0.2"),
    "use_weighting": ({"use_weighting": True}, {}, "use_weighting was True, got False"),
    "sync_ref_model": (
        {"sync_ref_model": True, "ref_model_sync_steps": 1}, {},
        "ref_model_mixup_alpha was 0.6, got None; ref_model_sync_steps was 1, got None; "
        "sync_ref_model was True, got False",
    ),
    "max_length": ({"max_length": 64}, {"max_length": 4}, "max_length was 64, got 4"),
    "label_smoothing": ({}, {"label_smoothing": 0.1}, "label_smoothing was 0.0, got 0.1"),
}  # fmt: skip


@pytest.mark.parametrize("key", CHANGED)
def test_resume_with_another_value_of_the_hosts(tokenizer, tmp_path, key: str):
    """Refused before the first step; the same value in another spelling is accepted."""
    before, after, message = CHANGED[key]
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer(FocalPOTrainer, tokenizer, tmp_path, **saving, **before).train()
    host = trainer(FocalPOTrainer, tokenizer, tmp_path, **{**saving, "max_steps": 2}, **after)
    with pytest.raises(ValueError) as refused:
        host.train(resume_from_checkpoint=True)
    assert str(refused.value).startswith(f"{message}: resuming would change the loss of the check")
    assert host.state.global_step == 0
    same = {**before, "loss_weights": [1.0, 1.0]} if key == "loss_weights" else before
    host = trainer(FocalPOTrainer, tokenizer, tmp_path, **{**saving, "max_steps": 2}, **same)
    host.train(resume_from_checkpoint=True)
    assert host.state.global_step == 2


@pytest.mark.skipif(
    "router_aux_loss_coef" not in FIELDS, reason="this TRL's DPO has no loss of routers"
)
def test_resume_with_another_weight_of_the_routers(tokenizer, tmp_path):
    def build(coefficient: float, steps: int) -> FocalPOTrainer:
        return trainer(
            FocalPOTrainer, tokenizer, tmp_path, policy=model(0, "mixtral"),
            reference=model(1, "mixtral"), router_aux_loss_coef=coefficient, max_steps=steps,
            save_strategy="steps", save_steps=1,
        )  # fmt: skip

    build(0.3, 1).train()
    for other, now in ((0.1, 0.1), (0.0, None)):
        message = f"^router_aux_loss_coef was 0.3, got {now}: resuming would change the loss"
        with pytest.raises(ValueError, match=message):
            build(other, 2).train(resume_from_checkpoint=True)


def edited_state(checkpoint: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    edit(state)
    path.write_text(json.dumps(state))


def test_resume_of_an_earlier_releases_checkpoint(tokenizer, tmp_path, capsys):
    """Its record has only some of the values. A warning names the missing ones, which can't be
    compared; the others are compared as always."""
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer(FocalPOTrainer, tokenizer, tmp_path, **saving).train()

    def as_before(state: dict[str, Any]) -> None:
        args = state["stateful_callbacks"]["_Record"]["args"]
        args["record"] = {
            "loss": "focalpo", "focalpo_gamma": 0.05, "focalpo_variant": "correct",
            "margin": "dpo", "beta": 0.3, "label_smoothing": 0.0, "loss_type": ["sigmoid"],
        }  # fmt: skip

    edited_state(tmp_path / "checkpoint-1", as_before)
    again = {**saving, "max_steps": 2}
    with pytest.raises(ValueError, match="^beta was 0.3, got 0.1: "):
        trainer(FocalPOTrainer, tokenizer, tmp_path, **again, beta=0.1).train(True)
    with pytest.raises(ValueError, match="^focalpo_gamma_end was None, got 0.1: "):
        trainer(FocalPOTrainer, tokenizer, tmp_path, **again, focalpo_gamma_end=0.1).train(True)
    capsys.readouterr()
    host = trainer(FocalPOTrainer, tokenizer, tmp_path, **again, ld_alpha=0.5)
    host.train(resume_from_checkpoint=True)
    assert host.state.global_step == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "earlier release" in line]
    assert "did not record loss_weights, ld_alpha, use_weighting, router_aux_loss_coef, " in line
    # The new checkpoint's record is complete.
    with pytest.raises(ValueError, match="^ld_alpha was 0.5, got None: "):
        trainer(FocalPOTrainer, tokenizer, tmp_path, **{**saving, "max_steps": 3}).train(True)


@pytest.mark.parametrize("restored", [False, True])
def test_the_record_is_of_the_run_that_wrote_it(tokenizer, tmp_path, restored: bool):
    """Also if transformers restores callbacks from the checkpoint; the record is one of them."""
    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer(FocalPOTrainer, tokenizer, tmp_path, **saving, max_steps=1).train()
    host = trainer(
        FocalPOTrainer, tokenizer, tmp_path, **saving, max_steps=2, focalpo_gamma=0.5,
        focalpo_allow_changed=True, restore_callback_states_from_checkpoint=restored,
    )  # fmt: skip
    host.train(resume_from_checkpoint=True)
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["_Record"]["args"]["record"]["focalpo_gamma"] == 0.5
    with pytest.raises(ValueError, match="^focalpo_gamma was 0.5, got 0.05: "):
        trainer(FocalPOTrainer, tokenizer, tmp_path, **saving, max_steps=3).train(True)


def test_a_checkpoint_that_is_not_there(tokenizer, tmp_path):
    host = trainer(FocalPOTrainer, tokenizer, tmp_path)
    with pytest.raises(ValueError, match="^resume_from_checkpoint=True needs a checkpoint in outp"):
        host.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="^resume_from_checkpoint must be the folder of a checkpo"):
        host.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert host.state.global_step == 0


@pytest.mark.parametrize("text", ["[]", "{", '{"stateful_callbacks": {"_Record": {"args": null}}}'])
def test_a_checkpoint_whose_state_cannot_be_read(tokenizer, tmp_path, text: str):
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer(FocalPOTrainer, tokenizer, tmp_path, **saving).train()
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text(text)
    host = trainer(FocalPOTrainer, tokenizer, tmp_path, **{**saving, "max_steps": 2})
    with pytest.raises(
        ValueError, match="^resume_from_checkpoint must be a complete checkpoint, got"
    ):
        host.train(resume_from_checkpoint=True)


def test_a_folder_that_checkpoints_cannot_be_written_to(tokenizer, tmp_path):
    """A file has taken its place since the trainer was built, because TRL creates the folder."""
    folder = tmp_path / "out"
    saving = {"save_strategy": "steps", "save_steps": 1}
    host = trainer(FocalPOTrainer, tokenizer, folder, **saving)
    folder.rmdir()
    folder.touch()
    with pytest.raises(ValueError, match="output_dir must be a writable folder, got"):
        host.train()
    assert host.state.global_step == 0
