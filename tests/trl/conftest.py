"""TRL, on a tiny model."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    import tiny_trl  # here: xdist's main process runs no test, but would import TRL anyway

    return tiny_trl.tokenizer()
