"""The reason why a run ended is the last line of its launcher's output."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import run_python

# A process that fails with {}, under a hook that explains a KeyError.
FAILS = """
import sys
from focalpo_plugins.guards import last_line
from focalpo_plugins.loss import check_beta
last_line.install(lambda error: "of the config before")
last_line.install(lambda error: "it has no %r" % error.args[0] if type(error) is KeyError else None)
print("began", flush=True)
{}
"""
# A launcher, which the autoload recognises by a module that it imports.
LAUNCHES = """
import subprocess, sys, torch.distributed.run
subprocess.run([sys.executable, {failing!r}], check=True)
"""
OURS = "focalpo_plugins: beta must be a finite number above 0, got -1"
CASES = {
    "this package's error": ("check_beta(-1)", OURS),
    "a host's error that gets an explanation": ("{}['row']", "focalpo_plugins: it has no 'row'"),
    "an unknown error": ("1 / 0", None),
    "an explanation that fails": ("raise KeyError", None),
}


def launched(folder: Path, failing: str, launcher: str = LAUNCHES, **variables: str):
    (folder / "launcher.py").write_text(launcher.format(failing=str(folder / "failing.py")))
    (folder / "failing.py").write_text(FAILS.format(failing))
    (folder / "tmp").mkdir()
    tmp = str(folder / "tmp")
    run = run_python(str(folder / "launcher.py"), TMPDIR=tmp, **variables)
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
    """As in `axolotl train` with `accelerate launch`: the same process continues under its name."""
    (tmp_path / "next.py").write_text(LAUNCHES.format(failing=str(tmp_path / "failing.py")))
    replaced = (
        "import os, sys, torch.distributed.run\nos.execv(sys.executable, [sys.executable, "
        f"{str(tmp_path / 'next.py')!r}])\n"
    )
    *_, before, last = launched(tmp_path, "check_beta(-1)", replaced.replace("{", "{{"))
    assert last.startswith(OURS) and before.startswith("subprocess.CalledProcessError: ")


def test_of_several_ranks_the_first(tmp_path: Path):
    two = LAUNCHES.replace("subprocess.run(", "subprocess.run([sys.executable, {failing!r}, '0'])\n"
                           "subprocess.run(")  # fmt: skip
    failing = "if len(sys.argv) > 1: {}['first']\ncheck_beta(-1)"
    assert launched(tmp_path, failing, two)[-1] == "focalpo_plugins: it has no 'first'"


def test_of_torchrun(tmp_path: Path):
    """The real launcher, whose last lines are a table of the failed processes."""
    (tmp_path / "failing.py").write_text(FAILS.format("check_beta(-1)"))
    launch = ("-m", "torch.distributed.run", "--nproc_per_node", "2", str(tmp_path / "failing.py"))
    run = run_python(*launch, OMP_NUM_THREADS="1")
    assert run.returncode == 1
    *_, before, last = run.stderr.splitlines()
    assert last.startswith(OURS) and before.startswith("======")
    assert "ChildFailedError" in run.stderr


def test_a_launcher_within_a_launcher(tmp_path: Path):
    """As with DeepSpeed's launcher on each machine: the outermost one prints."""
    (tmp_path / "within.py").write_text(LAUNCHES.format(failing=str(tmp_path / "failing.py")))
    outer = LAUNCHES.format(failing=str(tmp_path / "within.py")).replace("{", "{{")
    *lines, last = launched(tmp_path, "check_beta(-1)", outer)
    assert last.startswith(OURS) and not any(line.startswith(OURS) for line in lines)
    assert sum(line.startswith("subprocess.CalledProcessError: ") for line in lines) == 2


@pytest.mark.parametrize("case", CASES)
def test_without_a_launcher(tmp_path: Path, case: str):
    """If no launcher prepared the process, the reason follows the traceback."""
    failing, reason = CASES[case]
    (tmp_path / "failing.py").write_text(FAILS.format(failing))
    run = run_python(str(tmp_path / "failing.py"))
    assert run.stderr.count("Traceback (most recent call last)") >= 1
    said = [line for line in run.stderr.splitlines() if line.startswith("focalpo_plugins: ")]
    assert len(said) == (reason is not None)
    if reason is not None:
        assert run.stderr.splitlines()[-1].startswith(reason)


# Values of the variable that no process of this package sets; {} is a user's file.
FOREIGN = ["{}", "../user/notes.txt", "focalpo_plugins-1-../../user/notes.txt", "x", "", "-", "a-1",
           "focalpo_plugins-1-zz", "focalpo_plugins-1-aa\n", "focalpo_plugins-" + "9" * 5000]  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN, ids=lambda name: repr(name)[:40])
def test_a_variable_of_others_reads_writes_and_removes_nothing(tmp_path: Path, name: str):
    """The run sets its own name, and the reason is passed on as usual."""
    (tmp_path / "user").mkdir()
    notes = tmp_path / "user" / "notes.txt"
    notes.write_text("mine")
    value = name.format(notes) if name == "{}" else name
    lines = launched(tmp_path, "check_beta(-1)", FOCALPO_LAST_LINE=value)
    assert lines[-1].startswith(OURS)
    assert notes.read_text() == "mine" and list((tmp_path / "user").iterdir()) == [notes]


def test_a_file_of_the_user_is_kept_at_the_end_of_a_process(tmp_path: Path):
    """The name contains the process's own number, as if the process had set it; it comes from a
    shell that the process replaces."""
    notes = tmp_path / "x-PID-notes.txt"
    script = tmp_path / "launcher.py"
    script.write_text(
        "import os, sys, pathlib\n"
        f"path = {str(notes)!r}.replace('PID', str(os.getpid()))\n"
        "pathlib.Path(path).write_text('mine')\n"
        "os.environ['FOCALPO_LAST_LINE'] = path\n"
        "import torch.distributed.run\nprint(path)\n"
    )
    run = run_python(str(script))
    assert run.returncode == 0 and run.stderr == ""
    assert Path(run.stdout.strip()).read_text() == "mine"


def test_a_name_without_a_file_ends_quietly(tmp_path: Path):
    """A folder with that name, and a missing folder for temporary files."""
    script = tmp_path / "launcher.py"
    script.write_text(
        "import os, sys, torch.distributed.run\n"
        "folder = os.path.join(os.environ['TMPDIR'], os.environ['FOCALPO_LAST_LINE'])\n"
        "os.mkdir(folder) if len(sys.argv) < 2 else os.rmdir(os.environ['TMPDIR'])\n"
    )
    for words in ([], ["gone"]):
        (tmp_path / "tmp").mkdir(exist_ok=True)
        run = run_python(str(script), *words, TMPDIR=str(tmp_path / "tmp"))
        if not words:
            (left,) = (tmp_path / "tmp").iterdir()
            left.rmdir()
        assert (run.returncode, run.stderr) == (0, "")


def test_a_message_with_bytes_that_are_no_text(tmp_path: Path):
    failing = (
        "import os\nfrom focalpo_plugins.errors import RunError\n"
        "raise RunError(os.fsdecode(b'ck\\xff/x') + ' must be a checkpoint')"
    )
    lines = launched(tmp_path, failing)
    assert lines[-1] == "focalpo_plugins: ck\\udcff/x must be a checkpoint"


@pytest.mark.parametrize("name", ["/nowhere/x", "focalpo_plugins-1-ab/../../x"])
def test_no_other_file_is_written(tmp_path: Path, monkeypatch, name: str):
    from focalpo_plugins.guards import last_line

    monkeypatch.setenv(last_line.VARIABLE, name)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    last_line.repeat("it failed")
    assert not list(tmp_path.iterdir())
