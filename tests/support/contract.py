"""The promises to every host's users: one class of tests, which each host runs in real processes.

A host is an object with what ``Host`` lists.  ``tests/HOST/test_contract.py`` subclasses ``Contract``
with a fixture ``host``; what holds only in one host is in its other files.  A run is made once and
serves every test that looks at it, as starting processes is what takes the time.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import pytest
from harness import with_nan

DPO = math.log(2)  # the loss of a margin that is 0
FIRST = 2**-0.05 * DPO  # 0.66953, and FocalPO's
# Seven pairs or fewer of sixteen are warned of.
PAIRS, FEW = 16, 4
# Ten steps of eight pairs, twice through 40. At a rate that changes nothing every margin stays.
WHOLE = {"steps": 10, "save": 3, "evaluate": 5}
AT_REST = {"rate": 1e-12, "steps": 10}
MOVING = {**AT_REST, "gamma": 0.45, "gamma_end": 0.0}
GAMMAS = [0.45 - 0.05 * step for step in range(10)]


@dataclass
class Result:
    """What a run left behind; steps and evaluations by the names that the host logs."""

    code: int
    output: str
    folder: Path
    steps: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)

    def said(self, what: str) -> list[str]:
        """This package's lines that hold this, without the prefix."""
        lines = [line.partition("focalpo_plugins: ")[2] for line in self.output.splitlines()]
        return [line for line in lines if what in line]

    def each(self, name: str) -> list[float]:
        return [step[name] for step in self.steps]

    @classmethod
    def of_history(
        cls, code: int, output: str, folder: Path, history: list[dict[str, float]]
    ) -> Result:
        """What a ``transformers.Trainer`` left, by its log."""
        steps = [entry for entry in history if "loss" in entry]
        evaluations = [
            {name.removeprefix("eval_"): value for name, value in entry.items()}
            for entry in history
            if "eval_loss" in entry
        ]
        return cls(code, output, folder, steps, evaluations)


class Host(Protocol):
    trainer: str  # the name of its class
    packages: tuple[str, ...]  # whose versions the start-up line has
    said: str  # what that line has of the host's own values
    tokens: int  # that its tokenizer has
    rounded: float  # by how much at most, when a loss is logged
    near: float  # the rounding between two layouts of a batch
    two_ranks_gradient: float  # of two ranks, relative to one rank that accumulates the same pairs
    apart: dict[str, Any]  # options by which margins aren't 0
    spread: float  # and the losses of five steps differ by so much
    names: dict[str, str]  # the host's names for loss, grad_norm, accuracy and margin in its log
    refused: dict[str, tuple[str, ...]]  # by the name of one of CASES, words of the last line
    loads_the_model: bool  # and not the user's script
    unknown: str  # the message about an option that doesn't exist

    def key(self, option: str) -> str:
        """An option of a loss, or ``beta``, as the user writes it."""

    def run(
        self,
        options: dict[str, Any],
        pairs: Path | None = None,
        ranks: int = 1,
        resume: Path | None = None,
        fault: str | None = None,
    ) -> Result:
        """Train on ``pairs``, 40 of the tiny data if None, eight a step, whatever the ranks.

        Args:
            options: ``loss`` (this package's or "dpo", the host's own), its options, ``beta``,
                ``steps``, ``save`` and ``evaluate`` (every so many steps), ``rate``, ``model``,
                ``reference`` (a folder; "another": the policy's norm, times 1.1).
            resume: the checkpoint to resume from; the run goes on in its folder's copy.
            fault: "read-only", of the folder for checkpoints; "no network".
        """

    def checkpoint(self, run: Result, step: int) -> Path: ...

    def log(self, run: Result) -> Path:
        """The folder that `focalpo report` gets."""


class TrainerHost:
    """What the hosts that are a ``transformers.Trainer`` share: names in the log, keys, folders."""

    # transformers 4 logs four digits.
    rounded = 5e-5 if version("transformers").startswith("4.") else 1e-5
    near = 1e-4
    loads_the_model = True
    said, tokens = "beta=0.1", 883
    # transformers 5.5 divides accumulated gradients twice, also under DPO.
    two_ranks_gradient = 2.0 if version("transformers").startswith("5.5.") else 1.0
    names = {
        "loss": "loss",
        "grad_norm": "grad_norm",
        "accuracy": "rewards/accuracies",
        "margin": "rewards/margins",
    }
    keys: dict[str, str]  # the host's own, by the names of the contract's options
    out = ""  # the run's output folder, in the folder of its result

    def __init__(self, tiny: Path, few: Path, another: Path, new: Callable[[str], Path]) -> None:
        self.tiny, self.few, self.another, self.new = tiny, few, another, new

    def key(self, option: str) -> str:
        return self.keys.get(option, f"focalpo_{option}")

    def checkpoint(self, run: Result, step: int) -> Path:
        return self.log(run) / f"checkpoint-{step}"

    def log(self, run: Result) -> Path:
        return run.folder / self.out


# Useless data.
Row = dict[str, Any]


def says(row: Row, side: str, answer: str) -> Row:
    return {**row, side: [*row[side][:-1], {"role": "assistant", "content": answer}]}


def alike(row: Row) -> Row:
    return says(row, "rejected", row["chosen"][-1]["content"])


def empty(row: Row) -> Row:
    return says(row, "chosen", "")


def after_other_turns(row: Row) -> Row:
    """Two turns before the last question, the second of which is longer on the chosen side."""
    said = {"chosen": "A long answer that is good.", "rejected": "Short."}
    return {
        side: [turns[0], {"role": "assistant", "content": said[side]}, turns[0], turns[-1]]
        for side, turns in row.items()
    }


def long_prompt(row: Row) -> Row:
    question = {"role": "user", "content": "And how many words are in this? " * 60}
    return {side: [question, row[side][-1]] for side in ("chosen", "rejected")}


def lines(rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


CASES: dict[str, Callable[[list[Row]], str]] = {
    "equal answers": lambda rows: lines(map(alike, rows)),
    "most answers equal": lambda rows: lines([*rows[:7], *map(alike, rows[7:])]),
    "empty answers": lambda rows: lines(map(empty, rows)),
    "earlier turns that differ": lambda rows: lines(map(after_other_turns, rows)),
    "prompts beyond the limit": lambda rows: lines(map(long_prompt, rows)),
    "an empty file": lambda rows: "",
    "a cut first line": lambda rows: lines(rows)[9:],
    "a cut last line": lambda rows: lines(rows)[:-40],
    "no column chosen": lambda rows: lines({"rejected": row["rejected"]} for row in rows),
    "no column rejected": lambda rows: lines({"chosen": row["chosen"]} for row in rows),
}


class Contract:
    RESUMED_ON = 2  # ranks
    OF_ALL_PAIRS = ("loss", "margin")  # what the host logs about all pairs of a step

    @pytest.fixture(scope="class")
    @classmethod
    def whole(cls, host: Host) -> Result:
        return trained(host.run(WHOLE, ranks=2))

    @pytest.fixture(scope="class")
    @classmethod
    def saved(cls, host: Host, whole: Result) -> Result:
        return whole if cls.RESUMED_ON == 2 else trained(host.run(WHOLE, ranks=cls.RESUMED_ON))

    @pytest.fixture(scope="class")
    @classmethod
    def moving(cls, host: Host) -> Result:
        return trained(host.run({**MOVING, "save": 3}))

    @pytest.fixture(scope="class")
    @classmethod
    def apart(cls, host: Host) -> Result:
        return trained(host.run({"steps": 5, "evaluate": 5, **host.apart}))

    @pytest.fixture(scope="class")
    @classmethod
    def pairs(cls, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
        """A file of 16 pairs, as ``write`` makes it of them."""
        found = (tiny / "train.jsonl").read_text().splitlines()[:PAIRS]
        rows = [{side: json.loads(line)[side] for side in ("chosen", "rejected")} for line in found]

        def make(write: Callable[[list[Row]], str]) -> Path:
            path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
            path.write_text(write(rows))
            return path

        return make

    # The loss.

    @pytest.mark.releases
    def test_the_first_loss(self, host: Host, whole: Result):
        """Every margin is 0 then."""
        assert len(whole.steps) == 10
        assert whole.each(host.names["loss"])[0] == pytest.approx(FIRST, abs=host.rounded)
        agrees = "first step: policy and reference agree, largest margin 0."
        assert len(whole.said(agrees)) == 1

    @pytest.mark.releases
    def test_says_once_that_it_is_active(self, host: Host, whole: Result):
        """Whatever the ranks; the weight of a pair turns negative below z* = log(p / (1 - p)) with
        p = e^-20."""
        (line,) = whole.said("active.")
        packages = ("focalpo_plugins", *host.packages, "torch")
        versions = " ".join(f"{package}={version(package)}" for package in packages)
        assert line == (
            "active. loss=focalpo gamma=0.05 variant=correct z*=-20.00 loss_at_margin_0=0.6695 "
            f"{host.said} trainer={host.trainer} {versions}"
        )

    @pytest.mark.releases
    def test_gamma_zero_is_the_hosts_own(self, host: Host):
        """To the last bit, step for step; the host's own loss trains without a message."""
        own, zero = (
            trained(host.run({"steps": 5, **options}))
            for options in ({"loss": "dpo"}, {"loss": "focalpo", "gamma": 0.0})
        )
        assert own.each(host.names["loss"])[0] == pytest.approx(DPO, abs=host.rounded)
        assert len(own.steps) == len(zero.steps) == 5
        for ours, theirs in zip(zero.steps, own.steps, strict=True):
            same = [n for n in theirs if n in host.names.values() or "reward" in n or "logps" in n]
            assert len(same) > 4
            assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
        assert not own.said("active.") and not own.said("done.")
        assert "gamma=0.0" in zero.said("active.")[0]

    # The log.

    @pytest.mark.releases
    def test_diagnostics(self, host: Host, whole: Result):
        """At the first step p is 1/2 and the weight 2^-0.05 (1 - 0.05 ln 2) = 0.93246."""
        assert len(whole.evaluations) >= 2
        for entry in (*whole.steps, *whole.evaluations):
            assert {f"focalpo/{name}" for name in ("p", "weight", "reversed")} <= {*entry}
            assert {"focalpo/margin_correct", "focalpo/margin_incorrect"} & {*entry}
            assert not any(name.startswith("focalpo/gamma") for name in entry)
        first, last = (
            {name.removeprefix("focalpo/"): value for name, value in entry.items()}
            for entry in (whole.steps[0], whole.evaluations[-1])
        )
        of_first = {name for name in whole.steps[0] if name.startswith("focalpo/")}
        # No pair is ranked right yet.
        assert of_first == {f"focalpo/{n}" for n in ("p", "weight", "reversed", "margin_incorrect")}
        assert first["p"] == pytest.approx(0.5, abs=1e-6)
        assert first["weight"] == pytest.approx(0.93246, abs=1e-5)
        assert first["margin_incorrect"] == first["reversed"] == 0
        assert 0 < last["p"] < 1
        if host.names["margin"] in last:
            groups = [last[f"margin_{which}"] for which in ("incorrect", "correct")]
            assert min(groups) <= last[host.names["margin"]] <= max(groups)
            assert 0 <= last[host.names["accuracy"]] <= 1

    @pytest.mark.releases
    def test_each_pair_is_counted_once(self, host: Host, whole: Result):
        """The host's mean margin over all ranks is the mean of the two groups' margins, weighted by
        its share of pairs ranked right."""
        mixed = 0
        for step in whole.steps:
            right, wrong = (
                step.get(f"focalpo/margin_{which}", 0) for which in ("correct", "incorrect")
            )
            share = step[host.names["accuracy"]]
            margin = share * right + (1 - share) * wrong
            assert margin == pytest.approx(step[host.names["margin"]], abs=1e-4)
            mixed += 0 < share < 1
        assert mixed, "no step had pairs ranked right and pairs ranked wrong"

    def test_the_closing_line(self, host: Host, whole: Result):
        losses = whole.each(host.names["loss"])
        (line,) = whole.said("done.")
        assert line.startswith(
            f"done. 10 steps; loss {losses[0]:.4f} at first, {losses[-1]:.4f} at last; held out: "
        )
        names = "loss" if "loss" in whole.evaluations[0] else "eval_loss", host.names["accuracy"]
        found = [[each[name] for each in whole.evaluations] for name in names]
        assert len(found[0]) > 1
        of_losses = f"loss {found[0][0]:.3f} at first, {found[0][-1]:.3f} at last"
        assert f"; held out: {of_losses}, accuracy {found[1][-1]:.3f}" in line
        assert line.endswith(f"; next: focalpo report {host.log(whole)}")

    # Resuming.

    @pytest.mark.releases
    def test_resuming_is_exact(self, host: Host, saved: Result):
        """A run resumed at step 3, inside the first epoch, trains the same as one without a stop, to the last
        bit."""
        rest = trained(host.run(WHOLE, ranks=self.RESUMED_ON, resume=host.checkpoint(saved, 3)))
        assert [step["step"] for step in rest.steps][-7:] == [*range(4, 11)]
        names = [*host.names.values(), "focalpo/p"]
        for again, before in zip(rest.steps[-7:], saved.steps[3:], strict=True):
            assert {n: again[n] for n in names} == {n: before[n] for n in names}

    @pytest.mark.parametrize("option, was, got", [("gamma", 0.05, 0.1), ("beta", 0.1, 0.2)])
    def test_resuming_with_another_value(
        self, host: Host, saved: Result, option: str, was: float, got: float
    ):
        """Refused with key and both values."""
        run = host.run(
            {**WHOLE, option: got}, ranks=self.RESUMED_ON, resume=host.checkpoint(saved, 9)
        )
        message = f"{host.key(option)} was {was}, got {got}: resuming would change the loss"
        stopped(run, message, host.key("allow_changed"))

    def test_resuming_with_another_value_that_is_allowed(self, host: Host, saved: Result):
        """Its own checkpoints then record the value of their last steps."""
        changed = {**WHOLE, "beta": 0.2, "allow_changed": True, "save": 1}
        run = trained(host.run(changed, ranks=self.RESUMED_ON, resume=host.checkpoint(saved, 9)))
        assert run.steps[-1]["step"] == 10
        again = host.run(
            {**WHOLE, "steps": 15}, ranks=self.RESUMED_ON, resume=host.checkpoint(run, 10)
        )
        stopped(again, f"{host.key('beta')} was 0.2, got 0.1: ")

    @pytest.mark.releases
    def test_resuming_the_hosts_own(self, host: Host):
        own = trained(host.run({"loss": "dpo", "steps": 5, "save": 3}))
        run = host.run({"steps": 5, "save": 3}, resume=host.checkpoint(own, 3))
        stopped(run, "has no record of a loss of focalpo_plugins")

    # A gamma that moves.

    @pytest.mark.releases
    def test_gamma_of_each_step(self, host: Host, moving: Result):
        """.45, .40, ... 0; the loss of margin 0 is 2^-gamma ln 2, so .5074 at first and .6931."""
        assert moving.each("focalpo/gamma") == pytest.approx(GAMMAS, abs=1e-6)
        losses = [2**-gamma * DPO for gamma in GAMMAS]
        assert moving.each(host.names["loss"]) == pytest.approx(losses, abs=1e-4)
        (line,) = moving.said("active.")
        assert "gamma=0.45 gamma_end=0.0 variant=correct" in line
        (line,) = moving.said("done.")
        ends = "loss 0.5074 at first (gamma 0.45), 0.6931 at last (gamma 0); "
        assert f"done. 10 steps; {ends}" in line

    def test_a_moving_gamma_survives_resuming(self, host: Host, moving: Result):
        checkpoint = host.checkpoint(moving, 3)
        rest = trained(host.run({**MOVING, "save": 3}, resume=checkpoint))
        assert rest.each("focalpo/gamma")[-7:] == pytest.approx(GAMMAS[3:], abs=1e-6)
        assert not rest.said("changes over the run")
        changed = host.run({**MOVING, "save": 3, "gamma_end": 0.1}, resume=checkpoint)
        stopped(changed, f"{host.key('gamma_end')} was 0.0, got 0.1")

    # Other ways to the same numbers.

    @pytest.mark.releases
    def test_shared_prompts_equal_plain(self, host: Host, apart: Result):
        shared = trained(
            host.run({"steps": 5, "evaluate": 5, **host.apart, "shared_prompts": True})
        )
        names = [host.names[name] for name in ("loss", "margin")] + ["focalpo/p"]
        assert len(shared.steps) == len(apart.steps) == 5
        for ours, plain in zip(shared.steps, apart.steps, strict=True):
            for name in names:
                assert ours[name] == pytest.approx(plain[name], abs=host.near), name
            grad_norm = host.names["grad_norm"]
            assert ours[grad_norm] == pytest.approx(plain[grad_norm], rel=host.near)
            assert 0.1 < ours["focalpo/tokens_saved"] < 0.9
        of_eval = [run.evaluations[-1]["focalpo/p"] for run in (shared, apart)]
        assert of_eval[0] == pytest.approx(of_eval[1], abs=host.near)
        losses = apart.each(host.names["loss"])
        assert max(losses) - min(losses) > host.spread
        assert " prompts=shared attention=" in shared.said("active.")[0]
        assert "prompts=" not in apart.said("active.")[0]
        assert not any("focalpo/tokens" in name for name in apart.steps[0])
        whole = [
            step["focalpo/tokens"] / (1 - step["focalpo/tokens_saved"]) for step in shared.steps
        ]
        saved = 1 - sum(shared.each("focalpo/tokens")) / sum(whole)
        assert f"; shared prompts saved {saved:.0%} of the tokens; " in shared.said("done.")[0]

    @pytest.mark.releases
    @pytest.mark.parametrize("ranks", [1, 2])
    def test_balanced_batches_equal_plain(self, host: Host, apart: Result, ranks: int):
        """Each step has the same pairs on any number of ranks, dealt or not; on two ranks also with
        shared prompts."""
        shared = {"shared_prompts": True} if ranks == 2 else {}
        options = {"steps": 5, "evaluate": 5, **host.apart, "balanced_batches": True, **shared}
        balanced = trained(host.run(options, ranks=ranks))
        assert len(balanced.steps) == len(apart.steps) == 5
        grad_norm = host.names["grad_norm"]
        names = [host.names[name] for name in self.OF_ALL_PAIRS] + ["focalpo/p"]
        scale = host.two_ranks_gradient if ranks == 2 else 1.0
        for ours, plain in zip(balanced.steps, apart.steps, strict=True):
            for name in names:
                assert ours[name] == pytest.approx(plain[name], abs=host.near), name
            assert ours[grad_norm] == pytest.approx(scale * plain[grad_norm], rel=host.near)
            assert ours["focalpo/tokens"] > 0
            assert ("focalpo/idle" in ours) == (ranks == 2)
        of_eval = [run.evaluations[-1]["focalpo/p"] for run in (balanced, apart)]
        assert of_eval[0] == pytest.approx(of_eval[1], abs=host.near)
        assert " batches=balanced" in balanced.said("active.")[0]
        (line,) = balanced.said("done.")
        saved = re.search(r"balanced batches saved (\d+)% of those that a step waits for", line)
        assert saved is not None and 0 < int(saved[1]) < 90, line
        assert ("; shared prompts saved " in line) == (ranks == 2)
        assert "batches=" not in apart.said("active.")[0]

    # Faults.

    @pytest.mark.releases
    def test_margins_that_are_not_finite(self, host: Host, tiny: Path, few: Path, tmp_path: Path):
        """A pair with a token that has lost its weights: both ranks stop in its step, before it is
        logged or saved, and name the row and the rank."""
        with_nan(tiny / "model", few / "train.jsonl", tmp_path)
        run = host.run({"steps": 5, "save": 1, "model": tmp_path}, ranks=2)
        assert run.code != 0
        found = re.findall(
            r"NotFinite: focalpo: reward margins are not finite, step (\d): rank (\d), "
            r"row (\d+) of the data \(nan, (?:float32|bfloat16)\)\.",
            run.output,
        )
        assert len(found) == 2 and len(set(found)) == 1, run.output[-6000:]
        step, rank, row = map(int, found[0])
        assert 1 <= step <= 5 and rank in (0, 1) and row in range(40)
        assert max((entry["step"] for entry in run.steps), default=0) < step
        saved = [number for number in range(1, 6) if host.checkpoint(run, number).exists()]
        assert saved[-3:] == [*range(max(1, step - 3), step)]
        assert all(math.isfinite(loss) for loss in run.each(host.names["loss"]))

    @pytest.mark.releases
    def test_a_folder_that_is_read_only(self, host: Host):
        run = host.run({"steps": 5, "save": 2}, fault="read-only")
        stopped(run, "Permission denied")

    def test_no_network(self, host: Host):
        """The run asks for nothing from the network, not even at import: every attempt is
        recorded."""
        run = trained(host.run({"steps": 5}, fault="no network"))
        assert run.each(host.names["loss"])[0] == pytest.approx(FIRST, abs=1e-4)
        assert run.said("active.") and not (run.folder / "asked").exists()

    @pytest.mark.releases
    def test_an_option_that_is_misspelt(self, host: Host):
        stopped(host.run({"steps": 5, "gama": 0.1}), host.unknown)

    # The data.

    @pytest.mark.parametrize("case", CASES)
    def test_data_that_is_refused(self, host: Host, pairs: Callable[..., Path], case: str):
        """The last line names the fault; if a host can train on the data, there is a warning."""
        run = host.run({"steps": 2}, pairs=pairs(CASES[case]))
        if case not in host.refused:
            assert len(trained(run).said("warning: 16 of 16 ")) == 1
            return
        stopped(run)
        for words in host.refused[case]:
            assert words in run.output.strip().splitlines()[-1], run.output[-4000:]

    def test_a_model_that_is_not_there(self, host: Host, tmp_path: Path):
        """The last line has the path, and the name that is near."""
        (tmp_path / "model").mkdir()
        run = host.run({"steps": 2, "model": tmp_path / "modle"})
        stopped(run)
        if host.loads_the_model:
            last = run.output.strip().splitlines()[-1]
            assert f"'{tmp_path}/modle' ('model' is beside it)" in last, run.output[-4000:]

    def test_equal_answers_that_are_allowed(self, host: Host, pairs: Callable[..., Path]):
        run = trained(
            host.run({"steps": 2, "allow_data": True}, pairs=pairs(CASES["equal answers"]))
        )
        assert len(run.said("warning: 16 of 16 pairs have identical answers")) == 1
        assert len(run.steps) == 2

    def test_a_few_equal_answers_are_warned_of(self, host: Host, pairs: Callable[..., Path]):
        a_few = pairs(lambda rows: lines([*map(alike, rows[:FEW]), *rows[FEW:]]))
        run = trained(host.run({"steps": 2}, pairs=a_few))
        assert len(run.said("warning: 4 of 16 pairs have identical answers")) == 1


class AnotherReference:
    """Beside the contract, what is promised in a host whose command names a reference."""

    @pytest.mark.releases
    def test_a_token_without_an_embedding(self, host: Host, tiny: Path, tmp_path: Path):
        """The reference has only the first 100 of the tokenizer's tokens."""
        from transformers import AutoModelForCausalLM

        cut = AutoModelForCausalLM.from_pretrained(tiny / "model")
        cut.resize_token_embeddings(100)
        cut.save_pretrained(tmp_path)
        for file in (tiny / "model").glob("token*"):
            shutil.copy(file, tmp_path)
        run = host.run({"steps": 5, "reference": tmp_path})
        message = (
            "the reference must have an embedding for each token of the data, got 100 embeddings"
        )
        stopped(run, message, f"the tokenizer has {host.tokens} tokens")


class PrecomputedReference:
    """Beside the contract, what is promised in a host that is a ``transformers.Trainer`` without a
    precomputed reference of its own; its ``run`` has the options ``lora`` and ``zero_3``."""

    PRECOMPUTED = {"gamma": 0.5, "rate": 1e-3}

    @pytest.mark.releases
    @pytest.mark.parametrize("case", [{}, {"lora": True}, {"shared_prompts": True}], ids=str)
    def test_a_precomputed_reference(self, host: Host, tmp_path: Path, case: dict[str, Any]):
        """The same run up to rounding, as a pair is padded otherwise; the second run reads the
        file.  Every margin is 0 at first, also of an adapter."""
        options = {**self.PRECOMPUTED, "steps": 5, **case}
        plain = trained(host.run(options)).each("loss")
        assert plain[0] == pytest.approx(2**-0.5 * DPO, abs=host.rounded)
        options |= {"precompute_ref": True, "precompute_dir": tmp_path}
        for how in ("computed and kept in", "read from"):
            run = trained(host.run(options))
            (line,) = run.said("reference log-probs of")
            assert how in line and str(tmp_path) in line
            assert run.each("loss") == pytest.approx(plain, abs=2 * host.rounded)
        assert max(plain) - min(plain) > 1e-3

    @pytest.mark.releases
    def test_a_precomputed_reference_under_zero_3(self, host: Host, tmp_path: Path):
        """On two ranks, which share the pairs: the losses of the plain run.  Resumed after two of
        four steps, the run reads the file and has the losses of one that wasn't stopped."""
        options = {**self.PRECOMPUTED, "steps": 4, "zero_3": True}
        plain = trained(host.run(options, ranks=2)).each("loss")
        options |= {"precompute_ref": True, "precompute_dir": tmp_path, "save": 2}
        computed = trained(host.run(options, ranks=2))
        resumed = trained(host.run(options, ranks=2, resume=host.checkpoint(computed, 2)))
        for run, how in ((computed, "computed and kept in"), (resumed, "read from")):
            (line,) = run.said("reference log-probs of 40 pairs")
            assert how in line and str(tmp_path) in line
        losses = computed.each("loss")
        assert losses == pytest.approx(plain, abs=2 * host.rounded)
        assert resumed.each("loss")[-2:] == losses[-2:] and losses[2] != losses[1]
        assert max(plain) - min(plain) > 1e-3


def trained(run: Result) -> Result:
    assert run.code == 0, run.output[-6000:]
    return run


def stopped(run: Result, *words: str) -> None:
    """Before the first step."""
    assert run.code != 0, run.output[-4000:]
    for word in words:
        assert word in run.output, run.output[-6000:]
    assert not any(step["step"] and "focalpo/p" in step for step in run.steps)
