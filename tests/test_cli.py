"""The ``focalpo`` command without a host: help, errors, curves, and reports on logs written here."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from harness import ManyFocalpo, focalpo, run_python

from focalpo_plugins.balanced import Geometry
from focalpo_plugins.cli.check import scratch_folder
from focalpo_plugins.cli.check.batches import Largest, Way, four_ways
from focalpo_plugins.cli.check.counts import Counts, in_common
from focalpo_plugins.cli.check.printing import _of_ways
from focalpo_plugins.guards.resume import IN_TRAINER_STATE
from focalpo_plugins.plan import Window

COMMANDS = ("check", "curves", "report", "score")
PNG = b"\x89PNG\r\n\x1a\n"


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def test_a_scratch_folder_names_no_model():
    """Its path becomes the model's, and Axolotl refuses gradient checkpointing for one with "mpt" in
    it, as in tmpt0x1y2z3: one name in 37 of those that tempfile draws."""
    with scratch_folder() as folder:
        assert re.fullmatch("focalpo-[0-9a-f]{16}", folder.name)
        (folder / "model").mkdir()
    assert not folder.exists()


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


def test_without_a_command_it_shows_its_help():
    bare, asked = focalpo(), focalpo("--help")
    assert (bare.returncode, bare.stdout, bare.stderr) == (0, asked.stdout, "")


def test_python_m_is_the_command():
    done = run_python("-m", "focalpo_plugins", "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: python -m focalpo_plugins [-h]")
    assert run_python("-m", "focalpo_plugins", "report", "nowhere").returncode == 2


def test_version():
    for done in (focalpo("--version"), run_python("-m", "focalpo_plugins", "--version")):
        assert (done.returncode, done.stdout) == (
            0,
            f"focalpo_plugins {version('focalpo_plugins')}\n",
        )


# Arguments, and the message: one line each, without a traceback.
ERRORS = [
    (["cruves"], "invalid choice: 'cruves'"),
    (["curves", "--gamma", "-1"], "--gamma must be a finite number of at least 0, got -1.0"),
    (["curves", "--gamma", "x"], "argument --gamma: invalid float value: 'x'"),
    (["curves", "--variant", "corect"], "--variant must be one of correct, correct_exact, incorrect, got 'corect'"),
    (["curves", "--format", "csv", "--out", "FILE"], "--out must be a folder, got"),
    (["report", "nowhere"], "RUN must be a run's folder or log, got 'nowhere': nothing there."),
    (["report", "EMPTY"], "RUN must hold trainer_state.json, checkpoint-*/trainer_state.json or"),
    (["report", "FILE"], "must be a trainer_state.json with log_history and global_step, and is not."),
    (["report", "NOLOSS"], "RUN must be the log of a training run, got"),
    (["check", "no.yml", "--gpu-memory", "0"], "--gpu-memory must be a number of GiB above 0, got 0."),
    (["check", "--", "llamafactory-cli", "train", "x.yml"], "with its keys, got 'llamafactory-cli'. Give"),
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


@pytest.mark.xdist_group("drawn")
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


@pytest.mark.xdist_group("drawn")
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


@pytest.mark.parametrize(
    ("words", "columns"),
    [
        (("--gamma", 0.05, 0.3), ["dpo", "correct_gamma_0.05", "correct_gamma_0.3"]),
        (("--variant", "incorrect"), ["dpo", "incorrect_gamma_0.05"]),
        (("--gamma", 0), ["dpo"]),
        ((), ["dpo", "correct_gamma_0.05", "incorrect_gamma_1"]),
    ],
)
def test_curves_are_those_asked_for(reports, tmp_path: Path, words: tuple, columns: list[str]):
    """And DPO's; without a question, the paper's. Fig. 2 has in each of the paper's panels a ladder
    of gammas."""
    code, said, errors = reports("curves", *words, "--format", "svg", "csv", "--out", tmp_path)
    assert code == 0, errors
    assert list(rows(tmp_path / "fig4.csv")[0]) == ["z", *columns]
    ladder = {f"{v}_gamma_{g}" for v in ("correct", "incorrect") for g in ("0.05", "0.5", "1")}
    in_fig2 = set(columns) if words else {"dpo", *ladder}
    assert set(rows(tmp_path / "fig2.csv")[0]) == {"p", *in_fig2}
    table = said[said.index("L(0)") : said.index("push is")].splitlines()[1:]
    assert len(table) == len(columns)
    legends = (tmp_path / "fig2.svg").read_text().count("factor on")
    assert legends == (1 if words else 2)


# A gamma that training refuses without allow_reversed, and one that it takes: 1/ln 2 is 1.4427.
REFUSED = [
    ("correct", 2.0, "refused in training: gamma must be below 1/ln 2 = 1.4427 for variant 'correct', got 2.0"),
    ("correct_exact", 1.0, "refused in training: gamma must be below 1 for variant 'correct_exact', got 1.0"),
    ("correct", 1.44, ""),
    ("incorrect", 3.0, ""),
]  # fmt: skip


@pytest.mark.parametrize(("variant", "gamma", "said"), REFUSED)
def test_curves_say_what_training_would_refuse(reports, tmp_path, variant, gamma, said):
    words = ["curves", "--variant", variant, "--gamma", gamma, "--format", "csv", "--out", tmp_path]
    code, output, errors = reports(*words)
    assert code == 0, errors
    row = next(
        line for line in output.splitlines() if line.startswith(f"{variant} gamma={gamma:g}")
    )
    assert row.endswith("refused in training") is bool(said)
    lines = [line for line in output.splitlines() if line.startswith("refused in training")]
    assert [line[: len(said)] for line in lines] == ([said] if said else [])


def test_curves_of_a_gamma_that_moves(reports, tmp_path: Path):
    """From .25 to .05: at a quarter of the run .2 by the line, .25 - .2 (1 - cos 45 deg) / 2 = .2207
    by the cosine; both ends are drawn beside DPO."""
    words = ("--gamma", "0.25", "--gamma-end", "0.05", "--format", "csv", "--out", str(tmp_path))
    code, _, error = reports("curves", *words)
    assert code == 0, error
    moving = rows(tmp_path / "gamma.csv")
    assert [float(value) for value in moving[25].values()] == pytest.approx([0.25, 0.2, 0.2207107])
    assert [float(moving[-1][name]) for name in ("linear", "cosine")] == [0.05, 0.05]
    columns = ["z", "dpo", "correct_gamma_0.25", "correct_gamma_0.05"]
    assert list(rows(tmp_path / "fig4.csv")[0]) == columns
    code, _, error = reports("curves", "--gamma-end", "-1", "--out", str(tmp_path))
    assert code == 2
    assert "--gamma-end must be a finite number of at least 0, got -1.0" in error


def test_without_matplotlib_only_the_pictures_are_missing(tmp_path: Path):
    """Tables are printed and written, and one line says how to get the pictures; a picture that was
    asked for by name is refused before any work."""
    (tmp_path / "matplotlib.py").write_text("raise ModuleNotFoundError('blocked')")
    how = "pictures need matplotlib: pip install 'focalpo_plugins[plots]'"
    done = focalpo("curves", "--out", tmp_path / "a", path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in sorted((tmp_path / "a").iterdir())] == [
        "fig2.csv",
        "fig3.csv",
        "fig4.csv",
    ]
    assert "push at 0" in done.stdout
    assert done.stdout.count(f"no picture: {how}") == 1
    write_state(tmp_path / "run", [{"step": 1, "loss": 0.5}])
    report = focalpo("report", tmp_path / "run", "--out", tmp_path / "b", path=tmp_path)
    assert report.returncode == 0, report.stderr
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["report.csv"]
    assert "0.5000" in report.stdout
    assert f"no picture: {how}" in report.stdout
    refused = focalpo("curves", "--format", "png", "--out", tmp_path / "c", path=tmp_path)
    assert refused.returncode == 2
    assert f"--format png: {how}, or give csv only." in refused.stderr
    assert not (tmp_path / "c").exists()
    only = focalpo("curves", "--format", "csv", "--out", tmp_path / "c", path=tmp_path)
    assert only.returncode == 0, only.stderr
    assert "no picture" not in only.stdout


def test_a_margin_less_its_target_is_told_from_the_hosts(tmp_path: Path, reports: ManyFocalpo):
    """TRL's margin and accuracy of SimPO have no target, so they can seem to contradict ours."""
    for margin in ("simpo", "dpo"):
        write_state(tmp_path / margin, [{"step": 1, "loss": 0.5}])
        path = tmp_path / margin / "trainer_state.json"
        record = {"args": {"record": {"loss": "focalpo", "margin": margin}}}
        state = {**json.loads(path.read_text()), "stateful_callbacks": {IN_TRAINER_STATE: record}}
        path.write_text(json.dumps(state))
        code, said, error = reports("report", tmp_path / margin, "--format", "csv")
        assert code == 0, error
        assert ("are of the margin less the target" in said) == (margin == "simpo")


def test_each_report_and_each_curve_has_a_folder_of_its_own(tmp_path: Path):
    """Nothing that other arguments have drawn is replaced, if --out names no folder."""
    for name in "ab":
        write_state(tmp_path / name, [{"step": 1, "loss": 0.5}])
    asked = [("report", "a"), ("report", "a", "x=b"), ("curves",), ("curves", "--gamma", "0.3")]
    many = ManyFocalpo(tmp_path)
    for words in asked:
        code, _, error = many(*words, "--format", "csv")
        assert code == 0, error
    found = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.csv"))
    folders = ("curves", "curves-correct-0.3")
    curves = [f"{folder}/fig{number}.csv" for folder in folders for number in (2, 3, 4)]
    assert found == sorted([*curves, "report-a/report.csv", "report-a-x/report.csv"])


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> ManyFocalpo:
    return ManyFocalpo(tmp_path_factory.mktemp("reports"))


def write_state(folder: Path, log: list[dict[str, float]], step: int = 0) -> None:
    folder.mkdir(parents=True)
    state = {"global_step": step or log[-1]["step"], "log_history": log}
    (folder / "trainer_state.json").write_text(json.dumps(state))


def trl_log(steps: int, weight: bool) -> list[dict[str, float]]:
    """At step s the loss is 1/s, the margin s and the accuracy s/100; the evaluation is at the
    end."""
    log = []
    for s in range(1, steps + 1):
        entry = {"step": s, "loss": 1 / s, "rewards/margins": s, "rewards/accuracies": s / 100}
        log.append({**entry, "focalpo/weight": 0.9, "focalpo/reversed": 0.25} if weight else entry)
    ends = {"eval_loss": 0.5, "eval_rewards/margins": 7.0, "eval_rewards/accuracies": 0.75}
    return [*log, {"step": steps, **ends}]


def test_report_of_trainer_states(tmp_path: Path):
    """The last tenth of 20 steps is 19 and 20: the mean margin is 19.5, the mean loss ``(1/19 +
    1/20) / 2``. The checkpoint with the most steps is read, not the last by name."""
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
    assert held_out["first_loss"] == ""  # the one of step 20
    assert float(mine["weight"]) == pytest.approx(0.9)
    assert float(mine["reversed"]) == 0.25


@pytest.mark.parametrize(("accuracy", "margin"), [(0.0, 0.0), (0.5, 0.0), (0.0, -0.1)])
def test_report_says_why_the_accuracy_starts_at_0(reports, tmp_path, accuracy, margin):
    """If policy and reference are equal, no margin is above 0, and that isn't chance."""
    start = {"step": 0, "eval_loss": 0.67}
    start |= {"eval_rewards/accuracies": accuracy, "eval_rewards/margins": margin}
    write_state(tmp_path / "run", [start, *trl_log(4, weight=True)])
    words = ["report", tmp_path / "run", "--format", "svg", "--out", tmp_path / "out"]
    code, _, errors = reports(*words)
    assert code == 0, errors
    picture = (tmp_path / "out" / "report.svg").read_text()
    said = "0 at step 0: every margin is 0, none is above it" in picture
    assert said is (accuracy == margin == 0)
    assert ">chance<" in picture


def test_report_of_tensorboard(tmp_path: Path):
    """OpenRLHF's names. It logs no margin: the chosen minus the rejected reward, here ``s - (-s) =
    2 s``."""
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
    assert held_out["first_loss"] == ""  # the one of step 10


def test_report_of_a_resumed_run_in_tensorboard(tmp_path: Path):
    """OpenRLHF's logs, which go to another folder after each start: trained to step 4, resumed at
    3, trained to 6, resumed at 5. The losses are .1 times the step, those of the first run 1
    more."""
    from torch.utils.tensorboard import SummaryWriter

    logs = tmp_path / "run" / "tensorboard"
    for name, steps, more in (("c", (6, 7), 0), ("b", (4, 5, 6), 0), ("a", (1, 2, 3, 4), 1)):
        with SummaryWriter(str(logs / name)) as writer:
            for step in steps:
                writer.add_scalar("train/loss_mean", 0.1 * step + more, step)
                writer.add_scalar("train/acc_mean", 0.5, step)
    for name, after, before in (("b", 3, "a"), ("c", 5, "b")):
        link = {"resumed": {"after": after, "log": before}}
        (logs / name / "focalpo_plugins.json").write_text(json.dumps(link))
    for number, name in enumerate("abc"):
        for events in (logs / name).glob("events.*"):
            os.utime(events, (number, number))
    done = focalpo("report", tmp_path / "run", "--out", tmp_path / "out", "--format", "csv")
    assert done.returncode == 0, done.stderr
    assert "its steps up to 5 are from the log b" in done.stdout
    assert "its steps up to 3 are from the log a" in done.stdout
    (row,) = rows(tmp_path / "out" / "report.csv")
    assert (row["step"], float(row["first_loss"])) == ("7", pytest.approx(1.1, abs=1e-6))
    assert float(row["loss"]) == pytest.approx(0.7, abs=1e-6)


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


def test_what_exists_is_a_run_and_not_a_name(reports, tmp_path: Path):
    """Sweeps name their folders like this, and a name may contain a ``=``."""
    for folder in ("lr=1e-4", "b=2/lr=3"):
        write_state(tmp_path / folder, trl_log(3, weight=False))
    runs = {
        tmp_path / "lr=1e-4": "lr=1e-4",
        f"mine={tmp_path / 'b=2' / 'lr=3'}": "mine",
        f"x=1={tmp_path / 'lr=1e-4'}": "x=1",
    }
    code, _, errors = reports("report", *runs, "--format", "csv", "--out", tmp_path / "out")
    assert code == 0, errors
    assert {row["run"] for row in rows(tmp_path / "out" / "report.csv")} == set(runs.values())


# A run that was killed while it saved leaves this of its newest trainer_state.json.
HALF_WRITTEN = {
    "cut": '{"global_step": 9, "log_hist',
    "empty": "",
    "no file": None,
    "no object": "[]",
    "no steps": '{"log_history": []}',
    "no entries": '{"global_step": 9, "log_history": [null]}',
}


@pytest.mark.parametrize("content", HALF_WRITTEN.values(), ids=HALF_WRITTEN)
def test_a_half_written_checkpoint_is_skipped(reports, tmp_path: Path, content: str | None):
    half = tmp_path / "run" / "checkpoint-9" / "trainer_state.json"
    half.parent.mkdir(parents=True)
    if content is not None:
        half.write_text(content)
    words = ["report", tmp_path / "run", "--format", "csv", "--out", tmp_path / "out"]
    code, _, errors = reports(*words)
    assert code == 2
    assert errors.count("\n") == 1
    assert "RUN must hold a trainer_state.json that is whole" in errors
    write_state(tmp_path / "run" / "checkpoint-3", trl_log(3, weight=False))
    code, said, errors = reports(*words)
    assert code == 0, errors
    assert f"{half} is skipped: incomplete, as when a run is killed while it saves\n" in said
    assert [row["step"] for row in rows(tmp_path / "out" / "report.csv")] == ["3", "3"]


def evaluated(name: str, loss: float, margin: float, weight: float, own: bool) -> dict[str, Any]:
    """An entry of the evaluation set ``name`` at step 2.  transformers' keys have the set's name and
    TRL's have not; ours have it where they are the set's own."""
    key = f"eval_{name}_" if own else "eval_"
    trl = {"eval_rewards/margins": margin, "eval_rewards/accuracies": 0.5, "eval_aux_loss": 9.0}
    ours = {f"{key}focalpo/weight": weight, "step": 2}
    return {**trl, f"eval_{name}_loss": loss, f"eval_{name}_runtime": 1.0, **ours}


@pytest.mark.parametrize("own", [True, False])
def test_each_named_evaluation_set_has_a_row(reports, tmp_path: Path, own: bool):
    """They include names that look like transformers' own keys, and names with the same beginning;
    TRL's other losses aren't names of sets."""
    sets = {"easy": 0.4, "hard": 0.8, "hard_new": 0.9, "loss": 0.3, "aux": 0.2}
    log = [
        {"step": 0, "eval_easy_loss": 0.6695, "eval_rewards/margins": 0.0},
        *trl_log(2, True)[:2],
    ]
    log += [evaluated(name, loss, 10 * loss, 1 - loss, own) for name, loss in sets.items()]
    write_state(tmp_path / "run", log)
    out = tmp_path / "out"
    code, _, errors = reports("report", tmp_path / "run", "--out", out)
    assert code == 0, errors
    assert (out / "report.png").read_bytes()[:8] == PNG
    train, *table = rows(out / "report.csv")
    assert train["split"] == "train"
    found = [tuple(row[key] for key in ("split", "loss", "margin", "weight")) for row in table]
    assert found == [(f"eval_{n}", str(x), str(10 * x), str(1 - x)) for n, x in sets.items()]
    assert [row["first_loss"] for row in table] == ["0.6695", "", "", "", ""]


def test_named_evaluation_sets_in_tensorboard(reports, tmp_path: Path):
    """transformers writes `eval_easy_loss` as `eval/easy_loss`.  TRL's metrics of all sets are under
    one name there, so that with several sets nobody knows whose they are."""
    from torch.utils.tensorboard import SummaryWriter

    for run, names in (("one", ["easy"]), ("two", ["easy", "easy_new"])):
        with SummaryWriter(str(tmp_path / run)) as writer:
            writer.add_scalar("train/loss", 0.6, 1)
            for loss, name in enumerate(names, 1):
                values = {f"{name}_loss": loss, f"{name}_runtime": 1, "rewards/margins": 7}
                for key, value in {**values, f"{name}_focalpo/weight": 0.5}.items():
                    writer.add_scalar(f"eval/{key}", value, 1)
    words = [tmp_path / "one", tmp_path / "two", "--format", "csv", "--out", tmp_path / "out"]
    code, said, errors = reports("report", *words)
    assert code == 0, errors
    table = [row for row in rows(tmp_path / "out" / "report.csv") if row["split"] != "train"]
    assert [
        tuple(row[key] for key in ("run", "split", "loss", "margin", "weight")) for row in table
    ] == [
        ("one", "eval_easy", "1.0", "7.0", "0.5"),
        ("two", "eval_easy", "1.0", "", "0.5"),
        ("two", "eval_easy_new", "2.0", "", "0.5"),
    ]
    assert said.count("have one name in TensorBoard, and are left out") == 1


def write_silent(folder: Path, *log: dict[str, Any], every: int | None = 500) -> None:
    folder.mkdir()
    state = {"global_step": 6, "log_history": [{"step": 6, "train_runtime": 9.0}, *log]}
    if every is not None:
        state["logging_steps"] = every
    (folder / "trainer_state.json").write_text(json.dumps(state))


def test_logging_steps_larger_than_the_run_are_said(reports, tmp_path: Path):
    larger = "logging_steps, 500, is larger than the run, which has 6 steps. Set it to 6 or less."
    cases = {
        "larger": (500, larger),
        "unknown": (None, "logging_steps is larger than the run, which has 6 steps."),
        "strategy": (1, "no training loss was logged in 6 steps: look at logging_strategy."),
    }
    for name, (every, said) in cases.items():
        write_silent(tmp_path / name, every=every)
        code, _, errors = reports("report", tmp_path / name, "--out", tmp_path / "out")
        assert code == 2
        assert errors.count("\n") == 1
        assert said.lower() in errors.lower()
    write_silent(tmp_path / "eval", {"step": 6, "eval_loss": 0.5})
    words = ["report", tmp_path / "eval", "--format", "csv", "--out", tmp_path / "out"]
    code, output, errors = reports(*words)
    assert code == 0, errors
    assert larger in output
    assert [row["split"] for row in rows(tmp_path / "out" / "report.csv")] == ["eval"]


def test_a_run_without_evaluation_is_not_faint():
    """Next to a run with evaluations, the training batches are named as such."""
    from focalpo_plugins.cli.plots import pyplot
    from focalpo_plugins.cli.report.picture import draw
    from focalpo_plugins.cli.report.runs import Run

    train = {"margin": {1: 0.0, 2: 1.0}}
    runs = [
        Run("with", Path("a"), {"train": train, "eval": {"margin": {2: 0.5}}}, []),
        Run("without", Path("b"), {"train": train}, []),
    ]
    lines = draw(pyplot(), runs).axes[0].get_lines()
    # Training batches and evaluation of the first run, training batches of the second.
    assert [line.get_alpha() for line in lines] == [0.45, None, None]
    assert [line.get_marker() for line in lines] == ["None", "o", "None"]
    assert len({line.get_color() for line in lines}) == 2


# Of four pairs the tokens of both sequences, and of the start that they have in common: a pair's
# longer sequence has 10, 3, 9 and 4 tokens, and its row with a shared prompt 14, 4, 12 and 4.
FOUR = Counts(pairs=4, lengths=[10, 8, 2, 3, 9, 9, 4, 1], in_common=[4, 1, 6, 1])


def planned(geometry: Geometry, *windows: Window, **more: Any) -> SimpleNamespace:
    given = {"balanced_batches": False, "shared_prompts": False, "fused": False, "packed": False}
    return SimpleNamespace(geometry=geometry, windows=windows, steps=len(windows), **given | more)


def test_the_critical_path_by_hand():
    """Two ranks with a pair each, two micro-steps to a step: 2 x 10 and 2 x 9 are the slowest as they
    come, 2 x 10 and 2 x 4 once the pairs of 10 and 9 are side by side.  With shared prompts 14 and 12,
    and 14 and 4."""
    plan = planned(Geometry(2, 1, 2), Window(1, 1, [0, 1, 2, 3]))
    found = four_ways(plan, FOUR)
    tokens = {name: way.tokens_per_step for name, way in found.ways.items()}
    assert tokens == {"plain": 38, "balanced": 28, "shared": 26, "both": 18}
    largest = {name: way.largest for name, way in found.ways.items()}
    of_padded, of_shared = Largest(20, 1, 1, 1), Largest(14, 1, 1, 1)
    assert [*largest.values()] == [of_padded, of_padded, of_shared, of_shared]
    # Without the fused path the output layer gets the padded batch in both ways.
    assert [way.logits for way in found.ways.values()] == [20, 20, 20, 20]


def test_the_largest_micro_batch_by_hand():
    """Two pairs at a time on one rank, in two epochs.  The first has 2 x 2 x 10, and 2 x 9 of a pair
    that is left; the second 2 x 2 x 10, and 2 x 3.  With shared prompts 14 + 4 and 12, then 14 + 12,
    which is the largest, and 4.  Four micro-batches are two steps."""
    windows = Window(1, 1, [0, 1, 2]), Window(2, 2, [2, 0, 1])
    found = four_ways(planned(Geometry(1, 2, 2), *windows), FOUR)
    assert found.ways["plain"] == Way((40 + 18 + 40 + 6) / 2, Largest(40, 2, 1, 1), 40)
    assert found.ways["shared"] == Way((18 + 12 + 26 + 4) / 2, Largest(26, 2, 2, 2), 40)
    # A smaller batch gives its pairs more weight, so nothing is exchanged with it.
    assert found.ways["balanced"] == found.ways["plain"]
    assert found.ways["both"] == found.ways["shared"]
    # The smaller batch may be the largest.
    window = Window(1, 1, [1, 3, 0])
    assert four_ways(planned(Geometry(1, 2, 2), window), FOUR).planned.largest == Largest(
        20, 1, 1, 1
    )


def test_smaller_batches_of_two_ranks():
    """Two pairs at a time on each of two ranks, of which a step has one: 2 x 10 on the slower rank."""
    found = four_ways(planned(Geometry(2, 2, 1), Window(1, 1, [0, 3])), FOUR)
    assert found.planned == Way(20, Largest(20, 1, 1, 1), 20)


def test_the_output_layer_gets_what_its_path_needs():
    """Two pairs at a time, all in a step: shared prompts compute 14 + 12 and 4 + 4 in the order as it
    comes here, of which the output layer gets 2 x 2 x 10 and 2 x 2 x 4 without the fused path.
    Balanced with it, the pair of 14 goes with one of 4; without it, the two longest stay together."""
    window = Window(1, 1, [0, 2, 1, 3])
    found = four_ways(planned(Geometry(1, 2, 2), window), FOUR)
    assert found.ways["shared"] == Way(26 + 8, Largest(26, 2, 1, 1), 40)
    assert found.ways["both"] == Way(26 + 8, Largest(26, 2, 1, 1), 40)
    found = four_ways(planned(Geometry(1, 2, 2), window, fused=True), FOUR)
    assert found.ways["shared"] == Way(26 + 8, Largest(26, 2, 1, 1), 26)
    assert found.ways["both"] == Way(18 + 16, Largest(18, 2, 1, 1), 18)


def test_a_host_that_packs_computes_no_padding():
    """18 tokens of the pairs 0 and 2, and 5 of the others: 18 and 18 as they come, 18 and 5 dealt."""
    plan = planned(Geometry(2, 1, 2), Window(1, 1, [0, 1, 2, 3]), packed=True)
    found = four_ways(plan, FOUR)
    tokens = [way.tokens_per_step for way in found.ways.values()]
    assert tokens == [36, 23, 26, 18]
    assert [way.logits for way in found.ways.values()] == [18, 18, 14, 14]


@pytest.mark.parametrize(
    "balanced, shared, name",
    [
        (False, False, "plain"),
        (True, False, "balanced"),
        (False, True, "shared"),
        (True, True, "both"),
    ],
)
def test_the_way_of_the_run_is_marked(balanced: bool, shared: bool, name: str):
    """28, 26 and 18 of 38 tokens are .74, .68 and .47."""
    window = Window(3, 7, [0, 1, 2, 3])
    plan = planned(Geometry(2, 1, 2), window, balanced_batches=balanced, shared_prompts=shared)
    path, largest = (text for _, text in _of_ways(four_ways(plan, FOUR)))
    said = "plain 1.00 (38 tokens), balanced 0.74 (saves 26%), shared 0.68 (saves 32%), "
    said = f"critical path a step: {said}both 0.47 (saves 53%)"
    if name == "plain":
        marked = said.replace("38 tokens", "38 tokens, this run")
    else:
        marked = re.sub(rf"({name} \d.\d\d \()", r"\1this run, ", said)
    assert path == marked
    of_plain = "20 tokens (1 pair) in step 7, epoch 3"
    said = of_plain.replace("20", "14") if shared else of_plain
    more = "" if name == "plain" else f"; plain: {of_plain}"
    assert largest == f"largest micro-batch: {said}{more}"


def test_a_run_without_a_batch_has_no_critical_path():
    assert four_ways(planned(Geometry(8, 1, 2)), FOUR) is None


@pytest.mark.parametrize(
    "chosen, rejected, common",
    [([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 3], 2), ([1], [2], 0), ([], [1], 0), ([1], [1], 1)],
)
def test_what_two_sequences_begin_with(chosen: list[int], rejected: list[int], common: int):
    assert in_common(chosen, rejected) == common


# A command, and each file that it writes; LOG stands for a run's log.
WRITTEN = [
    (["curves"], ["fig2", "fig3", "fig4"]),
    (["curves", "--gamma-end", "0.1"], ["gamma"]),
    (["report", "LOG"], ["report"]),
]


@pytest.mark.parametrize(("words", "names"), WRITTEN)
def test_a_file_that_is_not_of_the_command_is_never_touched(reports, tmp_path, words, names):
    """Whatever the user has under such a name: one error, before anything is written. A file of the
    command itself is overwritten."""
    write_state(tmp_path / "log", trl_log(4, weight=True))
    out = tmp_path / "out"
    formats = ["csv", "png", "svg"]
    command = [*(tmp_path / "log" if word == "LOG" else word for word in words)]
    command += ["--format", *formats, "--out", out]
    for _ in range(2):
        code, _, errors = reports(*command)
        assert code == 0, errors
    before = {path: path.read_bytes() for path in out.iterdir()}
    for name in [f"{name}.{kind}" for name in names for kind in formats]:
        (out / name).write_bytes(b"step,dpo\n1,2\n")
        code, _, errors = reports(*command)
        assert code == 2
        assert errors.count("\n") == 1
        assert (
            f"--out {str(out)!r} holds a {name} that this command did not write; nothing" in errors
        )
        assert (out / name).read_bytes() == b"step,dpo\n1,2\n"
        (out / name).write_bytes(before[out / name])
        assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_a_picture_of_someone_else_is_not_ours(reports, tmp_path: Path):
    """Drawn by the same library."""
    from matplotlib.figure import Figure

    for kind in ("png", "svg"):
        picture = tmp_path / f"report.{kind}"
        Figure().savefig(picture)
        content = picture.read_bytes()
        write_state(tmp_path / kind, trl_log(4, weight=True))
        words = ["report", tmp_path / kind, "--format", kind, "--out", tmp_path]
        code, _, errors = reports(*words)
        assert (code, "that this command did not write" in errors) == (2, True)
        assert picture.read_bytes() == content


def test_report_of_a_folder_that_was_used_before(reports, tmp_path: Path):
    """By a longer run, whose checkpoint has the larger number: what was written last is read. Of one
    run the longest log is, whatever the files' times are, as after copying."""
    old, new = tmp_path / "run" / "checkpoint-60", tmp_path / "run" / "checkpoint-30"
    write_state(old, [{"step": s, "loss": 9.0} for s in range(1, 61)])
    write_state(new, [{"step": s, "loss": 1.0, "grad": math.nan} for s in range(1, 31)])
    os.utime(old / "trainer_state.json", (1e9, 1e9))
    code, said, errors = reports("report", tmp_path / "run", "--format", "csv", "--out", tmp_path)
    assert code == 0, errors
    (row,) = rows(tmp_path / "report.csv")
    assert (row["step"], row["loss"]) == ("30", "1.0")
    assert f"left out, from an older run than checkpoint-30: {old / 'trainer_state.json'}" in said

    part = tmp_path / "run" / "checkpoint-20"
    write_state(part, [{"step": s, "loss": 1.0, "grad": math.nan} for s in range(1, 21)])
    code, said, errors = reports("report", tmp_path / "run", "--format", "csv", "--out", tmp_path)
    assert code == 0, errors
    assert rows(tmp_path / "report.csv") == [row]
    assert str(part) not in said


def test_tensorboard_of_a_folder_that_was_used_before(reports, tmp_path: Path):
    """By a longer run: its later steps are not those of the newer one. A run that goes on from step
    4 keeps the first three. The name of a file is that file's log alone, also in a folder whose
    name has a bracket."""
    from torch.utils.tensorboard import SummaryWriter

    def write(folder: Path, loss: float, steps: range, at: float) -> None:
        with SummaryWriter(str(folder)) as writer:
            for step in steps:
                writer.add_scalar("train/loss", loss, step, walltime=at + step)
            writer.add_scalar(f"eval/eval_loss{'_of_old' * (loss == 9)}", loss, steps[-1], at + 99)

    def read(path: Path) -> tuple[list[float], str]:
        code, said, errors = reports("report", path, "--format", "csv", "--out", tmp_path / "out")
        assert code == 0, errors
        from focalpo_plugins.cli.report.runs import read_run

        return list(read_run(path, None).series["train"]["loss"].values()), said

    for name, steps, expected in (
        ("again [1]", range(1, 6), [1] * 5),
        ("resumed", range(4, 6), [9, 9, 9, 1, 1]),
        ("after", range(11, 13), [9] * 10 + [1, 1]),
    ):
        write(tmp_path / name, 9, range(1, 11), 1000)
        (first,) = (tmp_path / name).iterdir()
        write(tmp_path / name, 1, steps, 5000)
        losses, said = read(tmp_path / name)
        assert losses == expected
        left_out = (
            f"an older log in the folder has steps up to 10: left out from step {steps[0]} on"
        )
        assert (left_out in said) is (name != "after")
        assert read(first)[0] == [9] * 10


def test_a_run_with_bytes_that_are_no_text_in_its_name(tmp_path: Path):
    """Python reads such bytes as lone surrogates, which no encoding supports."""
    write_state(tmp_path / os.fsdecode(b"run\xff"), trl_log(4, weight=True))
    done = focalpo(
        "report", tmp_path / os.fsdecode(b"run\xff"), "--format", "csv", "--out", tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "report.csv")[0]["run"] == "run\\udcff"
