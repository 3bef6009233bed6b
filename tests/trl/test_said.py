"""What a run in TRL prints and leaves in its model card."""

from __future__ import annotations

from pathlib import Path

import pytest
import trl
from datasets import Dataset
from tiny_trl import (
    PAIRS,
    trainer,
)

from focalpo_plugins import FocalPOTrainer

pytestmark = pytest.mark.releases


@pytest.mark.parametrize("start", ["train", "evaluate", "predict"])
def test_startup_line(tokenizer, tmp_path, capsys, start):
    """Printed once, when something starts: a trainer may still be refused after it is built."""
    held_out = {"eval_dataset": Dataset.from_list(PAIRS[:3])}
    host = trainer(FocalPOTrainer, tokenizer, tmp_path, max_steps=1, **held_out)
    assert "active" not in capsys.readouterr().err
    host.predict(host.eval_dataset) if start == "predict" else getattr(host, start)()
    host.evaluate()
    (line,) = [
        line for line in capsys.readouterr().err.splitlines() if "focalpo_plugins: active" in line
    ]
    assert "loss=focalpo gamma=0.05 variant=correct z*=-20.00" in line
    assert (
        f"beta=0.3 trainer=FocalPOTrainer focalpo_plugins=0.2.0 trl={trl.__version__} torch="
        in line
    )


def test_model_card(tokenizer, tmp_path):
    trainer(FocalPOTrainer, tokenizer, tmp_path).create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "- focalpo\n" in card
    assert "2501.06645" in card


def test_the_closing_line(tokenizer, tmp_path: Path, capsys):
    """Each number is in the log; without a checkpoint there is nothing to report on."""
    pairs = Dataset.from_list(PAIRS[:5])
    host = trainer(FocalPOTrainer, tokenizer, tmp_path, eval_dataset=pairs,
                   eval_strategy="steps", eval_steps=3)  # fmt: skip
    host.train()
    history = host.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    held_out = next(entry for entry in reversed(history) if "eval_loss" in entry)
    accuracy, margin = (held_out[f"eval_rewards/{name}"] for name in ("accuracies", "margins"))
    loss = held_out["eval_loss"]
    (line,) = [each for each in capsys.readouterr().err.splitlines() if ": done." in each]
    assert line == (
        f"focalpo_plugins: done. 3 steps; loss {losses[0]:.4f} at first, {losses[-1]:.4f} at last; "
        f"held out: loss {loss:.3f}, accuracy {accuracy:.3f}, margin {margin:.3f}; "
        "the model is not saved yet: "
        "trainer.save_model() saves it"
    )
    host = trainer(FocalPOTrainer, tokenizer, tmp_path, save_strategy="steps", save_steps=3)
    host.train()
    (line,) = [each for each in capsys.readouterr().err.splitlines() if ": done." in each]
    last = f"the last checkpoint is {tmp_path / 'checkpoint-3'}"
    assert line.endswith(f" at last; {last}; next: focalpo report {tmp_path}")
    # The folder holds the checkpoints of an earlier run, and this run saves none.
    trainer(FocalPOTrainer, tokenizer, tmp_path).train()
    (line,) = [each for each in capsys.readouterr().err.splitlines() if ": done." in each]
    assert line.endswith("; the model is not saved yet: trainer.save_model() saves it")


def test_the_closing_line_has_the_mean_of_the_last_tenth(tokenizer, tmp_path: Path, capsys):
    """Of 20 logged losses the mean of two: the last batch may be a hard one."""
    host = trainer(FocalPOTrainer, tokenizer, tmp_path, max_steps=20, learning_rate=1e-3)
    host.train()
    losses = [entry["loss"] for entry in host.state.log_history if "loss" in entry]
    assert len(losses) == 20
    mean = f"{(losses[18] + losses[19]) / 2:.4f} at last (mean of the last 2 logged); "
    assert f"; loss {losses[0]:.4f} at first, {mean}" in capsys.readouterr().err


def test_the_closing_line_of_a_best_checkpoint(tokenizer, tmp_path: Path, capsys):
    """A learning rate that ruins the model after the first evaluation: the held-out numbers are
    those of the loaded checkpoint, not the last ones. Gamma goes from .4 to .2. The choice isn't
    made by TRL's own metrics, which TRL 0.29 adds only to the log."""
    host = trainer(
        FocalPOTrainer, tokenizer, tmp_path, eval_dataset=Dataset.from_list(PAIRS[:5]),
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_focalpo/p",
        greater_is_better=False, learning_rate=0.1, focalpo_gamma=0.4, focalpo_gamma_end=0.2,
    )  # fmt: skip
    host.train()
    evaluated = [entry for entry in host.state.log_history if "eval_loss" in entry]
    best = min(evaluated, key=lambda entry: entry["eval_focalpo/p"])
    assert best is not evaluated[-1]
    (line,) = [each for each in capsys.readouterr().err.splitlines() if ": done." in each]
    checkpoint = tmp_path / f"checkpoint-{best['step']}"
    accuracy, margin = (best[f"eval_rewards/{name}"] for name in ("accuracies", "margins"))
    assert " at first (gamma 0.4), " in line and " at last (gamma 0.2); " in line
    assert (
        f"; the model is now that of {checkpoint}, the best checkpoint; held out there: "
        f"loss {best['eval_loss']:.3f}, accuracy {accuracy:.3f}, margin {margin:.3f}; the last checkpoint is {tmp_path / 'checkpoint-3'}; "
    ) in line
