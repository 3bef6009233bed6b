"""Fixtures that run Axolotl on the tiny assets of examples/."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Axolotl, ManyFocalpo


@pytest.fixture
def axolotl(tiny: Path, tmp_path: Path) -> Axolotl:
    return Axolotl(tiny, tmp_path)


@pytest.fixture(scope="session")
def once(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Axolotl:
    """The same for runs that several tests share."""
    return Axolotl(tiny, tmp_path_factory.mktemp("once"))


@pytest.fixture(scope="session")
def focalpo(once: Axolotl) -> ManyFocalpo:
    return ManyFocalpo(once.folder)
