"""The example scripts that need no host except TRL, run as a user runs them."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import forked
import pytest
from harness import EXAMPLES, run_python
from safetensors.torch import load_file

# make_tiny.py with fewer pairs: 20 steps of training.
FEW_PAIRS = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import make_tiny
make_tiny.TRAIN_PAIRS, make_tiny.TEST_PAIRS = 160, 16
make_tiny.main()
"""


def make_tiny(*words: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    arguments = ["-c", FEW_PAIRS, str(EXAMPLES), *map(str, words)]
    done = run_python(*arguments, cwd=cwd, **variables)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess]:
    """The command printed for a folder whose name has a meaning for sed and for a shell."""
    folder = tmp_path_factory.mktemp("tiny") / "a & b's |"
    done = make_tiny("--out", folder, cwd=EXAMPLES.parent, OMP_DISPLAY_ENV="TRUE")
    return folder, done


@pytest.mark.xdist_group("made")
def test_waiting_threads_sleep_and_a_bar_is_shown(made):
    """According to OpenMP's own report of its settings."""
    _, done = made
    assert re.search(r"OMP_WAIT_POLICY = 'PASSIVE'", done.stderr)
    assert re.search(r"fine-tuning the model: 100%.* 20/20 ", done.stderr)


@pytest.mark.xdist_group("made")
def test_weights_depend_on_no_setting_of_threads(made, tmp_path: Path):
    folder, _ = made
    make_tiny("--out", tmp_path / "one", cwd=tmp_path, OMP_NUM_THREADS="1")
    first, second = (load_file(f / "model/model.safetensors") for f in (folder, tmp_path / "one"))
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)


@pytest.mark.xdist_group("made")
def test_made_files_are_left_alone(made):
    folder, _ = made
    before = (folder / "made.json").stat().st_mtime_ns
    done = make_tiny("--out", folder, cwd=EXAMPLES.parent)
    assert "is complete and up to date; nothing to do" in done.stdout
    assert (folder / "made.json").stat().st_mtime_ns == before


# Shows which files the YAML names, and what is switched off.
AXOLOTL = """#!/bin/sh
echo "$AXOLOTL_DO_NOT_TRACK $HF_HUB_OFFLINE $PWD"
cat "$2"
"""


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.xdist_group("made")
def test_the_next_command_trains_on_what_was_made(made, tmp_path: Path, elsewhere: bool):
    """As printed, with a stand-in for Axolotl, from the repository's root or elsewhere."""
    folder, done = made
    (tmp_path / "axolotl").write_text(AXOLOTL)
    (tmp_path / "axolotl").chmod(0o755)
    if elsewhere:
        ask = f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import make_tiny, pathlib; "
        ask += "print('next:', make_tiny.next_command(pathlib.Path(sys.argv[1])))"
        done = run_python("-c", ask, str(folder), cwd=tmp_path)
    (command,) = re.findall(r"^next: (.*)$", done.stdout, re.M)
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    for name in ("AXOLOTL_DO_NOT_TRACK", "HF_HUB_OFFLINE"):
        env.pop(name, None)
    where = tmp_path if elsewhere else EXAMPLES.parent
    run = subprocess.run(
        command, shell=True, cwd=where, env=env, capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines()[0] == f"1 1 {EXAMPLES.parent}"
    named = re.findall(r"(?:base_model|path): (.*?)\s*$", run.stdout, re.M)
    parts = ("model", "train.jsonl", "test.jsonl")
    assert [path for path in named if "prepared" not in path] == [f"{folder}/{p}" for p in parts]


def test_the_next_command_of_the_default_folder():
    ask = f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import make_tiny; "
    ask += "print(make_tiny.next_command(make_tiny.Path('examples/tiny')))"
    command = run_python("-c", ask, cwd=EXAMPLES.parent).stdout.strip()
    assert shlex.split(command)[-3:] == ["axolotl", "train", "examples/tiny_focalpo.yml"]
    config = EXAMPLES / "tiny_focalpo.yml"
    for path in (config, EXAMPLES / "tiny_dpo.yml"):
        launch = command.replace(config.name, path.name)
        assert f"#   {launch}\n" in path.read_text()


def test_trl_focalpo_trains_on_a_cpu(tiny: Path, tmp_path: Path):
    """Two steps of the script as it is, with its evaluation before them; ``2^-0.05 ln 2`` is
    0.66953."""
    script = EXAMPLES / "trl_focalpo.py"
    words = ("--max-steps", "2", "--out", str(tmp_path / "out"))
    code, output, errors = forked.run(str(script), words, tmp_path)
    assert code == 0, errors[-4000:]
    assert "active. loss=focalpo gamma=0.05 variant=correct" in errors + output
    state = json.loads((tmp_path / "out/checkpoint-2/trainer_state.json").read_text())
    held_out, first, second = state["log_history"][:3]
    assert held_out["eval_loss"] == pytest.approx(0.66953, abs=1e-5)
    assert (held_out["step"], held_out["eval_rewards/accuracies"]) == (0, 0)
    assert first["loss"] == pytest.approx(0.66953, abs=1e-5)
    assert second["step"] == 2 and second["loss"] != first["loss"]
    assert (tmp_path / "out" / "model.safetensors").is_file()
    report = ["report", str(tmp_path / "out")]
    assert shlex.join(["focalpo", *report]) in output
    code, output, errors = forked.run("focalpo_plugins.cli:main", report, tmp_path)
    assert code == 0 and "out  eval" in output, output + errors


def test_trl_focalpo_says_what_is_missing(tmp_path: Path):
    shutil.copy(EXAMPLES / "trl_focalpo.py", tmp_path)
    code, _, errors = forked.run(str(tmp_path / "trl_focalpo.py"), [], tmp_path)
    assert code == 2
    said = f"{tmp_path / 'tiny'} doesn't exist: run python examples/make_tiny.py first"
    assert said in errors.splitlines()[-1]
