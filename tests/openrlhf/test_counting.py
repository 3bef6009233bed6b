"""Which pairs the diagnostics cover, and what a margin that is not finite does, wherever it occurs.
These are real runs, on data that divides by nothing: the margins come from OpenRLHF's own
log-probabilities, which ``watched_openrlhf`` records, and the reference is another model, so the
margins differ widely from the start."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.xdist_group("counting")

NAMES = ("p", "margin_correct", "margin_incorrect")


@dataclass(frozen=True)
class Case:
    """Sizes of a run; ``batch`` covers all ranks and accumulated batches."""

    ranks: int
    train: int
    evaluate: int
    micro: int
    batch: int
    epochs: int = 2
    zero: int = 2
    log: int = 1

    def __str__(self) -> str:
        return " ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))

    @property
    def accumulated(self) -> int:
        return self.batch // self.micro // self.ranks


ACCUMULATED = Case(ranks=2, train=11, evaluate=5, micro=2, batch=8)
# Five batches an epoch and three in a step, so the second step has pairs of both epochs.
OVER_EPOCHS = Case(ranks=1, train=11, evaluate=3, micro=2, batch=6)
# The second rank evaluates only a repeated pair.
ONE_EVALUATED = Case(ranks=2, train=9, evaluate=1, micro=3, batch=6, zero=3)
CASES = (
    ACCUMULATED,
    OVER_EPOCHS,
    ONE_EVALUATED,
    Case(ranks=2, train=17, evaluate=7, micro=4, batch=8, log=2),
    Case(ranks=2, train=7, evaluate=3, micro=1, batch=4, epochs=3, log=2, zero=3),
)

# Where a log-probability is made not finite: in which batch of its rank, counted from 0, in
# training or evaluation, and for the policy (0: chosen, 1: rejected) or the reference (2, 3).
PLACE = ("mode", "batch", "rank", "row", "side", "value")
FAULTS = {
    "first of an accumulation": (ACCUMULATED, "step 1", ("train", 0, 1, 1, 0, "nan")),
    "last of an accumulation": (ACCUMULATED, "step 2", ("train", 3, 0, 0, 3, "inf")),
    "both epochs' pairs": (OVER_EPOCHS, "step 2", ("train", 4, 0, 1, 1, "-inf")),
    "ZeRO-3": (ONE_EVALUATED, "step 2", ("train", 1, 1, 2, 2, "nan")),
    "evaluation": (ACCUMULATED, "evaluation after step 1", ("eval", 1, 0, 0, 1, "nan")),
}


@pytest.fixture(scope="module")
def runs(
    tiny: Path, another: Path, watched: Callable, tmp_path_factory: pytest.TempPathFactory
) -> dict:
    folder = tmp_path_factory.mktemp("counting")

    def flags(case: Case) -> list[str]:
        files = []
        for name, count in (("train", case.train), ("test", case.evaluate)):
            lines = (tiny / f"{name}.jsonl").read_text().splitlines(keepends=True)[:count]
            files.append(folder / f"{name}{count}.jsonl")
            files[-1].write_text("".join(lines))
        given = {
            "--loss": "focalpo", "--lr_scheduler": "constant", "--ds.zero_stage": case.zero,
            "--data.dataset": files[0], "--eval.dataset": files[1], "--eval.split": "train",
            "--train.micro_batch_size": case.micro, "--train.batch_size": case.batch,
            "--train.max_epochs": case.epochs, "--logger.logging_steps": case.log,
            "--ref.model_name_or_path": another, "--model.beta": 1,
        }  # fmt: skip
        return [str(word) for flag in given.items() for word in flag]

    found: dict[Any, Any] = {case: watched(flags(case), case.ranks, {}) for case in CASES}
    for name, (case, _, place) in FAULTS.items():
        found[name] = watched(flags(case), case.ranks, dict(zip(PLACE, place, strict=True)))
    return found


def of_kind(seen: list[list], kind: str) -> list[list]:
    return [event[1:] for event in seen if event[0] == kind]


def rows(batches: list[list]) -> list[tuple[str, float]]:
    """The pairs of a rank's batches, and their margins."""
    return [row for batch in batches for row in zip(*batch, strict=True)]


def diagnostics(margins: list[float]) -> dict[str, float]:
    z = torch.tensor(margins, dtype=torch.float64)
    of = {"p": z.sigmoid(), "margin_correct": z[z > 0], "margin_incorrect": z[z <= 0]}
    return {name: values.mean().item() for name, values in of.items() if len(values)}


def logged(values: dict[str, float]) -> dict[str, float]:
    return {name: values[f"focalpo/{name}"] for name in NAMES if f"focalpo/{name}" in values}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_trained_pair_is_counted_once(runs, case: Case):
    """A step's diagnostics are the means over everything trained since the last log: every row of
    every batch of every rank. OpenRLHF repeats no pair within an epoch."""
    run = runs[case]
    assert run.returncode == 0, run.output
    ranks = [of_kind(seen, "train") for seen in run.seen()]
    of_epoch = case.train // case.ranks // case.micro
    assert [len(batches) for batches in ranks] == [of_epoch * case.epochs] * case.ranks
    for epoch in range(case.epochs):
        batches = slice(epoch * of_epoch, (epoch + 1) * of_epoch)
        pairs = [pair for batch in ranks for pair, _ in rows(batch[batches])]
        assert len(set(pairs)) == len(pairs) == of_epoch * case.ranks * case.micro
    steps = run.steps("train/")
    last = of_epoch * case.epochs // case.accumulated
    assert sorted(steps) == list(range(case.log, last + 1, case.log))
    for step, values in steps.items():
        window = slice((step - case.log) * case.accumulated, step * case.accumulated)
        margins = [margin for batch in ranks for _, margin in rows(batch[window])]
        assert logged(values) == pytest.approx(diagnostics(margins), rel=1e-5), step


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_evaluated_pair_is_counted_once(runs, case: Case):
    """OpenRLHF's sampler deals the pairs to the ranks in turn, and starts again until all have the
    same number: an evaluation's diagnostics count each pair once."""
    run = runs[case]
    evaluations = run.steps("eval/")
    assert evaluations
    ranks = [rows(of_kind(seen, "eval")) for seen in run.seen()]
    of_rank = -(-case.evaluate // case.ranks)
    assert len(ranks[0]) == of_rank * len(evaluations)
    for number, (step, values) in enumerate(sorted(evaluations.items())):
        mine = slice(number * of_rank, (number + 1) * of_rank)
        dealt = [row for turn in zip_longest(*(rank[mine] for rank in ranks)) for row in turn]
        once, again = dealt[: case.evaluate], dealt[case.evaluate :]
        assert len({pair for pair, _ in once}) == case.evaluate
        assert {pair for pair, _ in again} <= {pair for pair, _ in once}
        expected = diagnostics([margin for _, margin in once])
        assert logged(values) == pytest.approx(expected, rel=1e-5), step


def trained_row(case: Case, batch: int, rank: int, row: int) -> int:
    """OpenRLHF shuffles the data in each epoch, with its seed 42 plus the number of the epoch, and
    deals them to the ranks in turn."""
    epoch, number = divmod(batch, case.train // case.ranks // case.micro)
    generator = torch.Generator().manual_seed(42 + epoch)
    dealt = torch.randperm(case.train, generator=generator).tolist()
    return dealt[rank :: case.ranks][number * case.micro + row]


@pytest.mark.parametrize("name", FAULTS)
def test_not_finite_anywhere_stops_all_ranks_before_the_weights_change(runs, name: str):
    """The weights equal those of the run without the fault after as many steps, to the last bit;
    every rank ends with the same error; nothing of that step is logged or saved."""
    case, when, place = FAULTS[name]
    mode, batch, fault_rank, fault_row, *_ = place
    run, clean = runs[name], runs[case]
    assert run.returncode == 1, run.output
    step = int(when.split()[-1])
    done = step if mode == "eval" else step - 1
    for seen, whole in zip(run.seen(), clean.seen(), strict=True):
        weights, without = of_kind(seen, "weights"), of_kind(whole, "weights")
        # The first are the weights at the start, the last those at the end; each step changes them.
        of_steps = without[: -1 : case.accumulated]
        assert all(before != after for before, after in pairwise(of_steps))
        assert weights[-1] == of_steps[done]
        assert weights[:-1] == without[: len(weights) - 1]
        assert len(weights) == 2 + (batch if mode == "train" else done * case.accumulated)
    found = re.findall(
        rf"NotFinite: focalpo: reward margins are not finite, {when}: rank (\d), "
        r"row (\d+) of (\d|the data) \((-?\w+), float32\)\.",
        run.stderr,
    )
    assert len(found) == case.ranks and len(set(found)) == 1, run.output
    rank, row, of, _ = found[0]
    assert (int(rank), of) == (fault_rank, "the data")
    if mode == "eval":  # the pairs are dealt to the ranks in turn
        assert int(row) == fault_rank + case.ranks * (case.micro * batch + fault_row)
    else:
        assert int(row) == trained_row(case, batch, fault_rank, fault_row)
    # TensorBoard loses what it hasn't written by the end of the process.
    assert max(run.steps("train/"), default=0) <= done
    assert not (run.folder / "out" / "model.safetensors").exists()
