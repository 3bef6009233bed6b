"""The mechanism study, run as a user runs it: real Axolotl, real scores."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import subprocess
import sys
from multiprocessing.connection import Listener
from pathlib import Path
from threading import Thread
from types import ModuleType

import forked
import numpy as np
import pytest
from harness import EXAMPLES, environment, loaded

SCRIPT = EXAMPLES / "study" / "study.py"
ARGUMENTS = ("--gamma", "1", "--exact", "--incorrect", "--seeds", "5")
ARGUMENTS += ("--set", "rl_beta=null", "trl={beta: 0.5}", "max_steps=2")

# A command that the test runs, in a process forked off one that has imported what it needs.
COMMAND = """\
#!{python}
import os, sys
from multiprocessing.connection import Client

with Client({address!r}) as test:
    test.send(({name!r}, sys.argv[1:], os.getcwd()))
    code, *outputs = test.recv()
print(*outputs)
sys.exit(code)
"""
FUNCTIONS = {"axolotl": "axolotl.cli.main:main", "focalpo": "focalpo_plugins.cli:main"}


def answer(listener: Listener) -> None:
    while True:
        with contextlib.suppress(EOFError), listener.accept() as asking:
            name, *asked = asking.recv()
            asking.send(forked.run(FUNCTIONS[name], *asked))


def study(*words: str, folder: Path) -> subprocess.CompletedProcess:
    """The command, in a folder where the YAML's paths lead to the tiny assets."""
    env = environment()
    return subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        cwd=folder,
        env=env | {"PATH": f"{folder / 'bin'}{os.pathsep}{env['PATH']}"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def module() -> ModuleType:
    return loaded(SCRIPT)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DPO and FocalPO with gamma 1, two steps on one seed. In the first attempt a file blocks
    FocalPO's folder, so it stops after DPO; the second attempt continues from there."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "examples").symlink_to(EXAMPLES)
    (folder / "bin").mkdir()
    listener = Listener()
    Thread(target=answer, args=(listener,), daemon=True).start()
    for name in FUNCTIONS:
        path = folder / "bin" / name
        path.write_text(COMMAND.format(python=sys.executable, address=listener.address, name=name))
        path.chmod(0o755)
    blocked = folder / "out" / "runs" / "correct_1"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("in the way")
    first = study(*ARGUMENTS, "--out", "out", folder=folder)
    assert first.returncode != 0
    assert "DPO, seed 5: trained and scored" in first.stderr + first.stdout
    assert not (folder / "out" / "results.csv").exists()
    blocked.unlink()
    second = study(*ARGUMENTS, "--out", "out", folder=folder)
    assert second.returncode == 0, second.stderr
    assert "DPO, seed 5" not in second.stderr + second.stdout
    assert "FocalPO 1, seed 5: trained and scored" in second.stderr + second.stdout
    return folder


@pytest.mark.xdist_group("done")
def test_results_are_those_of_the_scores(done: Path):
    """Margin, accuracy, ranking and share of the gradient of one group, from the scores' file."""
    path = done / "out" / "runs" / "correct_1" / "seed_5" / "scores" / "scores.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert len(records) == 304
    wrong = [r for r in records if r["ref_chosen_logp"] <= r["ref_rejected_logp"]]
    (row,) = [
        r
        for r in rows(done / "out" / "results.csv")
        if (r["loss"], r["group"]) == ("FocalPO 1", "wrong")
    ]
    assert int(row["pairs"]) == len(wrong) > 50
    assert float(row["margin"]) == pytest.approx(np.mean([r["margin"] for r in wrong]), rel=1e-5)
    right_now = np.mean([r["margin"] > 0 for r in wrong])
    assert float(row["accuracy"]) == pytest.approx(right_now, rel=1e-5)
    flipped = np.mean([r["chosen_logp"] > r["rejected_logp"] for r in wrong])
    assert float(row["ranking"]) == pytest.approx(flipped, rel=1e-5, abs=1e-9)

    def pull(record: dict) -> float:
        p = 1 / (1 + np.exp(-record["margin"]))
        return (1 - p) * p * (1 + np.log(p))  # -dL/dz of -p log p

    share = sum(map(pull, wrong)) / sum(map(pull, records))
    assert float(row["share_of_gradient"]) == pytest.approx(share, rel=1e-5)
    p = 1 / (1 + np.exp(-np.array([r["margin"] for r in wrong])))
    assert float(row["weight"]) == pytest.approx(np.mean(p * (1 + np.log(p))), rel=1e-5)


@pytest.mark.xdist_group("done")
def test_scores_are_at_the_beta_of_training(done: Path, module: ModuleType):
    """A margin is 0.5 times the difference of the log-ratios; existing scores aren't computed
    again."""
    scores = done / "out" / "runs" / "correct_1" / "seed_5" / "scores"
    records = [json.loads(line) for line in (scores / "scores.jsonl").read_text().splitlines()[1:]]
    for row in records:
        ratios = [row[f"{side}_logp"] - row[f"ref_{side}_logp"] for side in ("chosen", "rejected")]
        assert row["margin"] == pytest.approx(0.5 * (ratios[0] - ratios[1]), abs=1e-5)
    assert any(abs(row["margin"]) > 1e-3 for row in records)
    assert module.scored(scores / "summary.json", 0.5)
    assert not module.scored(scores / "summary.json", 0.1)


@pytest.mark.xdist_group("done")
def test_differences_are_paired_with_dpo(done: Path):
    """The mean of the differences is the difference of the means, and DPO's own is 0."""
    results = {(r["loss"], r["group"]): float(r["margin"]) for r in rows(done / "out/results.csv")}
    for row in rows(done / "out" / "differences.csv"):
        assert float(row["low"]) <= float(row["difference"]) <= float(row["high"])
        if row["loss"] == "DPO":
            assert float(row["difference"]) == float(row["low"]) == float(row["high"]) == 0
        elif row["quantity"] == "margin":
            expected = results[row["loss"], row["group"]] - results["DPO", row["group"]]
            assert float(row["difference"]) == pytest.approx(expected, abs=1e-6)
            assert float(row["low"]) < float(row["high"])


@pytest.mark.xdist_group("done")
def test_runs_are_of_the_losses_and_batches_asked_for(done: Path):
    for name, first_loss in (("dpo", 0.6931), ("correct_1", 0.3466)):
        folder = done / "out" / "runs" / name / "seed_5"
        log = (folder / "train.log").read_text()
        assert f"{{'loss': '{first_loss}'" in log  # 2^-gamma ln 2
        assert "gamma=1.0" in log or name == "dpo"
    assert (done / "out" / "study.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.xdist_group("done")
def test_other_batches_are_seen(done: Path, module: ModuleType, tmp_path: Path):
    """One run has one token more in one step."""
    losses = [module.DPO, module.Loss("correct", 1.0)]
    module.check_paired(losses, [5], done / "out")
    for loss in losses:
        (state,) = (done / "out/runs" / loss.folder).glob(
            "seed_5/model/checkpoint-2/trainer_state.json"
        )
        content = json.loads(state.read_text())
        if loss is not module.DPO:
            entry = [e for e in content["log_history"] if "loss" in e][1]
            entry["num_tokens"] += 1
        copy = tmp_path / state.relative_to(done / "out")
        copy.parent.mkdir(parents=True)
        copy.write_text(json.dumps(content))
    with pytest.raises(module.StudyError, match="other batches under seed 5"):
        module.check_paired(losses, [5], tmp_path)


@pytest.mark.xdist_group("done")
def test_another_study_is_not_mixed_in(done: Path):
    before = (done / "out" / "results.csv").read_bytes()
    other = study(*ARGUMENTS[:-1], "max_steps=3", "--out", "out", folder=done)
    assert other.returncode == 2
    assert "holds a study with max_steps 2, and this one has 3" in other.stderr
    assert (done / "out" / "results.csv").read_bytes() == before


@pytest.fixture
def equal_runs(module: ModuleType) -> tuple:
    """Losses, results and differences of runs that rank alike: accuracy's differences are 0, and
    margin's too small for three decimals."""
    losses = [module.DPO, module.Loss("correct", 0.05)]
    results, differences = [], []
    for loss in losses:
        for group in module.GROUPS:
            same = {"margin": -0.0002, "accuracy": 0.5, "ranking": 0.5, "weight": 0.9}
            results.append({"loss": loss.name, "seed": 1, "group": group, **same})
            for quantity in ("margin", "accuracy", "ranking"):
                mean = -0.00004 if quantity == "margin" and loss != module.DPO else 0.0
                row = {"loss": loss.name, "group": group, "quantity": quantity, "difference": mean}
                row |= {"low": mean - 1e-17, "high": mean, "each_seed": f"{mean:+.5f}"}
                differences.append(row)
    return losses, results, differences


def test_ticks_of_equal_runs(module: ModuleType, equal_runs: tuple):
    """Rounding sets no scale: 0 is in the middle, and each tick is readable."""
    figure = module.draw(module.pyplot(), *equal_runs, "equal")
    figure.canvas.draw()
    last = figure.axes[-1]
    low, high = last.get_xlim()
    assert (low, high) == pytest.approx((-0.01, 0.01))
    ticks = [label.get_text() for label in last.get_xticklabels()]
    assert "0.000" in ticks and all(len(text) <= 7 for text in ticks), ticks
    for axis in figure.axes:
        shown = [text.get_text() for text in axis.texts]
        assert not [text for text in shown if text.startswith(("-0.000", "+0.000"))]
        assert not shown or set(shown) == {"0.000"}


def test_nothing_is_minus_zero_in_the_table(module: ModuleType, equal_runs: tuple, capsys):
    module.print_table(*equal_runs)
    said = capsys.readouterr().out
    assert "-0.000 " not in said and "-0.0000" not in said
    assert "0.0000 [ 0.0000,  0.0000]" in said
    shown = (module.fixed(value, 3, plus=True) for value in (-0.0006, 0.0006, -0.0004, -0.0))
    assert [*shown] == ["-0.001", "+0.001", "0.000", "0.000"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, 0.1),
        ({"rl_beta": 0.3}, 0.3),
        ({"trl": {"beta": 0.5}}, 0.5),
        ({"trl": {"beta": "5e-1"}, "rl_beta": 0.5}, 0.5),  # YAML reads 5e-1 as text
        ({"trl": {"beta": None}, "rl_beta": 0.3}, 0.3),
        ({"trl": None, "dpo_beta": 0.2}, 0.2),
        ({"dpo_beta": 0.2, "rl_beta": 0.3}, 0.3),
        ({"trl": {"beta": 0.5}, "rl_beta": 0.3}, "one value, got trl.beta 0.5 and rl_beta 0.3"),
        ({"trl": 0.5}, "trl must be a mapping"),
        ({"rl_beta": 0}, "rl_beta must be a number above 0, got 0"),
        ({"rl_beta": [0.1]}, "rl_beta must be a number above 0"),
    ],
)
def test_beta_is_axolotls(module: ModuleType, config: dict, expected: float | str):
    if isinstance(expected, float):
        assert module.beta_of(config) == expected
    else:
        with pytest.raises(module.StudyError, match=expected):
            module.beta_of(config)


def test_line_breaks_inside_a_text(module: ModuleType, tmp_path: Path):
    """A JSON text can hold each of these unescaped; a byte order mark and blank lines aren't
    rows."""
    breaks = "one\u2028two\u2029three\u0085four\x7ffive"
    row = {"prompt": "q", "chosen": breaks, "rejected": "no"}
    line = json.dumps(row, ensure_ascii=False)
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"\ufeff{line}\r\n\n{line}\n\n", encoding="utf-8", newline="")
    pairs = module.read_pairs(path)
    assert [pair["chosen"][-1]["content"] for pair in pairs] == [breaks] * 2
    path.write_bytes(line.encode("utf-16"))
    with pytest.raises(module.StudyError, match="can't be read as a preference file"):
        module.read_pairs(path)


def test_all_data_sets_are_read(module: ModuleType):
    content = {"datasets": [{"path": "a"}, {"path": "b"}], "test_datasets": [{"path": "c"}]}
    assert module.two_files(Path("x.yml"), content) == [["a", "b"], ["c"]]
    for part in ({"split": "train[:10]"}, {"shards": 4}, {"data_files": ["d"]}):
        other = {**content, "datasets": [{"path": "a"}, {"path": "b", "split": "train", **part}]}
        (key,) = part
        with pytest.raises(module.StudyError, match=f"whole files, got b with {key}: "):
            module.two_files(Path("x.yml"), other)


@pytest.mark.parametrize("empty", ["right", "wrong"])
def test_a_group_without_pairs(module: ModuleType, tmp_path: Path, capsys, empty: str):
    """The reference ranks all three pairs alike. DPO's margins are 1, 2 and 3 and those of FocalPO
    0.5 higher: means of 2 and 2.5, and a dash for the other group."""
    losses = [module.DPO, module.Loss("correct", 0.05)]
    for loss, more in zip(losses, (0, 0.5), strict=True):
        folder = tmp_path / "runs" / loss.folder / "seed_1" / "scores"
        folder.mkdir(parents=True)
        lines = [{"about": "these"}]
        for row in range(3):
            logps = {"chosen_logp": -1.0, "rejected_logp": -2.0, "ref_right": empty == "wrong"}
            lines.append({"row": row, "margin": row + 1.0 + more, **logps})
        (folder / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pairs = [{"prompt": f"q{n}", "chosen": "a", "rejected": "b"} for n in range(3)]
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    results, differences = module.summarise(losses, [1], held_out, tmp_path)
    assert {row["group"] for row in results} == {"right", "wrong", "all"} - {empty}
    module.print_table(losses, results, differences)
    table = capsys.readouterr().out.splitlines()
    means = {"right": ["2.500", "-"], "wrong": ["-", "2.500"]}[
        "wrong" if empty == "right" else "right"
    ]
    assert table[-1].split()[2:4] == means
    margins = "0.5000 [+0.5000, +0.5000]"
    assert table[-1].count("+" + margins) == 1 and table[-1].split().count("-") == 5
    figure = module.draw(module.pyplot(), losses, results, differences, "one group")
    figure.canvas.draw()


def test_an_interrupted_study_ends_its_command(module: ModuleType, tmp_path: Path):
    module.INTERRUPTED.set()
    words = ["sh", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 60"]
    with module.tqdm(total=1) as bar, pytest.raises(module.StudyError, match="sh was interrupted"):
        module.command(words, tmp_path / "log", bar, 1)
    module.INTERRUPTED.clear()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_bootstrap_draws_whole_prompts(module: ModuleType):
    """Two prompts, with values 0 and 1 of 50 pairs each: a resample has 0, 1 or 2 of the second
    with 1/4, 1/2, 1/4, so the interval is [0, 1]; with 100 prompts of a pair each the standard
    error is sqrt(1/4 / 100) = 0.05 and the interval about .5 -+ .098."""
    values = np.repeat([0.0, 1.0], 50)
    assert module.bootstrap(values, np.repeat(["a", "b"], 50)) == (0.0, 1.0)
    low, high = module.bootstrap(values, np.arange(100).astype(str))
    assert (low, high) == pytest.approx((0.402, 0.598), abs=0.011)


def test_split_holds_out_whole_prompts(module: ModuleType):
    def pair(prompt: str, answer: str) -> dict:
        return module.conversations({"prompt": prompt, "chosen": answer, "rejected": "no"})

    pairs = [pair(f"question {n % 10}", f"answer {n}") for n in range(40)]
    train, held_out = module.split(pairs, 0.3)
    assert len(held_out) == 12
    assert not {module.prompt_of(p) for p in train} & {module.prompt_of(p) for p in held_out}
    assert module.split(pairs[::-1], 0.3)[1] == held_out[::-1]


@pytest.mark.parametrize(
    ("words", "content", "message"),
    [
        (("--gamma", "2"), None, "--gamma must be"),
        (("--exact", "1.5"), None, "--exact must be"),
        (("--set", "seed=4"), None, "'seed=4'"),
        (("--set", "max_steps=many"), None, "max_steps must be a whole number"),
        (("--set", "max_steps=true"), None, "max_steps must be a whole number"),
        (("--set", "max_steps=[1"), None, "--set takes KEY=VALUE with a value in YAML"),
        (("--set", "sequence_len=null"), None, "sequence_len must be a whole number"),
        (("--set", "trl={beta: 0.5}", "rl_beta=0.1"), None, "beta must have one value"),
        (("--set", "save_strategy=no"), None, "'save_strategy=no'"),
        (("--seeds", "1", "1"), None, "--seeds must be different numbers"),
        (("--seeds", "-1"), None, "--seeds must be different numbers from 0"),
        (("--jobs", "0"), None, "--jobs must be at least 1, got 0"),
        (("--held-out", "nan"), None, "--held-out must be above 0 and below 1, got nan"),
        (("--held-out", "-0.5"), None, "--held-out must be above 0 and below 1, got -0.5"),
        (("--model", "no/such/model"), None, "--model must be a model's folder or its name"),
        (("--config", "none.yml"), None, "--config must be an Axolotl YAML"),
        (("--data", "d.jsonl"), "", "holds no pairs"),
        (("--data", "d.jsonl"), "{", "d.jsonl, line 1"),
        (("--data", "d.jsonl"), "[" * 100_000, "d.jsonl, line 1"),
        (("--data", "d.jsonl"), '{"chosen": "a"}', "line 1: chosen and rejected must both be"),
        (
            ("--data", "d.jsonl"),
            '{"prompt": "a", "chosen": "b", "rejected": "c"}',
            "--held-out must leave prompts on both sides",
        ),
    ],
)
def test_errors(
    module: ModuleType,
    tmp_path: Path,
    monkeypatch,
    capsys,
    words,
    content: str | None,
    message: str,
):
    (tmp_path / "examples").symlink_to(EXAMPLES)
    if content is not None:
        (tmp_path / "d.jsonl").write_text(content + "\n" if content else "")
    monkeypatch.chdir(tmp_path)
    try:
        code = module.main([*words, "--out", "out"])
    except SystemExit as ended:  # by argparse
        code = ended.code
    assert code == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "out" / "runs").exists()
