"""benchmarks/gpu.py, as far as a CPU goes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import forked
import pytest
from harness import EXAMPLES, run_python

SCRIPT = EXAMPLES.parent / "benchmarks" / "gpu.py"


def test_all_of_it_on_a_small_model(tmp_path: Path):
    """It ends with an error where our ways differ in loss or gradients."""
    words = ("--device", "cpu", "--tiny", "--rounds", "2")
    code, output, errors = forked.run(str(SCRIPT), words, tmp_path, path=[SCRIPT.parent])
    assert code == 0, errors[-3000:]
    table = [line for line in output.splitlines() if line.startswith("|")]
    ways = ["DPOTrainer", "FocalPOTrainer", "fused", "shared", "shared + fused"]
    titles = " | ".join(["prompt, answers, pairs", *ways, "our ways agree"])
    assert table[0] == f"| {titles} |"
    own, ours = r" \d+ ms, \d+\.\d\d GiB \|", r" \d+\.\d\d, \d+\.\d\d \|"
    agree = r" loss 0\.6\d+ ± [\d.e-]+, gradients ± [\d.e-]+ \|"
    assert len(table) == 4
    for row in table[2:]:
        assert re.fullmatch(rf"\| [\d, ]+ \|{own}({ours}){{4}}{agree}", row), row
    assert re.search(r"^loss: within (0\.\d+|1) of what rounding explains", output, re.M)
    assert "torch " in output.splitlines()[0]


def test_without_cuda_the_device_has_to_be_named():
    run = run_python(str(SCRIPT), CUDA_VISIBLE_DEVICES="")
    assert run.returncode == 2
    assert "--device must be cpu where torch finds no CUDA, got cuda" in run.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rounds", "0"), "--rounds must be at least 1, got 0"),
        (("--pairs", "none.jsonl"), "--pairs: "),
        (("--pairs", "few.jsonl"), "few.jsonl must hold at least 48 pairs, got 2"),
        (("--pairs", "broken.jsonl"), "broken.jsonl, line 2, must be an object with whole"),
        (("--out", "."), "--out must be a file, got ."),
    ],
)
def test_wrong_arguments_of_the_benchmarks(
    words: tuple[str, str], message: str, tiny: Path, tmp_path: Path
):
    """Before anything is measured. A text may hold line breaks of Unicode's, and a last line may be
    blank: neither is a row."""
    turns = [{"role": "user", "content": "q\u2028"}, {"role": "assistant", "content": "a\u0085b"}]
    line = json.dumps({"chosen": turns, "rejected": turns}, ensure_ascii=False) + "\n"
    (tmp_path / "few.jsonl").write_text("\ufeff" + 2 * line + "\n", encoding="utf-8")
    (tmp_path / "broken.jsonl").write_text(line + '{"chosen": "a"}\n', encoding="utf-8")
    script = SCRIPT.parent / "run.py"
    run = run_python(str(script), "loss", *words, cwd=tmp_path)
    assert run.returncode == 2 and not run.stdout
    assert message in run.stderr and "Traceback" not in run.stderr
    # One that is read in another folder is named in full.
    assert words[0] != "--pairs" or str(tmp_path) in run.stderr
