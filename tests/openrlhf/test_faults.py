"""Faults in the middle of a run, in real processes."""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import with_nan
from openrlhf_flags import of_host

# One worker makes the runs that several tests share.
shares_run = pytest.mark.xdist_group("never killed")

OURS = ("--loss", "focalpo")
# Ten steps, a checkpoint after the third, the sixth and the ninth.
TWO_EPOCHS = ("--ckpt.save_steps", "3", "--train.max_epochs", "2", "--lr_scheduler", "constant")
ZERO3 = ("--ds.zero_stage", "3")
LORA = ("--ds.lora.rank", "8", "--ds.lora.alpha", "16", "--ds.zero_stage", "2")
RECORD = "checkpoints/global_step3/focalpo_plugins.json"
TAGS = ("loss", "grad_norm", "focalpo/p", "chosen_reward")


@pytest.fixture(scope="module")
def never_killed(train: Callable) -> Callable:
    """With ZeRO-3 on two ranks, or with LoRA on one."""

    @functools.cache
    def run(alone: bool):
        found = train(*OURS, *TWO_EPOCHS, *(LORA if alone else ZERO3), ranks=1 if alone else 2)
        assert found.returncode == 0, found.output
        assert sorted(found.steps("train/")) == list(range(1, 11))
        return found

    return run


@shares_run
@pytest.mark.releases
def test_a_checkpoint_says_what_it_was_trained_with(never_killed):
    """It also records the run's steps, and the first rank's losses of the first and the last
    step."""
    record = json.loads((never_killed(False).folder / RECORD).read_text())
    run = record.pop("run")
    assert record == {
        "loss": "focalpo",
        "focalpo.gamma": 0.05,
        "focalpo.variant": "correct",
        "beta": 0.1,
        "label_smoothing": 0.0,
        "aux_loss_coef": 0,
        "nll_loss_coef": 0,
    }
    assert run["steps"] == 10 and (never_killed(False).folder / "tensorboard" / run["log"]).is_dir()
    losses = [step["loss_mean"] for _, step in sorted(never_killed(False).steps("train/").items())]
    assert run["losses"] == pytest.approx([losses[0], losses[2]], abs=1e-6)


@shares_run
@pytest.mark.parametrize(
    "alone, ranks", [(False, "1"), (False, "0,1"), (True, "0")], ids=["one", "all", "LoRA"]
)
def test_killed_and_started_again(train, never_killed, tmp_path: Path, alone: bool, ranks: str):
    """kill -9 after step 4: resuming from the checkpoint of step 3 gives the losses and gradient
    norms of the run that was never killed, step for step."""
    launch = {"folder": tmp_path, "ranks": 1 if alone else 2}
    flags = (*OURS, *TWO_EPOCHS, *(LORA if alone else ZERO3))
    run = train(*flags, **launch, first=["killed_openrlhf"], KILLED_AT="4", KILLED_RANKS=ranks)
    assert run.returncode != 0
    checkpoints = tmp_path / "checkpoints"
    assert [path.name for path in checkpoints.glob("global_step*")] == ["global_step3"], run.output
    shutil.rmtree(tmp_path / "tensorboard")
    again = train(*flags, "--ckpt.load_enable", **launch)
    assert again.returncode == 0, again.output
    whole, rest = never_killed(alone).steps("train/"), again.steps("train/")
    assert sorted(rest) == list(range(4, 11))
    for step, values in rest.items():
        assert {tag: values[tag] for tag in TAGS} == {tag: whole[step][tag] for tag in TAGS}, step


@shares_run
@pytest.mark.parametrize(
    "flags, message",
    [
        (("--model.nll_loss_coef", "0.2"), "--model.nll_loss_coef was 0, got 0.2: resuming would"),
        (("--model.aux_loss_coef", "0.2"), "--model.aux_loss_coef was 0, got 0.2: resuming would"),
    ],
    ids=["NLL", "routers"],
)
def test_a_checkpoint_of_another_loss(train, never_killed, tmp_path: Path, flags, message):
    shutil.copytree(never_killed(True).folder / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "latest").write_text("global_step9")
    again = (*OURS, *TWO_EPOCHS, *LORA, "--ckpt.load_enable", *flags)
    run = train(*again, folder=tmp_path)
    assert run.returncode != 0 and message in run.output
    assert "global_step9. Set the values that it was trained with" in run.output
    assert not run.steps("train/")


@shares_run
def test_a_checkpoint_of_an_earlier_release(train, never_killed, tmp_path: Path):
    """Before 0.2.0 fewer values were recorded, and nothing about the run: it resumes, with a
    warning."""
    shutil.copytree(never_killed(True).folder / "checkpoints", tmp_path / "checkpoints")
    path = tmp_path / "checkpoints" / "global_step9" / "focalpo_plugins.json"
    record = json.loads(path.read_text())
    for key in ("run", "aux_loss_coef", "nll_loss_coef"):
        del record[key]
    path.write_text(json.dumps(record))
    again = (*OURS, *TWO_EPOCHS, *LORA, "--ckpt.load_enable", "--model.nll_loss_coef", "0.2")
    run = train(*again, folder=tmp_path)
    assert run.returncode == 0, run.output
    (line,) = run.said("was saved by an earlier release")
    assert "did not record --model.aux_loss_coef, --model.nll_loss_coef. " in line
    assert " at step 10, " in run.said("done.")[0]
    changed = train(*again, "--model.beta", "0.2", folder=tmp_path)
    assert changed.returncode and "--model.beta was 0.1, got 0.2" in changed.output


@shares_run
def test_an_error_on_one_rank_ends_all(train, train_many, never_killed, tmp_path: Path):
    """Only the first rank reads the record and opens the log. Whatever it finds, here too many
    brackets for Python and a file instead of a folder, the other rank doesn't wait for it."""
    shutil.copytree(never_killed(False).folder / "checkpoints", tmp_path / "checkpoints")
    for record in (tmp_path / "checkpoints").rglob("focalpo_plugins.json"):
        record.write_text("[" * 100_000)
    (tmp_path / "file").touch()
    runs = train_many(
        {
            "RecursionError": (
                *(*OURS, *TWO_EPOCHS, *ZERO3, "--ckpt.load_enable"),
                *("--ckpt.path", str(tmp_path / "checkpoints")),
            ),
            "FileExistsError": (*OURS, *ZERO3, "--logger.tensorboard_dir", str(tmp_path / "file")),
        },
        ranks=2,
    )
    for error, run in runs.items():
        assert run.returncode == 1
        # torch puts the rank before each line of an error that ends a process.
        said = rf"^(?:\[rank\d\]: )?focalpo_plugins.errors.RunError: on rank 0: {error}: "
        ends = re.findall(said, run.stderr, re.M)
        assert len(ends) == 2, run.output
        assert not run.steps("train/")


@shares_run
@pytest.mark.releases
def test_two_ranks_refuse_a_checkpoint_of_the_hosts_dpo(train, never_killed, tmp_path: Path):
    """A checkpoint without our record; only rank 0 looks and reports it, and both stop."""
    shutil.copytree(never_killed(False).folder / "checkpoints", tmp_path / "checkpoints")
    for record in (tmp_path / "checkpoints").rglob("focalpo_plugins.json"):
        record.unlink()
    flags = (*OURS, *TWO_EPOCHS, *ZERO3, "--ckpt.load_enable")
    run = train(*flags, ranks=2, folder=tmp_path)
    assert run.returncode == 1
    assert len(run.said("has no record of a loss of focalpo_plugins")) == 1
    assert "Traceback" not in run.stderr
    assert not run.steps("train/")


def test_margins_that_are_not_finite_are_the_last_line(
    train, tiny: Path, few: Path, tmp_path: Path
):
    """Both ranks, after the launcher's own lines."""
    with_nan(tiny / "model", few / "train.jsonl", tmp_path / "lost")
    model = ("--model.model_name_or_path", str(tmp_path / "lost"))
    run = train(*OURS, *ZERO3, *model, launcher="torchrun", ranks=2)
    assert run.returncode != 0
    start = "focalpo_plugins: focalpo: reward margins are not finite, step "
    assert run.stderr.splitlines()[-1].startswith(start), run.output


DISK_FAULTS = {"first": ["disk_faults.sitecustomize"]}


@pytest.mark.releases
def test_a_full_disk(train, tmp_path: Path):
    """Two ranks stop with one line, and nothing looks like a checkpoint. The launcher can't repeat
    the line: there is no space for that either."""
    run = train(
        *(*OURS, *ZERO3, "--ckpt.save_steps", "2"),
        ranks=2,
        folder=tmp_path,
        **DISK_FAULTS,
        FULL_AT="focalpo_plugins.json",
    )
    assert run.returncode != 0
    (line,) = run.said("the checkpoint folder must be writable and have free space")
    assert str(tmp_path / "checkpoints") in line and "File too large" in line
    assert max(run.steps("train/"), default=0) <= 2
    checkpoints = tmp_path / "checkpoints"
    assert not (checkpoints / "latest").exists()
    assert not list(checkpoints.rglob("focalpo_plugins.json*"))


@pytest.mark.releases
@pytest.mark.parametrize("name", ["ckpt.output_dir", "ckpt.path"])
def test_a_folder_that_is_read_only(train, tmp_path: Path, name: str):
    """OpenRLHF would notice only at its first checkpoint, or after training."""
    folder = tmp_path / "read only"
    folder.mkdir(mode=0o555)
    asked = (*OURS, "--ckpt.save_steps", "2", f"--{name}", str(folder))
    run = train(*asked, folder=tmp_path, **DISK_FAULTS, PERMISSIONS_HOLD="1")
    assert run.returncode == 1
    (flag,) = of_host([f"--{name}"])
    assert run.said("must be a writable folder") == [
        f"focalpo_plugins: {flag} must be a writable folder, got {str(folder)!r}: "
        "Permission denied. Choose another, or change its permissions."
    ]
    assert not run.steps("train/") and not list(folder.iterdir())


def test_a_folder_where_no_checkpoints_are_asked_for(train_many, tmp_path: Path):
    """The folder is neither created nor checked; its path is under a file, where no folder can
    be."""
    (tmp_path / "file").touch()
    unusable = ("--ckpt.path", str(tmp_path / "file" / "in it"))
    saves = ("--ckpt.save_steps", "2")
    runs = train_many(
        {
            "default": OURS,
            "unusable": (*OURS, *unusable),
            "not DeepSpeed's": (*OURS, *unusable, *saves, "--ckpt.disable_ds"),
            "used": (*OURS, *unusable, *saves, "--ckpt.disable_ds", "--ckpt.save_hf"),
        }
    )
    for name in ("default", "unusable", "not DeepSpeed's"):
        assert runs[name].returncode == 0, runs[name].output
        assert not (runs[name].folder / "checkpoints").exists()
    assert runs["used"].returncode == 1
    (line,) = runs["used"].said("must be a writable folder")
    assert line.startswith("focalpo_plugins: --ckpt.path must be a writable folder, ")
    assert not runs["used"].steps("train/")


def test_killed_before_the_record_is_there(train, tmp_path: Path):
    """A checkpoint is named in `latest` only once it has its record."""
    flags = (*OURS, "--ckpt.save_steps", "2")
    run = train(*flags, folder=tmp_path, **DISK_FAULTS, KILLED_AT_NAMING="focalpo_plugins.json")
    assert run.returncode == -9, run.output
    assert not (tmp_path / "checkpoints" / "latest").exists()
    assert not list((tmp_path / "checkpoints").rglob("focalpo_plugins.json"))


@shares_run
@pytest.mark.parametrize("content", ["", '{"loss": "foc', "[]"])
def test_a_damaged_record(train_many, never_killed, tmp_path: Path, content: str):
    shutil.copytree(never_killed(True).folder / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints/global_step9/focalpo_plugins.json").write_text(content)
    path = ("--ckpt.path", str(tmp_path / "checkpoints"))
    run = train_many({"": (*OURS, *TWO_EPOCHS, *LORA, "--ckpt.load_enable", *path)})[""]
    assert run.returncode != 0
    assert "records what the checkpoint was trained with, and can't be read" in run.stderr
    assert not run.steps("train/")


def test_half_a_package(train_many, package_copy: Path):
    """With a syntax error in one module and another module missing, OpenRLHF's own loss trains as
    before, and `--loss` is an unknown flag."""
    (package_copy / "focalpo_plugins" / "loss.py").write_text("def focalpo_loss(:\n")
    (package_copy / "focalpo_plugins" / "registry.py").unlink()
    dpo, ours = train_many({"dpo": (), "ours": OURS}, package_copy).values()
    assert dpo.returncode == 0, dpo.output
    assert dpo.steps("train/")[1]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert len(dpo.said("focalpo_plugins: no --loss (")) == 1
    assert ours.returncode == 2 and "unrecognized arguments: --loss focalpo" in ours.output


def test_a_third_party_that_raises_at_import(train_many, broken_third_party: Path):
    runs = train_many({"focalpo": OURS, "dpo": ()}, broken_third_party)
    for name, first in (("focalpo", 2**-0.05 * math.log(2)), ("dpo", math.log(2))):
        run = runs[name]
        assert run.returncode == 0, run.output
        assert run.steps("train/")[1]["loss"] == pytest.approx(first, abs=1e-5)
        assert len(run.said("the package bad failed to register its losses and is left out")) == 1
