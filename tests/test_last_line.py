"""The reason why a run ended, as the last line of what its launcher prints."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import run_python

# A process that fails as {}, under a hook that explains a KeyError.
FAILS = """
import sys
from focalpo_plugins.guards import last_line
from focalpo_plugins.loss import check_beta
last_line.install(lambda error: "of the config before")
last_line.install(lambda error: "it has no %r" % error.args[0] if type(error) is KeyError else None)
print("began", flush=True)
{}
"""
# A launcher: `import torch` arms it by its name, as it does any command that names Axolotl's.
LAUNCHES = """
import subprocess, sys, torch
subprocess.run([sys.executable, {failing!r}], check=True)
"""
OURS = "focalpo_plugins: beta must be a finite number above 0, got -1"
CASES = {
    "an error of ours": ("check_beta(-1)", OURS),
    "an error that is explained": ("{}['row']", "focalpo_plugins: it has no 'row'"),
    "any other": ("1 / 0", None),
    "an explanation that fails": ("raise KeyError", None),
}


def launched(folder: Path, failing: str, launcher: str = LAUNCHES):
    (folder / "bin").mkdir()
    (folder / "bin" / "axolotl").write_text(launcher.format(failing=str(folder / "failing.py")))
    (folder / "failing.py").write_text(FAILS.format(failing))
    (folder / "tmp").mkdir()
    run = run_python(str(folder / "bin" / "axolotl"), TMPDIR=str(folder / "tmp"))
    assert run.returncode == 1 and run.stdout.startswith("began\n"), run.stderr
    assert not list((folder / "tmp").iterdir()), "the file is left"
    return run.stderr.splitlines()


@pytest.mark.parametrize("case", CASES)
def test_the_launchers_last_line(tmp_path: Path, case: str):
    failing, reason = CASES[case]
    *lines, last = launched(tmp_path, failing)
    if reason is None:
        assert last.startswith("subprocess.CalledProcessError: ")
        assert not any(line.startswith("focalpo_plugins: ") for line in lines)
    else:
        assert last.startswith(reason)
        assert lines[-1].startswith("subprocess.CalledProcessError: ")


def test_a_launcher_that_another_command_takes_the_place_of(tmp_path: Path):
    """As `axolotl train` does with `accelerate launch`: the same process goes on under its name."""
    (tmp_path / "axolotl").write_text(LAUNCHES.format(failing=str(tmp_path / "failing.py")))
    replaced = (
        f"import os, sys, torch\nos.execv(sys.executable, [sys.executable, "
        f"{str(tmp_path / 'axolotl')!r}])\n"
    )
    *_, before, last = launched(tmp_path, "check_beta(-1)", replaced.replace("{", "{{"))
    assert last.startswith(OURS) and before.startswith("subprocess.CalledProcessError: ")


def test_of_several_ranks_the_first(tmp_path: Path):
    two = LAUNCHES.replace("subprocess.run(", "subprocess.run([sys.executable, {failing!r}, '0'])\n"
                           "subprocess.run(")  # fmt: skip
    failing = "if len(sys.argv) > 1: {}['first']\ncheck_beta(-1)"
    assert launched(tmp_path, failing, two)[-1] == "focalpo_plugins: it has no 'first'"


@pytest.mark.parametrize("case", CASES)
def test_without_a_launcher(tmp_path: Path, case: str):
    """Where nothing armed the process, the reason follows the traceback."""
    failing, reason = CASES[case]
    (tmp_path / "failing.py").write_text(FAILS.format(failing))
    run = run_python(str(tmp_path / "failing.py"))
    assert run.stderr.count("Traceback (most recent call last)") >= 1
    said = [line for line in run.stderr.splitlines() if line.startswith("focalpo_plugins: ")]
    assert len(said) == (reason is not None)
    if reason is not None:
        assert run.stderr.splitlines()[-1].startswith(reason)
