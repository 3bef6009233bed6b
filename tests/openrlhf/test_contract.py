"""OpenRLHF keeps the contract: its command, in processes as torchrun starts them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from contract import AnotherReference, Contract, Result
from harness import SUPPORT
from openrlhf_flags import of_host

FLAGS = {
    "beta": "model.beta",
    "rate": "adam.lr",
    "save": "ckpt.save_steps",
    "model": "model.model_name_or_path",
    "reference": "ref.model_name_or_path",
}
(MAX_LEN,) = of_host(["--data.max_len"])


class OpenRLHF:
    trainer, packages = "PairwiseDPOTrainer", ("openrlhf", "deepspeed")
    said, tokens = "beta=0.1 label_smoothing=0.0", 883
    loads_the_model = True
    # bf16 rounds differently in another layout.
    rounded, near, spread, two_ranks_gradient = 1e-5, 0.1, 0.1, 1.0
    # Two runs that learn in bf16 drift apart with any rounding.
    apart: dict[str, Any] = {"rate": 1e-12, "beta": 1.0, "reference": "another"}
    names = {
        "loss": "loss_mean",
        "grad_norm": "grad_norm",
        "accuracy": "acc",
        "margin": "margin",
    }
    refused = {
        "equal answers": ("training data refused: 16 of 16 pairs have identical answers",),
        "most answers equal": ("training data refused: 9 of 16 pairs have identical answers",),
        "empty answers": (
            "training data refused: 16 of 16 pairs have an empty answer. Remove them",
        ),
        "earlier turns that differ": (
            "training data refused: 16 of 16 rows have sides whose earlier turns differ: OpenRLHF cuts both off after as",
        ),
        "prompts beyond the limit": (
            f"every pair was dropped as longer than {MAX_LEN}=128. Check the file, or raise {MAX_LEN}.",
        ),
        "an empty file": ("dataset must hold a pair, got ",),
        "a cut first line": (": line 1 can't be used: Expecting value. Fix",),
        "a cut last line": (": line 16 can't be used: Unterminated string",),
        "no column chosen": (
            ": line 1 can't be used: it has no 'chosen', got rejected. Fix that line",
        ),
        "no column rejected": (
            ": line 1 can't be used: it has no 'rejected', got chosen. Fix that line",
        ),
    }
    unknown = "did you mean '--focalpo.gamma'?"

    def __init__(self, train: Callable, few: Path, another: Path, new: Callable) -> None:
        self.train, self.few, self.another, self.new = train, few, another, new

    def key(self, option: str) -> str:
        return of_host([f"--{FLAGS.get(option, f'focalpo.{option}')}"])[0]

    def run(
        self,
        options: dict[str, Any],
        pairs: Path | None = None,
        ranks: int = 1,
        resume: Path | None = None,
        fault: str | None = None,
    ) -> Result:
        folder = self.new("run")
        asked = {"loss": "focalpo", **options}
        if asked.get("reference") == "another":
            asked["reference"] = self.another
        epochs = asked.pop("steps") // (2 if pairs else 5)
        flags = ["--loss", asked.pop("loss"), "--train.max_epochs", str(epochs)]
        flags += ["--train.micro_batch_size", "4", "--lr_scheduler", "constant"]
        flags += ["--ds.zero_stage", "3" if ranks > 1 else "2"]
        if asked.pop("evaluate", None):  # after each epoch
            flags += ["--eval.dataset", str(self.few / "test.jsonl"), "--eval.split", "train"]
        for option, value in asked.items():
            flags += [self.key(option), *([] if value is True else [str(value)])]
        if pairs:
            flags += ["--data.dataset", str(pairs)]
        if resume:
            shutil.copytree(resume.parent, folder / "checkpoints")
            (folder / "checkpoints" / "latest").write_text(resume.name)
            flags.append("--ckpt.load_enable")
        how: dict[str, Any] = {"ranks": ranks, "folder": folder}
        if fault == "read-only":
            (folder / "checkpoints").mkdir(mode=0o555)
            how |= {"first": ["disk_faults.sitecustomize"], "PERMISSIONS_HOLD": "1"}
        if fault == "no network":
            how |= {"path": [SUPPORT / "no_network"], "NETWORK_ASKED": str(folder / "asked")}
            how["launcher"] = "python"
            flags.append("--focalpo.precompute_ref")
        run = self.train(*flags, **how)
        steps = [
            {**values, "step": step, "margin": values["chosen_reward"] - values["reject_reward"]}
            for step, values in sorted(run.steps("train/").items())
        ]
        evaluations = [
            {**values, "step": step, "acc": values["acc_mean"]}
            for step, values in sorted(run.steps("eval/").items())
        ]
        return Result(run.returncode, run.stdout + run.stderr, folder, steps, evaluations)

    def checkpoint(self, run: Result, step: int) -> Path:
        return run.folder / "checkpoints" / f"global_step{step}"

    def log(self, run: Result) -> Path:
        return run.folder / "tensorboard"


@pytest.mark.xdist_group("contract")
class TestOpenRLHF(Contract, AnotherReference):
    OF_ALL_PAIRS = ()  # its mean loss is the first rank's, its rewards are the last micro-step's

    @pytest.fixture(scope="class")
    @classmethod
    def host(
        cls, train: Callable, few: Path, another: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> OpenRLHF:
        return OpenRLHF(train, few, another, tmp_path_factory.mktemp)

    @pytest.mark.releases
    def test_no_network(self, host: OpenRLHF):
        super().test_no_network(host)
