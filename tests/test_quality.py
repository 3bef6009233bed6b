"""The bandit study: its sums by hand, DPO inside it, and the command as a user runs it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import EXAMPLES, loaded

SCRIPT = EXAMPLES / "study" / "quality.py"


@pytest.fixture(scope="module")
def quality() -> ModuleType:
    return loaded(SCRIPT)


@pytest.fixture(scope="module")
def world(quality: ModuleType):
    return quality.World(seed=3, pairs=256, prompts=50)


def test_two_arms_by_hand(quality: ModuleType):
    """Logits (ln 3, 0): probabilities 3/4 and 1/4.  The reference is even.  Against it the better
    arm wins half of the time and ties the other half, 3/4, and the worse one 1/4; so the policy
    wins 3/4 * 3/4 + 1/4 * 1/4 = 5/8.  Its reward is 3/4 * 2 less the reference's 1."""
    log_pi = torch.log_softmax(torch.tensor([[[math.log(3), 0.0]]], dtype=torch.float64), -1)
    log_ref = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    reward = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    wins = quality.beats(reward, log_ref.exp())
    assert wins.tolist() == [[0.75, 0.25]]
    (found,) = quality.measure(log_pi, log_ref, reward, wins).tolist()
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert found == pytest.approx([5 / 8, kl, 0.5], rel=1e-12)


def test_equal_arms_tie(quality: ModuleType):
    ref = torch.tensor([0.2, 0.3, 0.5])
    assert quality.beats(torch.zeros(3), ref).tolist() == pytest.approx([0.5] * 3)


def test_the_reference_wins_half(quality: ModuleType, world):
    """Against itself: KL 0, no gain of reward."""
    for _, log_ref, reward, wins in world.held_out.values():
        found = quality.measure(log_ref[None], log_ref, reward, wins)[0]
        assert found.tolist() == pytest.approx([0.5, 0, 0], abs=1e-5)


def test_gamma_0_is_dpo(quality: ModuleType, world, monkeypatch: pytest.MonkeyPatch):
    """To the last bit, with torch's own log-sigmoid instead of our loss."""
    losses = [quality.Loss("FocalPO 0", variant) for variant in ("correct", "incorrect")]
    ours = quality.train(world, 0.2, losses, betas=[1.0], rates=[8e-3], epochs=3)
    other = quality.train(world, 0.2, [quality.LOSSES[1]], betas=[1.0], rates=[8e-3], epochs=3)
    monkeypatch.setattr(quality, "focalpo_loss", lambda z, gamma, variant: -F.logsigmoid(z))
    dpo = quality.train(world, 0.2, losses, betas=[1.0], rates=[8e-3], epochs=3)
    for a, b, c in zip(ours, dpo, other, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[0], a[1])
        assert not torch.equal(a[:1], c)


@pytest.mark.parametrize("name", ["DPO", "FocalPO 1", "incorrect 1", "SimPO"])
def test_the_direction(quality: ModuleType, world, name: str):
    """One small step raises the chosen arm's probability against the rejected one's: for all pairs
    together, and with every label flipped the other way."""
    (loss,) = (loss for loss in quality.LOSSES if loss.name == name)
    rows = torch.arange(256)
    for noise, sign in ((0.0, 1), (1.0, -1)):
        weights = quality.train(world, noise, [loss], betas=[0.1], rates=[1e-3], epochs=1)
        log_pi = torch.log_softmax(quality.logits(weights, world.x)[0], -1)
        gain = log_pi - world.log_ref
        gap = gain[rows, world.better] - gain[rows, world.worse]
        assert sign * gap.mean() > 0.01


def test_flips_are_nested(quality: ModuleType, world):
    """More noise flips the same labels and further ones; no noise leaves the better arm chosen."""
    flipped = [world.labelled(noise)[0] != world.better for noise in (0.0, 0.1, 0.4)]
    assert flipped[0].sum() == 0
    assert 5 < flipped[1].sum() < flipped[2].sum() < 140
    assert (flipped[1] <= flipped[2]).all()
    assert (world.better != world.worse).all()


def test_a_moving_gamma(quality: ModuleType, world, monkeypatch: pytest.MonkeyPatch):
    """A straight line from the first to the last step; without an end it stays."""
    falling = quality.Loss("falling", gamma=0.25, last_gamma=0.05)
    assert [falling.gamma_at(k, 5) for k in range(5)] == pytest.approx([0.25, 0.2, 0.15, 0.1, 0.05])
    assert quality.Loss("", gamma=0.25).gamma_at(4, 5) == falling.gamma_at(0, 1) == 0.25
    seen = []

    def watch(z, gamma, variant):
        seen.append(gamma)
        return -F.logsigmoid(z)

    monkeypatch.setattr(quality, "focalpo_loss", watch)
    quality.train(world, 0.0, [falling], betas=[1.0], rates=[1e-3], epochs=2)
    assert seen == pytest.approx(np.linspace(0.25, 0.05, 8).tolist())


def test_simpo_has_no_reference(quality: ModuleType, world, monkeypatch: pytest.MonkeyPatch):
    """Its first margin is beta * (log ref(w) - log ref(l) - 0.5), where DPO's is 0."""
    first = {}

    def watch(z, gamma, variant):
        first.setdefault(len(first), z.detach())
        return -F.logsigmoid(z)

    monkeypatch.setattr(quality, "focalpo_loss", watch)
    losses = [loss for loss in quality.LOSSES if loss.name in ("DPO", "SimPO")]
    quality.train(world, 0.0, losses, betas=[2.0], rates=[1e-3], epochs=1)
    batch = torch.randperm(256, generator=torch.Generator().manual_seed(world.order))[:64]
    ref = world.log_ref[batch, world.better[batch]] - world.log_ref[batch, world.worse[batch]]
    assert first[0][0].tolist() == pytest.approx([0] * 64, abs=1e-5)
    assert first[1][0].tolist() == pytest.approx((2 * (ref - 0.5)).tolist(), abs=1e-5)


def test_settings_come_from_other_seeds_and_prompts(quality: ModuleType):
    """Setting 0 is best for the even seeds on the tuning prompts, setting 1 for the odd ones, and
    each half is given the other's."""
    runs = np.zeros((4, 2, 2, 3))
    runs[0::2, 0, 0, 0] = runs[1::2, 1, 0, 0] = 0.9
    runs[:, 0, 1, 0], runs[:, 1, 1, 0] = 0.6, 0.7
    chosen = quality.choose(runs)
    assert chosen.tolist() == [1, 0, 1, 0]
    assert quality.at_settings(runs, chosen)[:, 0].tolist() == [0.7, 0.6, 0.7, 0.6]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (0.0, [0, 0]),  # only the reference
        (0.1, [0.5, 0]),  # half of the prompts to it
        (0.2, [1, 0]),
        (0.6, [0.5, 0.5]),
        (1.0, [0, 1]),
        (9.0, [0, 1]),  # what is left of the budget buys nothing
    ],
)
def test_mixtures_by_hand(quality: ModuleType, budget: float, expected: list[float]):
    """Settings with KL 0.2 and win rate 0.6, and with KL 1 and win rate 0.7."""
    found = quality.mixture(np.array([0.6, 0.7]), np.array([0.2, 1.0]), budget)
    assert found.tolist() == pytest.approx(expected)
    worse = quality.mixture(np.array([0.6, 0.3]), np.array([0.2, 1.0]), budget)
    assert worse.tolist() == pytest.approx([min(1, budget / 0.2), 0])


@pytest.mark.parametrize(("count", "t"), [(4, 3.182), (8, 2.365), (32, 2.040)])
def test_the_interval_is_students(quality: ModuleType, count: int, t: float):
    """Values of mean 0 and standard deviation 1; t is of the printed tables."""
    values = np.tile([-1.0, 1.0], count // 2)
    values /= values.std(ddof=1)
    assert quality.half_width(values) == pytest.approx(t / count**0.5, rel=0.01)


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """The command, cut to seconds."""
    folder = tmp_path_factory.mktemp("quality")
    words = "--seeds 4 --noise 0 0.4 --epochs 1 --pairs 192 --prompts 40 --jobs 2 --out out"
    grid = "--betas 0.3 1 --rates 4e-3 1.6e-2"
    run = subprocess.run(
        [sys.executable, str(SCRIPT), *words.split(), *grid.split()],
        cwd=folder, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "4 of 4 seeds" in run.stdout
    return folder / "out"


@pytest.mark.xdist_group("quality")
def test_what_the_command_writes(quality: ModuleType, done: Path):
    """Every protocol and loss, and the same numbers as one seed by itself."""
    content = json.loads((done / "quality.json").read_text())
    runs = np.array(content["runs"])
    assert runs.shape == (4, 2, 10, 2, 2, 2, 3)
    settings = {"epochs": 1, "pairs": 192, "prompts": 40}
    alone = quality.run_seed(2, [0.0, 0.4], betas=[0.3, 1.0], rates=[4e-3, 1.6e-2], **settings)
    assert runs[2] == pytest.approx(alone, abs=1e-6)
    rows = content["rows"]
    names = [loss.name for loss in quality.LOSSES]
    for noise in (0.0, 0.4):
        for protocol, each in (("shared", 3), ("own", 3), ("equal_kl", len(quality.BUDGETS))):
            of = [r for r in rows if (r["noise"], r["protocol"]) == (noise, protocol)]
            assert [r["loss"] for r in of] == names * each
    for row in rows:
        assert row["kl"] <= (row["budget"] or math.inf) * 1.5
        if row["loss"] == "DPO":
            assert row["difference"] == row["difference_95"] == 0
    picture = (done / "quality.png").read_bytes()
    assert picture[:4] == b"\x89PNG"


@pytest.mark.xdist_group("quality")
def test_a_row_by_hand(done: Path):
    """FocalPO 1 at DPO's settings, 40 % flipped, from the runs themselves."""
    content = json.loads((done / "quality.json").read_text())
    runs = np.array(content["runs"])[:, 1].reshape(4, 10, 4, 2, 3)
    gaps = []
    for seed in range(4):
        others = [other for other in range(4) if other % 2 != seed % 2]
        at = runs[others, 0, :, 0, 0].mean(0).argmax()
        gaps.append(100 * (runs[seed, 3, at, 1, 0] - runs[seed, 0, at, 1, 0]))
    (row,) = [
        r
        for r in content["rows"]
        if (r["loss"], r["noise"], r["protocol"]) == ("FocalPO 1", 0.4, "shared")
        and r["beta"] is None
    ]
    assert row["difference"] == pytest.approx(np.mean(gaps), abs=1e-3)
    assert row["difference_95"] == pytest.approx(3.182 * np.std(gaps, ddof=1) / 2, rel=0.01)


@pytest.mark.xdist_group("quality")
def test_the_tables_columns(quality: ModuleType, done: Path):
    text = (done / "tables.md").read_text()
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("| loss")]
    flipped, betas = "| loss | 0% flipped | 40% flipped |", "| loss | beta 0.3 | beta 1 |"
    assert [lines[0] for lines in tables] == [flipped] * 4 + [betas] * 2
    for lines in tables:
        assert {line.count("|") for line in lines if line} == {4}
        first = [line.split("|")[1].strip() for line in lines[2:] if line]
        assert first[:10] == [loss.name for loss in quality.LOSSES]
    rows = json.loads((done / "quality.json").read_text())["rows"]
    (row,) = [
        r for r in rows if [r[key] for key in quality.KEY] == [0.4, "FocalPO 1", "own", None, None]
    ]
    shown = (
        f"{round(row['difference'], 2) + 0.0:+.2f} ± {row['difference_95']:.2f}, {row['kl']:.2f}"
    )
    assert tables[1][5].split("|")[3].strip() == shown
    assert tables[3][5].split("|")[3].strip() == row["settings"]
    assert tables[0][2].split("|")[2].split(",")[0].endswith("%")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--seeds 3", "--seeds must be at least 4, got 3"),
        ("--pairs 63", "--pairs must be at least 64, got 63"),
        ("--noise 0.5", "--noise must be at least 0 and below 0.5, got 0.5"),
        ("--betas 0", "--betas must be above 0, got 0"),
        ("--betas 1 nan", "--betas must be above 0, got nan"),
        ("--rates inf", "--rates must be above 0, got inf"),
        ("--noise 0.1 0.1", "--noise must be different numbers, got 0.1 0.1"),
    ],
)
def test_errors(quality: ModuleType, words: str, message: str, tmp_path: Path, capsys):
    with pytest.raises(SystemExit) as ended:
        quality.main([*words.split(), "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_out_has_to_be_a_folder(quality: ModuleType, tmp_path: Path, capsys):
    (tmp_path / "out").touch()
    with pytest.raises(SystemExit):
        quality.main(["--out", str(tmp_path / "out")])
    assert "--out must be a folder, got" in capsys.readouterr().err


def test_a_seed_that_is_not_finite_ends_the_study(tmp_path: Path):
    """A rate of 1e38 breaks the policy of the first seed; the other 99 are not waited for."""
    words = (
        "--seeds 100 --noise 0 --betas 1 --rates 1e38 --epochs 1 --pairs 64 --prompts 4 --jobs 1"
    )
    run = subprocess.run(
        [sys.executable, str(SCRIPT), *words.split(), "--out", str(tmp_path / "out")],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240,
    )  # fmt: skip
    assert run.returncode == 1
    assert "numbers of seed 0 are not finite; give smaller --rates" in run.stderr
    assert "Traceback" not in run.stderr and "of 100 seeds" not in run.stdout


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are read from /proc")
def test_workers_end_with_a_parent_that_is_killed(quality: ModuleType, tmp_path: Path):
    words = [sys.executable, str(SCRIPT), "--jobs", "1", "--out", str(tmp_path / "out")]

    def children(parent: int) -> dict[Path, str]:
        """The states of the processes that were started as its children, by their session."""
        found = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, _, session = stat.read_text().rpartition(") ")[2].split()[:4]
                if int(session) == parent and stat.parent.name != str(parent):
                    found[stat.parent] = state
        return found

    def at_work(parent: int) -> bool:
        """Whether a worker process has imported torch; the other child process tracks its semaphores."""
        with contextlib.suppress(OSError):
            return any("libtorch" in (each / "maps").read_text() for each in children(parent))
        return False

    with subprocess.Popen(words, start_new_session=True, stdout=subprocess.DEVNULL) as parent:
        for _ in range(1200):
            if at_work(parent.pid):
                break
            time.sleep(0.1)
        assert at_work(parent.pid)
        parent.kill()
    for _ in range(600):
        if {*children(parent.pid).values()} <= {"Z"}:
            break
        time.sleep(0.1)
    assert {*children(parent.pid).values()} <= {"Z"}
