"""Faults in the middle of a run, in real processes."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
from harness import ON_CPU, TWO_RANKS, Axolotl, Run, with_nan, without_paths, zero3_on_cpu


@pytest.fixture(scope="module")
def trained(once: Axolotl) -> Run:
    """Four steps, with a checkpoint after every second one."""
    return once.train(max_steps=4, save_steps=2, output_dir=str(once.folder / "trained"))


def resumed(axolotl: Axolotl, checkpoint: Path, **changes: object) -> Run:
    whole = {"max_steps": 4, "save_steps": 2, "resume_from_checkpoint": str(checkpoint)}
    return axolotl("train", axolotl.config(**{**whole, **changes}))


@pytest.mark.xdist_group("trained")
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"focalpo_variant": "incorrect"}, "focalpo_variant was 'correct', got 'incorrect': "),
        ({"dpo_label_smoothing": 0.1}, "dpo_label_smoothing was 0.0, got 0.1: "),
        (
            {"dpo_loss_type": ["robust"], "dpo_label_smoothing": 0.1},
            "dpo_loss_type was ['sigmoid'], ",
        ),
        (
            {"dpo_loss_type": ["sigmoid"], "dpo_loss_weights": [2.0]},
            "dpo_loss_weights was [1.0], got [2.0]: ",
        ),
        ({"dpo_use_weighting": True}, "dpo_use_weighting was False, got True: "),
        # Under the name that the user wrote.
        ({"rl_beta": None, "trl": {"beta": 0.2}}, "trl.beta was 0.1, got 0.2: "),
    ],
    ids=["variant", "label smoothing", "loss type", "weights", "weighting", "trl"],
)
def test_a_checkpoint_of_another_loss(axolotl: Axolotl, trained: Run, changes, message):
    run = resumed(axolotl, trained.checkpoints[0], **changes)
    assert run.code != 0
    assert message in run.output and "focalpo_allow_changed: true" in run.output
    assert "'loss':" not in run.output  # no step was trained
    assert not (axolotl.folder / "out" / "checkpoint-4").exists()


@pytest.mark.xdist_group("trained")
def test_another_loss_if_told_so(axolotl: Axolotl, trained: Run):
    """The earlier steps are the checkpoint's, and the saved record has the loss of the last
    ones."""
    changed = {"focalpo_gamma": 0.5, "focalpo_allow_changed": True}
    run = resumed(axolotl, trained.checkpoints[0], **changed)
    assert run.code == 0, run.output[-4000:]
    assert run.steps("loss")[:2] == trained.steps("loss")[:2]
    assert run.steps("loss")[2:] != trained.steps("loss")[2:]
    again = resumed(axolotl, run.checkpoints[-1], max_steps=5)
    assert again.code != 0 and "focalpo_gamma was 0.5, got 0.05" in again.output


@pytest.mark.xdist_group("trained")
@pytest.mark.parametrize("half", [True, False], ids=["half", "missing"])
def test_a_half_written_checkpoint(axolotl: Axolotl, trained: Run, tmp_path: Path, half: bool):
    """The host writes trainer_state.json last."""
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(trained.checkpoints[0], checkpoint)
    state = checkpoint / "trainer_state.json"
    if half:
        state.write_text(state.read_text()[: state.stat().st_size // 2])
    else:
        state.unlink()
    run = resumed(axolotl, checkpoint)
    assert run.code != 0
    assert "resume_from_checkpoint must be a complete checkpoint, got " in run.output
    assert "trainer_state.json can't be read" in run.output


def test_margins_that_are_not_finite_are_the_last_line(
    axolotl: Axolotl, tiny: Path, tmp_path: Path
):
    """On ZeRO-3 with two ranks, after the launcher's own lines, which come from torch in every
    release of Axolotl. The contract tests that both ranks stop."""
    lines = (tiny / "train.jsonl").read_text().splitlines(keepends=True)[:48]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(lines))
    with_nan(tiny / "model", pairs, tmp_path / "lost")
    config = axolotl.config(
        base_model=str(tmp_path / "lost"),
        datasets=[{"path": str(pairs), "ds_type": "json", "split": "train",
                   "type": "chat_template.argilla_chat"}],
        deepspeed=zero3_on_cpu(axolotl.folder),
        gradient_accumulation_steps=1,
        save_steps=1,
        plugins=["test_only_plugins.GlooOnCPU"],
    )  # fmt: skip
    run = axolotl("train", config, *TWO_RANKS, ranks=2, **ON_CPU)
    assert run.code != 0
    assert run.output.splitlines()[-1].startswith(
        "focalpo_plugins: focalpo: reward margins are not finite, step "
    )


LORA = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True}


def setting(axolotl: Axolotl, alone: bool) -> tuple[dict[str, object], dict[str, str]]:
    """Keys and variables of six steps, with LoRA on one rank or with ZeRO-3 on two."""
    if alone:
        return {**LORA, "plugins": ["test_only_plugins.Killed"]}, {}
    zero3 = {"deepspeed": zero3_on_cpu(axolotl.folder), "gradient_accumulation_steps": 1}
    plugins = ["test_only_plugins.GlooOnCPU", "test_only_plugins.Killed"]
    return {**zero3, "plugins": plugins}, ON_CPU


@pytest.fixture(scope="session")
def never_killed(once: Axolotl) -> dict[bool, Run]:
    found = {}
    for alone in (True, False):
        changes, variables = setting(once, alone)
        folder = str(once.folder / f"whole_{alone}")
        ranks = 1 if alone else 2
        found[alone] = once.train(ranks=ranks, how=variables, output_dir=folder, **changes)
    return found


@pytest.mark.xdist_group("never_killed")
@pytest.mark.parametrize(
    "alone, killed, launcher",
    [(False, "1", TWO_RANKS), (False, "0,1", ()), (True, "0", ())],
    ids=["one", "all", "LoRA"],
)
def test_killed_and_started_again(
    axolotl: Axolotl, never_killed, alone: bool, killed: str, launcher: tuple[str, ...]
):
    """kill -9 in step 4 of six, after the checkpoint of step 3: running the same command again
    gives the losses and gradient norms of a run that was never killed. If one rank is killed, its
    launcher ends the other."""
    changes, variables = setting(axolotl, alone)
    config = axolotl.config(**changes, auto_resume_from_checkpoints=True)
    ranks = 1 if alone else 2
    at_step_4 = {"KILLED_AT": "4", "KILLED_RANKS": killed}
    first = axolotl("train", config, *launcher, ranks=ranks, **variables, **at_step_4)
    assert first.code != 0
    assert [path.name for path in first.checkpoints] == ["checkpoint-3"]
    second = axolotl("train", config, ranks=ranks, **variables)
    assert second.code == 0, second.output[-4000:]
    whole = never_killed[alone]
    assert len(whole.steps("loss")) == 6
    assert second.steps("loss", "grad_norm") == whole.steps("loss", "grad_norm")


@pytest.mark.releases
@pytest.mark.parametrize("key", ["output_dir", "dataset_prepared_path"])
def test_a_folder_that_is_read_only(axolotl: Axolotl, key: str):
    """Axolotl itself notices it before it trains, and names the folder."""
    folder = axolotl.folder / "read only"
    folder.mkdir(mode=0o555)
    config = axolotl.config(**{key: str(folder)})
    faults = {"first": ["disk_faults.sitecustomize"], "PERMISSIONS_HOLD": "1"}
    run = axolotl("train", config, **faults)
    assert run.code != 0
    assert run.output.splitlines()[-1].startswith(
        f"PermissionError: [Errno 13] Permission denied: '{folder}/"
    )
    assert "'loss':" not in run.output and not list(folder.iterdir())


DPO = {"rl": "dpo", "focalpo_gamma": None, "focalpo_variant": None, "max_steps": 1}


def test_half_a_package(axolotl: Axolotl, package_copy: Path):
    """With a syntax error in one module and another module missing, `rl: dpo` trains as before, and
    `rl: focalpo` trains nothing."""
    (package_copy / "focalpo_plugins" / "loss.py").write_text("def focalpo_loss(:\n")
    (package_copy / "focalpo_plugins" / "registry.py").unlink()
    broken = {"path": [package_copy], "fresh": True}
    dpo = axolotl.train(**DPO, how=broken)
    assert dpo.steps("loss")[0][0] == pytest.approx(math.log(2), abs=1e-6)
    assert "focalpo" not in without_paths(dpo.output, axolotl.folder)
    folder = axolotl.folder / "focalpo"
    ours = axolotl("train", axolotl.config(output_dir=str(folder), max_steps=1), **broken)
    assert ours.code != 0
    assert (
        "No module named 'focalpo_plugins.registry'" in ours.output or "SyntaxError" in ours.output
    )
    assert not ours.checkpoints


def test_a_third_party_that_raises_at_import(axolotl: Axolotl, broken_third_party: Path):
    run = axolotl.train(max_steps=1, how={"path": [broken_third_party]})
    assert run.steps("loss")[0][0] == pytest.approx(2**-0.05 * math.log(2), abs=1e-6)
    assert "the package bad failed to register its losses and is left out" in run.output
