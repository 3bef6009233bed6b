"""The stand-in server, and the pipeline."""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from harness import EXAMPLES
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
    spec = importlib.util.spec_from_file_location("pipeline", EXAMPLES / "eval" / "pipeline.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["pipeline"] = module  # its data classes look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def plan(pipeline: ModuleType) -> object:
    return pipeline.load(EXAMPLES / "eval" / "models.yml")


@pytest.fixture(scope="session")
def configs(pipeline: ModuleType, plan: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `configs` writes."""
    return pipeline.configs(plan, tmp_path_factory.mktemp("eval"))
