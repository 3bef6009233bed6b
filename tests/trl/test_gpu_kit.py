"""benchmarks/gpu.py, as far as a CPU goes."""

from __future__ import annotations

import re

from harness import EXAMPLES, run_python

SCRIPT = EXAMPLES.parent / "benchmarks" / "gpu.py"


def test_all_of_it_on_a_small_model():
    """It ends with an error where the four ways give another loss."""
    run = run_python(str(SCRIPT), "--device", "cpu", "--tiny", "--rounds", "2")
    assert run.returncode == 0, run.stderr[-3000:]
    table = [line for line in run.stdout.splitlines() if line.startswith("|")]
    assert table[0] == "| prompt, answers, pairs | plain | fused | shared | shared + fused |"
    cell = r" \d+ ms \(\d+\.\d\d\), \d+\.\d\d GiB \|"
    assert len(table) == 4 and all(
        re.fullmatch(rf"\| [\d, ]+ \|({cell}){{4}}", row) for row in table[2:]
    )
    assert "torch " in run.stdout.splitlines()[0]


def test_without_cuda_the_device_has_to_be_named():
    run = run_python(str(SCRIPT), CUDA_VISIBLE_DEVICES="")
    assert run.returncode == 2
    assert "--device must be cpu where torch finds no CUDA, got cuda" in run.stderr
