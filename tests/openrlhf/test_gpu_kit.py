"""OpenRLHF's whole steps in benchmarks/gpu.py, as far as they run on a CPU."""

from __future__ import annotations

from pathlib import Path

import few_gpu_steps


def test_whole_steps_on_a_small_model(tiny: Path, tmp_path: Path):
    few_gpu_steps.check("openrlhf", "shared + precomputed", tmp_path)
