"""The benchmarks' own arithmetic and clocks, without a host."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from harness import EXAMPLES, run_python

from focalpo_plugins.balanced import Geometry

ROOT = EXAMPLES.parent
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import balanced_steps  # noqa: E402
import hosts  # noqa: E402
import lengths  # noqa: E402
import ranks  # noqa: E402


def test_the_critical_path():
    """Two ranks with a pair each, in two micro-steps, of pairs whose longest sequences have 10, 4, 9
    and 3 tokens. In order of length 10 and 9 meet, and 4 and 3: 2 * 10 + 2 * 4. Whatever order is
    drawn, 10 meets 9, or both count: 2 * 10 + 2 * 9.

    With shared prompts they are 11, 7, 10 and 3 tokens: 11 + 7 if balanced, else that or 11 + 10,
    and evenly spread 31 / 2.
    """
    pairs = lengths.Lengths([(2, 8, 1), (1, 3, 3), (1, 8, 1), (1, 2, 0)])
    assert pairs.longest == [10, 4, 9, 3]
    assert pairs.shared == [11, 7, 10, 3]
    geometry = Geometry(2, 1, 2)
    drawn = {lengths.path(pairs, geometry, "plain", seed) for seed in range(20)}
    assert drawn == {28, 38}
    assert {lengths.path(pairs, geometry, "balanced", seed) for seed in range(20)} == {28}
    assert {lengths.path(pairs, geometry, "shared", seed) for seed in range(20)} == {18, 21}
    assert {lengths.path(pairs, geometry, "both", seed) for seed in range(20)} == {18}
    assert lengths.ideal(pairs, geometry) == 31 / 2


def test_steps_that_are_not_whole_are_left_out():
    """Five pairs of equal length, two a step: four count, 2 steps of 2 * 4 tokens."""
    pairs = lengths.Lengths([(1, 3, 1)] * 5)
    geometry = Geometry(2, 1, 1)
    assert lengths.path(pairs, geometry, "balanced") == 16
    assert lengths.ideal(pairs, geometry) == 4 * 5 / 2


def test_geometries():
    """A step has the paper's 128 pairs; only 64 ranks with 4 each have more in a micro-step."""
    found = {ranks.named(geometry): geometry for geometry in ranks.geometries()}
    assert len(found) == 9
    assert {name for name, geometry in found.items() if geometry.step != 128} == {"64 x 4"}
    assert found["64 x 4"] == Geometry(64, 4, 1)
    assert found["8 x 1"].accumulation == 16


def test_the_flags_of_a_script():
    flags = hosts.recipe_openrlhf()
    assert flags[:2] == ["--loss", "focalpo"]
    assert flags[flags.index("--ds.lora.rank") + 1] == "128"
    assert "--focalpo.shared_prompts" not in flags, "it is a comment there"
    assert not any("#" in word for word in flags)


@pytest.mark.parametrize("host, key", [("llamafactory", "pref_loss"), ("swift", "loss_type")])
def test_the_baseline_is_the_host_s_own_dpo(host: str, key: str):
    """It has no key of this package; the other ways have the same keys, gamma and their switches."""
    plain, both = (
        balanced_steps.tiny_recipe(host, key, Geometry(1, 4, 8), hosts.SWITCHES[way])
        for way in ("plain", "both")
    )
    assert (plain[key], both[key]) == ("sigmoid", "focalpo")
    switches = {f"focalpo_{name}" for name in ("balanced_batches", "shared_prompts")}
    assert not [name for name in plain if "focalpo" in name]
    assert {*both} - {*plain} == {"focalpo_gamma", *switches}
    assert all(plain[name] == both[name] for name in plain if name != key)


def test_rows_have_steps_of_the_same_size():
    assert {row.geometry.step for row in balanced_steps.ROWS} == {32}


TOY = """
import os

import torch


def train(clock, folder, name, log, wrong=None):
    rank = int(os.environ["RANK"])
    while True:
        clock.step()
        if rank == wrong:
            raise ValueError("no such thing")
        held = torch.empty(rank * 2**20, dtype=torch.uint8)
        del held
        clock.micro_step()
        with open(log, "a") as file:
            file.write(f"{name}{rank} ")
"""
MAIN = """
import sys

import ways_in_turns
from toy import train
from ways_in_turns import Way, in_turns

if __name__ == "__main__":
    ways_in_turns.PRELOADED = ["torch"]  # no host
    log, *wrong = sys.argv[1:]
    keywords = {"log": log}
    ways = {name: Way(train, {**keywords, "name": name}) for name in "ab"}
    if wrong:
        ways["b"].keywords["wrong"] = int(wrong[0])
    for name, taken in in_turns(ways, 2, rounds=2, warm_up=1).items():
        print(name, len(taken.seconds), len(taken.cpu), taken.bytes)
"""


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "main.py").write_text(MAIN)
    return tmp_path / "main.py"


def test_ways_take_turns(toy: Path):
    """A warm-up, two rounds and one for the memory: a b, b a, a b, a b. Both ranks of a way compute
    in its turn, and the second one allocates a MiB."""
    log = toy.parent / "log"
    run = run_python(str(toy), str(log), path=BENCHMARKS)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.splitlines() == [f"{name} 2 2 {2**20}" for name in "ab"]
    turns = log.read_text().split()
    assert [turn[0] for turn in turns[::2]] == [*"abbaabab"]
    for one, other in zip(turns[::2], turns[1::2], strict=True):
        assert {one[1], other[1]} == {"0", "1"} and one[0] == other[0]


def test_a_rank_that_fails_ends_all(toy: Path):
    run = run_python(str(toy), str(toy.parent / "log"), "1", path=BENCHMARKS)
    assert run.returncode == 1 and not run.stdout
    assert "b: a rank failed:" in run.stderr
    assert "ValueError: no such thing" in run.stderr


def test_the_table_of_made_up_lengths():
    """The sizes in docs/speed.md follow the package's rule."""
    text = (ROOT / "docs" / "speed.md").read_text().partition("| ranks x pairs |")[2]
    lines = text.partition("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    found = {row[0]: [float(cell) for cell in row[6:]] for row in rows}
    expected: dict[str, list[float]] = {}
    for result in ranks.measure(5):
        expected.setdefault(result.case.split(",")[0], []).append(result.ratio)
    assert set(found) == set(expected)
    for name, ratios in expected.items():
        assert found[name] == pytest.approx(ratios, abs=0.0051), name
    of_real = {row[0]: [float(cell) for cell in row[2:6]] for row in rows}
    for balanced, shared, both, ideal in [*of_real.values(), *found.values()]:
        assert ideal <= both <= min(balanced, shared)
