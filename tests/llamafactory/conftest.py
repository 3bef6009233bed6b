"""LLaMA-Factory, to run on the tiny assets of examples/."""

from __future__ import annotations

from pathlib import Path

import pytest
from llamafactory_run import LlamaFactory


@pytest.fixture
def llamafactory(tiny: Path, few: Path, tmp_path: Path) -> LlamaFactory:
    host = LlamaFactory(tiny, tmp_path)
    host.data("train", few / "train.jsonl")
    return host
