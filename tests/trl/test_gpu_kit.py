"""benchmarks/gpu.py, as far as it runs on a CPU."""

from __future__ import annotations

import json
import re
from pathlib import Path

import few_gpu_steps
import forked
import pytest
from harness import EXAMPLES, run_python

SCRIPT = EXAMPLES.parent / "benchmarks" / "gpu.py"


def test_trls_ways_on_a_small_model(tmp_path: Path):
    """It ends with an error if our ways differ in loss or gradients."""
    words = ("loss", "kernel", "ways", "--device", "cpu", "--tiny", "--rounds", "2")
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


def test_accumulated_micro_batches_on_a_small_model(tmp_path: Path):
    """It ends with an error if balanced batches change a step's loss or gradient."""
    words = ("accumulated", "--device", "cpu", "--tiny", "--rounds", "1")
    code, output, errors = forked.run(str(SCRIPT), words, tmp_path, path=[SCRIPT.parent])
    assert code == 0, errors[-3000:]
    title, _, *rows = [line for line in output.splitlines() if line.startswith("|")]
    ways = "plain | balanced | shared | both"
    assert title == f"| ranks x pairs, accumulation | {ways} | balanced are as drawn |"
    cells = r" \d+ ms \|" + r" \d+\.\d\d, tokens (\d\.\d\d) \|" * 3
    alike = r" loss ± [\d.e-]+, gradients ± [\d.e-]+ \|"
    found = [re.fullmatch(rf"\| (\d x \d, \d) \|{cells}{alike}", row) for row in rows]
    assert [match[1] for match in found] == ["2 x 1, 2", "1 x 4, 2"]
    for match in found:
        balanced, shared, both = (float(match[at]) for at in (2, 3, 4))
        assert both <= balanced <= 1 and both <= shared < 1


def test_whole_steps_of_axolotl_on_a_small_model(tiny: Path, tmp_path: Path):
    few_gpu_steps.check("axolotl", "both", tmp_path)


LENGTHS = """
import sys
from pathlib import Path

import gpu_steps
import lengths
from transformers import AutoTokenizer

file = gpu_steps.save_pairs(Path(sys.argv[1]), lengths.Lengths([(100, 200, 300)] * 60))
found = lengths.of_file(file, AutoTokenizer.from_pretrained(gpu_steps.TINY / "model"))
print(*(sorted({*part}) for part in zip(*found.parts)), sep="\\n")
"""


def test_the_pairs_of_whole_steps_have_their_lengths(tiny: Path, tmp_path: Path):
    """A word is a token, except for each text's first one, which has no space before it: up to
    three. The template adds its own: at most nine to the prompt and ten to the end."""
    run = run_python("-c", LENGTHS, str(tmp_path / "pairs.jsonl"), path=SCRIPT.parent)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = run.stdout.splitlines()
    for line, asked in zip(lines, (100, 200, 300), strict=True):
        counts = json.loads(line)
        assert asked <= counts[0] <= counts[-1] <= asked + 13


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
    """Refused before anything is measured. A text may contain Unicode's line breaks, and the last
    line may be blank: neither is a row."""
    turns = [{"role": "user", "content": "q\u2028"}, {"role": "assistant", "content": "a\u0085b"}]
    line = json.dumps({"chosen": turns, "rejected": turns}, ensure_ascii=False) + "\n"
    (tmp_path / "few.jsonl").write_text("\ufeff" + 2 * line + "\n", encoding="utf-8")
    (tmp_path / "broken.jsonl").write_text(line + '{"chosen": "a"}\n', encoding="utf-8")
    script = SCRIPT.parent / "run.py"
    run = run_python(str(script), "loss", *words, cwd=tmp_path)
    assert run.returncode == 2 and not run.stdout
    assert message in run.stderr and "Traceback" not in run.stderr
    # A file in another folder is named in full.
    assert words[0] != "--pairs" or str(tmp_path) in run.stderr
