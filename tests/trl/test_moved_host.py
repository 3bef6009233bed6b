"""A TRL that computes its loss elsewhere trains nothing under our loss's name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import trl
from tiny_trl import (
    run_forked,
)

pytestmark = pytest.mark.releases


@pytest.fixture
def edited_trl(tmp_path):
    """A function that puts an edited copy of the installed TRL first on the path."""

    def edit(old: str, new: str) -> Path:
        copy = tmp_path / "edited"
        shutil.copytree(Path(trl.__file__).parent, copy / "trl")
        module = copy / "trl" / "trainer" / "dpo_trainer.py"
        source = module.read_text()
        assert old in source
        module.write_text(source.replace(old, new))
        return copy

    return edit


SCRIPT = """
import sys
from pathlib import Path
import tiny_trl as t
host = t.trainer(t.FocalPOTrainer, t.tokenizer(), Path(sys.argv[1]))
host.train()
print("trained", [entry["loss"] for entry in host.state.log_history if "loss" in entry])
"""


@pytest.mark.parametrize(
    "new, stops_at",
    [
        # The branch calls another function: other branches still have a log-sigmoid.
        ("-torch.log(torch.sigmoid(self.beta * delta_score))", "called logsigmoid 0 times"),
        (
            "-F.logsigmoid(self.beta * delta_score) + 0 * F.logsigmoid(delta_score)",
            "called logsigmoid 2 times",
        ),
    ],
)
@pytest.mark.xdist_group("forked")
def test_a_trl_that_moves_the_branch_is_stopped_at_the_first_step(
    edited_trl, tmp_path, new, stops_at
):
    copy = edited_trl("-F.logsigmoid(self.beta * delta_score)\n", new + "\n")
    code, stdout, stderr = run_forked(SCRIPT, tmp_path, path=copy)
    assert code != 0
    assert "trained" not in stdout
    raised = "focalpo_plugins.errors.RunError: "
    (message,) = [line for line in stderr.splitlines() if line.startswith(raised)]
    assert f"trl {trl.__version__} {stops_at}" in message
    assert "focalpo_plugins 0.2.0 expects 1" in message


@pytest.mark.xdist_group("forked")
def test_a_trl_that_goes_around_the_seam_is_stopped_at_the_first_step(edited_trl, tmp_path):
    """A way to compute a loss other than the two known ones: neither our log-sigmoid nor our fused
    loss is called."""
    copy = edited_trl(
        "            return self._compute_loss(model, inputs, return_outputs)\n",
        "            return model(input_ids=inputs['input_ids']).logits.mean()\n",
    )
    code, stdout, stderr = run_forked(SCRIPT, tmp_path, path=copy)
    assert code != 0
    assert "trained" not in stdout
    assert f"with trl {trl.__version__}: it called the loss 0 times for 1 batch" in stderr


@pytest.mark.xdist_group("forked")
def test_a_trl_without_the_seam_is_refused_before_training(edited_trl, tmp_path):
    """As TRL 0.28 and older do, the loss is computed in another method."""
    copy = edited_trl("    def _compute_loss(self, ", "    def _computes_loss(self, ")
    code, stdout, stderr = run_forked(SCRIPT, tmp_path, path=copy)
    assert code != 0
    assert "does not know where trl" in stderr.strip().splitlines()[-1]
    assert "trained" not in stdout
    assert "0%" not in stderr  # no progress bar: nothing was trained
