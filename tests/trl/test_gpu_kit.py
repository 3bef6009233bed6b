"""benchmarks/gpu.py, as far as a CPU goes."""

from __future__ import annotations

import re

from harness import EXAMPLES, run_python

SCRIPT = EXAMPLES.parent / "benchmarks" / "gpu.py"


def test_all_of_it_on_a_small_model():
    """It ends with an error where our ways differ in loss or gradients."""
    run = run_python(str(SCRIPT), "--device", "cpu", "--tiny", "--rounds", "2")
    assert run.returncode == 0, run.stderr[-3000:]
    table = [line for line in run.stdout.splitlines() if line.startswith("|")]
    ways = ["DPOTrainer", "FocalPOTrainer", "fused", "shared", "shared + fused"]
    titles = " | ".join(["prompt, answers, pairs", *ways, "our ways agree"])
    assert table[0] == f"| {titles} |"
    own, ours = r" \d+ ms, \d+\.\d\d GiB \|", r" \d+\.\d\d, \d+\.\d\d \|"
    agree = r" loss 0\.6\d+ ± [\d.e-]+, gradients ± [\d.e-]+ \|"
    assert len(table) == 4
    for row in table[2:]:
        assert re.fullmatch(rf"\| [\d, ]+ \|{own}({ours}){{4}}{agree}", row), row
    assert re.search(r"^loss: within (0\.\d+|1) of what rounding explains", run.stdout, re.M)
    assert "torch " in run.stdout.splitlines()[0]


def test_without_cuda_the_device_has_to_be_named():
    run = run_python(str(SCRIPT), CUDA_VISIBLE_DEVICES="")
    assert run.returncode == 2
    assert "--device must be cpu where torch finds no CUDA, got cuda" in run.stderr
