"""The ``focalpo`` command without a host: help, errors, curves, and reports on logs written here."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
from harness import focalpo, run_python

COMMANDS = ("check", "curves", "report", "score")
PNG = b"\x89PNG\r\n\x1a\n"


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def test_help_lists_the_commands_and_imports_nothing_heavy():
    done = focalpo("--help")
    assert done.returncode == 0
    for command in COMMANDS:
        assert f"\n    {command} " in done.stdout
    script = (
        "import sys, focalpo_plugins.cli as cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: print(*sys.modules)"
    )
    loaded = set(run_python("-c", script).stdout.split())
    assert "focalpo_plugins.cli" in loaded
    assert not loaded & {"torch", "numpy", "matplotlib", "transformers", "axolotl", "openrlhf"}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_with_an_example(command: str):
    done = focalpo(command, "--help")
    assert done.returncode == 0
    assert f"example:\n  focalpo {command} " in done.stdout


# One line each, and no traceback: arguments, what is said.
ERRORS = [
    ([], "the following arguments are required: COMMAND"),
    (["cruves"], "invalid choice: 'cruves'"),
    (["curves", "--gamma", "-1"], "--gamma must be a finite number of at least 0, got -1.0"),
    (["curves", "--gamma", "x"], "argument --gamma: invalid float value: 'x'"),
    (["curves", "--variant", "corect"], "--variant must be one of correct, correct_exact, incorrect, got 'corect'"),
    (["curves", "--format", "csv", "--out", "FILE"], "--out must be a folder, got"),
    (["report", "nowhere"], "RUN must be a run's folder or log, got 'nowhere': nothing there."),
    (["report", "EMPTY"], "RUN must hold trainer_state.json, checkpoint-*/trainer_state.json or"),
    (["report", "FILE"], "must be a trainer_state.json with log_history and global_step, and is not."),
    (["report", "NOLOSS"], "RUN must be the log of a training run, got"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "said"), ERRORS, ids=lambda value: str(value)[:40])
def test_errors(arguments: list[str], said: str, tmp_path: Path):
    (tmp_path / "file.json").write_text("not json")
    (tmp_path / "empty").mkdir()
    write_state(tmp_path / "noloss", [{"step": 1, "lr": 0.1}])
    places = {"FILE": "file.json", "EMPTY": "empty", "NOLOSS": "noloss"}
    done = focalpo(*(str(tmp_path / places[a]) if a in places else a for a in arguments))
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("curves")
    done = focalpo("curves", "--out", folder, "--format", "png", "svg", "csv")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_curves_mark_the_peak_and_the_reversal(drawn: tuple[Path, str]):
    """With ``p = sigmoid(z)`` the push of `correct` is ``(1 - p) p^g (1 + g log p)``.  Its
    derivative with respect to z, divided by ``(1 - p) p^g``, is
    ``(g - (1 + g) p) (1 + g log p) + g (1 - p)``, whose root for g = 0.05 is found here by
    bisection: z = -2.24.  z* is ``logit(exp(-20)) = -20.00``."""
    gamma = 0.05

    def slope(z: float) -> float:
        p = 1 / (1 + math.exp(-z))
        return (gamma - (1 + gamma) * p) * (1 + gamma * math.log(p)) + gamma * (1 - p)

    low, high = -10.0, 5.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    assert f"{low:.2f}" == "-2.24"
    p = 1 / (1 + math.exp(-low))
    height = (1 - p) * p**gamma * (1 + gamma * math.log(p))

    folder, said = drawn
    line = next(line for line in said.splitlines() if line.startswith("correct gamma=0.05"))
    loss_at_0, push_at_0 = 2**-gamma * math.log(2), 2**-gamma * (1 - gamma * math.log(2)) / 2
    expected = [loss_at_0, push_at_0]
    assert line.split()[2:] == [*(f"{x:.4f}" for x in expected), "-2.24", f"{height:.4f}", "-20.00"]
    svg = (folder / "fig3.svg").read_text()
    assert "peak at z = -2.24, z* = -20.00" in svg
    assert "reward margin z (nats)" in svg


def test_curves_are_those_of_the_paper(drawn: tuple[Path, str]):
    """Values by hand: at p = 1/2 the losses are ``ln 2`` and ``2^-0.05 ln 2``, and with the factor
    ``1 - p`` half of DPO's; at z = 0 Eq. 6's terms are ``2^-0.05 / 2`` and that times
    ``-0.05 ln 2``; at z = -20 FocalPO's push is 0 and DPO's 1."""
    folder, _ = drawn
    for name in ("fig2", "fig3", "fig4"):
        assert (folder / f"{name}.png").read_bytes()[:8] == PNG
    half = next(row for row in rows(folder / "fig2.csv") if float(row["p"]) == 0.5)
    assert float(half["dpo"]) == pytest.approx(math.log(2))
    assert float(half["correct_gamma_0.05"]) == pytest.approx(2**-0.05 * math.log(2))
    assert float(half["incorrect_gamma_1"]) == pytest.approx(math.log(2) / 2)
    zero = next(row for row in rows(folder / "fig3.csv") if abs(float(row["z"])) < 1e-9)
    first = 2**-0.05 / 2
    assert float(zero["factor_term"]) == pytest.approx(first)
    assert float(zero["derivative_term"]) == pytest.approx(-0.05 * math.log(2) * first)
    assert float(zero["total"]) == pytest.approx(first * (1 - 0.05 * math.log(2)))
    star = next(row for row in rows(folder / "fig4.csv") if abs(float(row["z"]) + 20) < 1e-9)
    assert float(star["correct_gamma_0.05"]) == pytest.approx(0, abs=1e-8)
    assert float(star["dpo"]) == pytest.approx(1)


def test_without_matplotlib_the_numbers_come_all_the_same(tmp_path: Path):
    (tmp_path / "matplotlib.py").write_text("raise ModuleNotFoundError('blocked')")
    refused = focalpo("curves", "--out", tmp_path / "a", path=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.startswith("focalpo curves: error: pictures need matplotlib, which is")
    assert "pip install 'focalpo_plugins[plots]'" in refused.stderr
    done = focalpo("curves", "--format", "csv", "--out", tmp_path / "b", path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [
        "fig2.csv",
        "fig3.csv",
        "fig4.csv",
    ]


def write_state(folder: Path, log: list[dict[str, float]], step: int = 0) -> None:
    folder.mkdir(parents=True)
    state = {"global_step": step or log[-1]["step"], "log_history": log}
    (folder / "trainer_state.json").write_text(json.dumps(state))


def trl_log(steps: int, weight: bool) -> list[dict[str, float]]:
    """At step s the loss is 1/s, the margin s and the accuracy s/100; evaluated at the end."""
    log = []
    for s in range(1, steps + 1):
        entry = {"step": s, "loss": 1 / s, "rewards/margins": s, "rewards/accuracies": s / 100}
        log.append({**entry, "focalpo/weight": 0.9, "focalpo/reversed": 0.25} if weight else entry)
    ends = {"eval_loss": 0.5, "eval_rewards/margins": 7.0, "eval_rewards/accuracies": 0.75}
    return [*log, {"step": steps, **ends}]


def test_report_of_trainer_states(tmp_path: Path):
    """Of 20 steps the last tenth is 19 and 20: the mean margin is 19.5, the mean loss
    ``(1/19 + 1/20) / 2``.  The checkpoint that got farthest is read, not the last by name."""
    write_state(tmp_path / "dpo" / "checkpoint-9", trl_log(9, weight=False))
    write_state(tmp_path / "dpo" / "checkpoint-20", trl_log(20, weight=False))
    write_state(tmp_path / "other" / "focal", trl_log(20, weight=True))
    out = tmp_path / "out"
    done = focalpo("report", tmp_path / "dpo", f"Mine={tmp_path / 'other' / 'focal'}", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "checkpoint-20" in done.stdout
    assert (out / "report.png").read_bytes()[:8] == PNG
    table = rows(out / "report.csv")
    assert [(row["run"], row["split"], row["step"]) for row in table] == [
        ("dpo", "train", "20"),
        ("dpo", "eval", "20"),
        ("Mine", "train", "20"),
        ("Mine", "eval", "20"),
    ]
    train, held_out, mine, _ = table
    assert float(train["first_loss"]) == 1
    assert float(train["loss"]) == pytest.approx((1 / 19 + 1 / 20) / 2)
    assert float(train["margin"]) == 19.5
    assert float(train["accuracy"]) == pytest.approx(0.195)
    assert (train["weight"], held_out["weight"]) == ("", "")
    assert (held_out["loss"], held_out["margin"], held_out["accuracy"]) == ("0.5", "7.0", "0.75")
    assert float(mine["weight"]) == pytest.approx(0.9)
    assert float(mine["reversed"]) == 0.25


def test_report_of_tensorboard(tmp_path: Path):
    """OpenRLHF's names.  It logs no margin: chosen less rejected reward, here ``s - (-s) = 2 s``."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "run" / "tensorboard" / "exp")) as writer:
        for s in range(1, 11):
            values = {
                "loss": 9,
                "loss_mean": 1 / s,
                "acc": 0,
                "acc_mean": 0.5,
                "focalpo/weight": 0.75,
            }
            for key, value in {**values, "chosen_reward": s, "reject_reward": -s}.items():
                writer.add_scalar(f"train/{key}", value, s)
        writer.add_scalar("eval/eval_loss", 0.25, 10)
    out = tmp_path / "out"
    done = focalpo("report", tmp_path / "run", "--out", out)
    assert done.returncode == 0, done.stderr
    train, held_out = rows(out / "report.csv")
    assert (train["run"], train["step"]) == ("run", "10")
    assert float(train["loss"]) == pytest.approx(0.1)
    assert (train["margin"], train["accuracy"], train["weight"]) == ("20.0", "0.5", "0.75")
    assert (held_out["split"], held_out["loss"], held_out["margin"]) == ("eval", "0.25", "")


def test_report_without_tensorboard_says_what_is_missing(tmp_path: Path):
    (tmp_path / "tensorboard.py").write_text("raise ModuleNotFoundError('blocked')")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "events.out.tfevents.1").write_text("")
    done = focalpo("report", tmp_path / "run", "--format", "csv", path=tmp_path)
    assert done.returncode == 2
    assert "needs tensorboard, which is not installed: pip install" in done.stderr


def test_runs_of_one_name_are_told_apart(tmp_path: Path):
    for parent in ("a", "b"):
        write_state(tmp_path / parent / "out", trl_log(3, weight=False))
    out = tmp_path / "out"
    done = focalpo("report", tmp_path / "a" / "out", tmp_path / "b" / "out", "--out", out)
    assert done.returncode == 0, done.stderr
    assert {row["run"] for row in rows(out / "report.csv")} == {"out (1)", "out (2)"}
