"""Files of this package when the disk is full, or the process ends in the middle."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from harness import SUPPORT, focalpo, run_python

from focalpo_plugins.guards.folders import write_whole

FAULTS = SUPPORT / "disk_faults"
WRITE = (
    "import sys; from pathlib import Path; from focalpo_plugins.guards.folders import write_whole; "
)
WRITE += "write_whole(Path(sys.argv[1]), 'x' * 1000)"


@pytest.mark.parametrize("before", ["what was there", None])
@pytest.mark.parametrize("fault", ["FULL_AT", "KILLED_AT_NAMING"])
def test_whole_or_as_before(tmp_path: Path, before: str | None, fault: str):
    path = tmp_path / "file.json"
    if before is not None:
        path.write_text(before)
    run = run_python("-c", WRITE, str(path), path=FAULTS, **{fault: "file.json"})
    assert (path.read_text() if path.exists() else None) == before
    if fault == "FULL_AT":
        assert run.returncode == 1 and "OSError: [Errno 27] File too large" in run.stderr
        assert list(tmp_path.iterdir()) == ([path] if before else [])
    else:
        assert run.returncode == -signal.SIGKILL
        (left,) = set(tmp_path.iterdir()) - {path}
        assert left.suffix == ".tmp" and len(left.read_text()) == 1000
    write_whole(path, "y" * 1000)
    assert path.read_text() == "y" * 1000


@pytest.mark.parametrize(
    "how, at, why",
    [
        ("full", "fig3.csv", "File too large"),
        ("a folder in its place", "fig3.csv", "Is a directory"),
        ("read-only", "fig2.csv", "Permission denied"),
    ],
)
def test_a_command_that_cannot_write(tmp_path: Path, how: str, at: str, why: str):
    """One line with flag, folder, file and reason; files written before are complete."""
    out, variables = tmp_path / "out", {}
    if how == "full":
        variables = {"FULL_AT": at}
    elif how == "a folder in its place":
        (out / at).mkdir(parents=True)
    else:
        out.mkdir(mode=0o555)
        variables = {"PERMISSIONS_HOLD": "1"}
    run = focalpo("curves", "--format", "csv", "--out", out, path=FAULTS, **variables)
    assert run.returncode == 2
    assert run.stderr.splitlines() == [
        "focalpo curves: error: --out must be a folder with room that can be written to, got "
        f"{str(out)!r}: {at}: {why}. Make room, or name another."
    ]
    files = [path for path in out.iterdir() if path.is_file()]
    assert [path.name for path in files] == ["fig2.csv"] * (at == "fig3.csv")
    assert all(path.read_text().endswith("\n") for path in files)


CHECK = "import sys; from pathlib import Path; from focalpo_plugins.guards.folders import check_folder; "
CHECK += "check_folder(Path(sys.argv[1]), 'output_dir')"


def test_a_folder_that_is_read_only(tmp_path: Path):
    folder = tmp_path / "out"
    folder.mkdir(mode=0o555)
    for path in (folder, folder / "new"):
        run = run_python("-c", CHECK, str(path), path=FAULTS, PERMISSIONS_HOLD="1")
        assert run.stderr.splitlines()[-1] == (
            f"focalpo_plugins.errors.InvalidValue: output_dir must be a writable folder, got {str(path)!r}: "
            "Permission denied. Choose another, or change its permissions."
        )
    folder.chmod(0o755)
    run = run_python("-c", CHECK, str(folder / "new"), path=FAULTS, PERMISSIONS_HOLD="1")
    assert run.returncode == 0, run.stderr
    assert not list((folder / "new").iterdir())
