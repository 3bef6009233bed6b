"""A gamma that moves over a run, beyond the contract: OpenRLHF's epochs and evaluations."""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("schedule")

# Two epochs of 40 pairs in batches of 8 are ten steps; at rest every margin is 0.
RESTING = ("--adam.lr", "1e-12", "--train.max_epochs", "2", "--loss", "focalpo")
MOVING = ("--focalpo.gamma", "0.45", "--focalpo.gamma_end", "0.0")
EAGER = ("--ds.attn_implementation", "eager")


def gammas(run) -> list[float]:
    assert run.returncode == 0, run.output
    found = run.steps("train/")
    return [found[step]["focalpo/gamma"] for step in sorted(found)]


def test_evaluations_can_be_compared(train_many: Callable, few: Path):
    """After the fifth and the tenth step, both with the end's gamma, 0; the fifth step itself has
    the cosine's .45 (1 + cos(pi 4/9)) / 2 = .264."""
    evaluate = ("--eval.dataset", str(few / "test.jsonl"), "--eval.split", "train")
    schedule = ("--focalpo.gamma_schedule", "cosine")
    run = train_many({"": (*RESTING, *MOVING, *evaluate, *schedule)})[""]
    assert run.returncode == 0, run.output
    found = [values["focalpo/gamma"] for _, values in sorted(run.steps("eval/").items())]
    assert found == [0.0, 0.0]
    assert gammas(run)[4] == pytest.approx(0.45 * (1 + math.cos(math.pi * 4 / 9)) / 2, abs=1e-6)
    accuracy = [values["acc_mean"] for _, values in sorted(run.steps("eval/").items())][-1]
    assert f" at last, accuracy {accuracy:.3f}; the model goes to" in run.said("done.")[0]


@pytest.fixture(scope="module")
def uneven(tiny: Path, train: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """``uneven(epochs)`` trains on 44 pairs in batches of 8: an epoch is five steps and a half."""
    data = tmp_path_factory.mktemp("uneven") / "pairs.jsonl"
    lines = (tiny / "train.jsonl").read_text().splitlines(keepends=True)
    data.write_text("".join(lines[:44]))

    @functools.cache
    def run(epochs: int):
        flags = ("--data.dataset", str(data), "--train.max_epochs", str(epochs))
        flags = (*RESTING, *MOVING, *flags)
        return flags, train(*flags, "--ckpt.save_steps", "3")

    return run


def resumed(train: Callable, whole, step: int, folder: Path, *flags: str):
    checkpoint = f"global_step{step}"
    shutil.copytree(whole.folder / "checkpoints" / checkpoint, folder / "checkpoints" / checkpoint)
    (folder / "checkpoints" / "latest").write_text(checkpoint)
    run = train(*flags, "--ckpt.load_enable", folder=folder)
    assert run.returncode == 0, run.output
    return run


@pytest.mark.releases
@pytest.mark.parametrize(
    ("epochs", "steps", "step", "last"),
    [(1, 5, 3, 5), (2, 11, 3, 11), (2, 11, 6, 10), (2, 11, 9, 10)],
)
def test_resumed_inside_an_epoch(
    uneven: Callable, train: Callable, tmp_path: Path, epochs: int, steps: int, step: int, last: int
):
    """22 micro-batches an epoch, four to a step, are five steps, and eleven in two epochs; gamma
    goes from .45 to 0 in equal parts. A checkpoint of step 6 or 9 resumes inside the second epoch.
    OpenRLHF then counts an epoch as five whole steps, so it ends a step early: the gammas of the
    trained steps are those of the whole run."""
    flags, whole = uneven(epochs)
    expected = [0.45 - 0.45 * place / (steps - 1) for place in range(steps)]
    assert gammas(whole) == pytest.approx(expected, abs=1e-6)
    run = resumed(train, whole, step, tmp_path, *flags, "--logger.wandb.run_name", "again")
    assert sorted(run.steps("train/")) == list(range(step + 1, last + 1))
    assert gammas(run) == pytest.approx(expected[step:last], abs=1e-6)
    assert not run.said("changes over the run")
    (line,) = run.said("done.")
    assert f"done. {last} steps; loss 0.5074 at first (gamma 0.45), " in line
    assert "; the model goes to " in line
    link = json.loads((tmp_path / "tensorboard" / "again" / "focalpo_plugins.json").read_text())
    (before,) = (whole.folder / "tensorboard").iterdir()
    assert link == {"resumed": {"after": step, "log": before.name}}


def test_resumed_with_another_length(uneven: Callable, train: Callable, tmp_path: Path):
    """Three epochs of 22 micro-batches are 16 steps. With allow_changed nothing is known about the
    earlier run, so the first loss is that of the first resumed step."""
    flags, whole = uneven(2)
    longer = (*flags, "--train.max_epochs", "3")
    run = resumed(train, whole, 9, tmp_path / "longer", *longer)
    (line,) = run.said("warning: --focalpo.gamma changes over the run")
    assert "the checkpoint's run had 11 steps, but this one has 16" in line
    allowed = resumed(train, whole, 9, tmp_path / "allowed", *flags, "--focalpo.allow_changed")
    (line,) = allowed.said("done.")
    first = 2**-0.045 * math.log(2)  # the tenth of eleven gammas is .045
    ends = f"{first:.4f} at step 10 (gamma 0.045), {first:.4f} at last (gamma 0.045)"
    assert f"done. 10 steps; loss {ends}; " in line


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--focalpo.gamma_end", "2"), "--focalpo.gamma_end must be below 1/ln 2 = 1.4427"),
        (("--focalpo.gamma_end", "low"), "--focalpo.gamma_end must be a finite number of at least"),
        (
            ("--focalpo.gamma_schedule", "cosine"),
            "--focalpo.gamma_schedule 'cosine' needs gamma_end, got none",
        ),
        (("--focalpo.margin", "simpo"), "unknown flag --focalpo.margin, got"),
    ],
)
def test_refused(commands: Callable, flags: tuple[str, ...], message: str):
    ((code, output),) = commands([("--loss", "focalpo", *EAGER, *flags)])
    assert code == 2
    assert message in output
