"""What we write when the disk is full, or the process ends in the middle."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from harness import SUPPORT, focalpo, run_python

from focalpo_plugins.files import write_whole

FAULTS = SUPPORT / "full_disk"
WRITE = "import sys; from pathlib import Path; from focalpo_plugins.files import write_whole; "
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


@pytest.mark.parametrize("how", ["full", "a folder in its place"])
def test_a_command_that_cannot_write(tmp_path: Path, how: str):
    """One line with flag, folder, file and reason; what was written before it is whole."""
    out = tmp_path / "out"
    if how == "full":
        variables = {"FULL_AT": "fig3.csv"}
    else:
        (out / "fig3.csv").mkdir(parents=True)
        variables = {}
    run = focalpo("curves", "--format", "csv", "--out", out, path=FAULTS, **variables)
    why = {"full": "File too large", "a folder in its place": "Is a directory"}[how]
    assert run.returncode == 2
    assert run.stderr.splitlines() == [
        "focalpo curves: error: --out must be a folder with room that can be written to, got "
        f"{str(out)!r}: fig3.csv: {why}. Make room, or name another."
    ]
    files = [path for path in out.iterdir() if path.is_file()]
    assert [path.name for path in files] == ["fig2.csv"]
    assert files[0].read_text().endswith("\n")
