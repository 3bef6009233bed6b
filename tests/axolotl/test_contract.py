"""Axolotl keeps the contract: its command on one rank, or on two under ZeRO-3."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from contract import Contract, Result, TrainerHost
from harness import ON_CPU, SUPPORT, Axolotl, zero3_on_cpu
from packaging.version import Version

KEYS = {"beta": "rl_beta", "loss": "rl", "steps": "max_steps", "save": "save_steps",
        "evaluate": "eval_steps", "rate": "learning_rate", "model": "base_model"}  # fmt: skip
# Before 0.21 Axolotl takes the whole conversation for an empty answer.
EMPTY = (
    "an empty answer"
    if Version(version("axolotl")) >= Version("0.21")
    else "a BOS or another turn inside an answer"
)


class AxolotlHost(TrainerHost):
    trainer, packages = "AxolotlPairwiseTrainer", ("axolotl", "trl")
    keys, spread = KEYS, 1e-3
    apart: dict[str, Any] = {"rate": 1e-3}  # it has no other reference
    refused = {
        "equal answers": (
            "training data refused: 16 of 16 pairs have identical answers",
            "The first is row 0 of the tokenized data, ",
        ),
        "most answers equal": ("training data refused: 9 of 16 pairs have identical answers",),
        "empty answers": (f"training data refused: 16 of 16 pairs have {EMPTY}",),
        "earlier turns that differ": (
            "training data refused: 16 of 16 rows have sides whose earlier turns differ: Axolotl trains the rejected answer after the chosen side's turns",
        ),
        "prompts beyond the limit": ("train_dataset must hold a pair, got none", "sequence_len"),
        "an empty file": (
            "datasets[0].path must hold a pair, got ",
            "pairs.jsonl': the file is empty",
        ),
        "a cut first line": (
            "datasets[0].path must be JSON lines, got ",
            "pairs.jsonl': line 1 can't be used: ",
        ),
        "a cut last line": (
            "datasets[0].path must be JSON lines, got ",
            "pairs.jsonl': line 16 can't be used: ",
        ),
        "no column chosen": ("it has no 'chosen'",),
        "no column rejected": ("it has no 'rejected'",),
    }
    unknown = "unknown key focalpo_gama, got 0.1; did you mean 'focalpo_gamma'?"

    def __init__(self, tiny: Path, few: Path, new: Callable[[str], Path]) -> None:
        self.tiny, self.few, self.new = tiny, few, new

    def run(
        self,
        options: dict[str, Any],
        pairs: Path | None = None,
        ranks: int = 1,
        resume: Path | None = None,
        fault: str | None = None,
    ) -> Result:
        axolotl = Axolotl(self.tiny, self.new("axolotl"))
        changes = {self.key(name): value for name, value in {"loss": "focalpo", **options}.items()}
        changes = {k: str(v) if isinstance(v, Path) else v for k, v in changes.items()}
        if changes["rl"] == "dpo":
            changes |= {"focalpo_gamma": None, "focalpo_variant": None}
        data = {"ds_type": "json", "split": "train", "type": "chat_template.argilla_chat"}
        changes["datasets"] = [{**data, "path": str(pairs or self.few / "train.jsonl")}]
        changes["resume_from_checkpoint"] = resume and str(resume)
        how: dict[str, Any] = {"ranks": ranks}
        if ranks > 1:
            changes |= {"deepspeed": zero3_on_cpu(axolotl.folder), "gradient_accumulation_steps": 1}
            changes["plugins"] = ["test_only_plugins.GlooOnCPU"]
            how |= ON_CPU
        if fault == "read-only":
            folder = axolotl.folder / "read only"
            folder.mkdir(mode=0o555)
            changes["output_dir"] = str(folder)
            how |= {"first": ["disk_faults.sitecustomize"], "PERMISSIONS_HOLD": "1"}
        if fault == "no network":
            asked = str(axolotl.folder / "out" / "asked")
            how |= {"path": [SUPPORT / "no_network"], "NETWORK_ASKED": asked, "fresh": True}
        run = axolotl("train", axolotl.config(**changes), **how)
        log = run.log if run.checkpoints else []
        if not log and "'loss':" in run.output:
            log = [{"step": 1, "loss": float("nan"), "focalpo/p": float("nan")}]
        return Result.of_history(run.code, run.output, run.folder, log)


@pytest.mark.xdist_group("contract of Axolotl")
class TestAxolotl(Contract):
    @pytest.fixture(scope="class")
    @classmethod
    def host(cls, tiny: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> AxolotlHost:
        return AxolotlHost(tiny, few, tmp_path_factory.mktemp)
