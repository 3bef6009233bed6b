"""Training with the network closed, ranks of one machine apart: nothing of it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from harness import SUPPORT

pytestmark = pytest.mark.releases


def test_a_step_needs_no_network(train: Callable, tmp_path: Path):
    asked = tmp_path / "asked"
    run = train(
        *("--loss", "focalpo", "--focalpo.precompute_ref", "--data.max_samples", "8"),
        launcher="python",  # what is imported asks for nothing either
        path=[SUPPORT / "no_network"],
        NETWORK_ASKED=str(asked),
    )
    assert run.returncode == 0, run.output
    assert run.said("focalpo_plugins: active.")
    assert not asked.exists(), asked.read_text()[-4000:]
