"""The stand-in server, and the pipeline."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from harness import EXAMPLES, loaded
from stand_in import StandIn


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    with StandIn() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="session")
def pipeline() -> ModuleType:
    """examples/eval/pipeline.py, which is a script."""
    return loaded(EXAMPLES / "eval" / "pipeline.py")


@pytest.fixture(scope="session")
def plan(pipeline: ModuleType) -> object:
    return pipeline.load(EXAMPLES / "eval" / "models.yml")


@pytest.fixture(scope="session")
def configs(pipeline: ModuleType, plan: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `configs` writes: for servers under the models' own names."""
    return pipeline.configs(replace(plan, mark=""), tmp_path_factory.mktemp("eval"))
