"""The tiny assets of examples/, and Axolotl to run on them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from harness import EXAMPLES, Axolotl


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny assets, built once; the builder does nothing where they are there."""
    folder = EXAMPLES / "tiny"
    with FileLock(tmp_path_factory.getbasetemp().parent / "tiny.lock"):
        subprocess.run([sys.executable, str(EXAMPLES / "make_tiny.py")], check=True)
    return folder


@pytest.fixture
def axolotl(tiny: Path, tmp_path: Path) -> Axolotl:
    return Axolotl(tiny, tmp_path)


@pytest.fixture(scope="session")
def once(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Axolotl:
    """For runs that several tests look at."""
    return Axolotl(tiny, tmp_path_factory.mktemp("once"))
