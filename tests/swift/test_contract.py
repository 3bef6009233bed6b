"""ms-swift keeps the contract: its command, on one rank, or with DDP on two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from contract import AnotherReference, Contract, PrecomputedReference, Result, TrainerHost
from harness import ON_CPU
from swift_command import LORA, ZERO_3, train

KEYS = {"beta": "beta", "loss": "loss_type", "steps": "max_steps", "save": "save_steps",
        "evaluate": "eval_steps", "rate": "learning_rate", "model": "model"}  # fmt: skip


class SwiftHost(TrainerHost):
    trainer, packages = "SwiftPairwiseTrainer", ("ms-swift", "trl")
    keys, spread = KEYS, 0.05
    out = "out"
    apart: dict[str, Any] = {"rate": 1e-12, "beta": 1.0, "reference": "another"}
    refused = {
        "equal answers": ("training data refused: 16 of 16 pairs have identical answers",),
        "most answers equal": ("training data refused: 9 of 16 pairs have identical answers",),
        "empty answers": ("training data refused: 16 of 16 pairs have an empty answer",),
        "prompts beyond the limit": ("max_length",),
        "an empty file": ("dataset must hold a pair, got ", "pairs.jsonl': the file is empty"),
        "a cut first line": (
            "dataset must be JSON lines, got ",
            "pairs.jsonl': line 1 can't be used: ",
        ),
        "a cut last line": (
            "dataset must be JSON lines, got ",
            "pairs.jsonl': line 16 can't be used: ",
        ),
        "no column chosen": ("chosen",),
        "no column rejected": ("rejected",),
    }
    unknown = "unknown key focalpo_gama, got '--focalpo_gama'; did you mean 'focalpo_gamma'?"

    def run(
        self,
        options: dict[str, Any],
        pairs: Path | None = None,
        ranks: int = 1,
        resume: Path | None = None,
        fault: str | None = None,
    ) -> Result:
        folder, options = self.new("swift"), {"loss": "focalpo", **options}
        if options["loss"] == "dpo":
            options["loss"] = "sigmoid"
        elif "gamma" not in options:
            options["gamma"] = 0.05
        given: dict[str, Any] = {
            "model": self.tiny / "model",
            "dataset": pairs or self.few / "train.jsonl",
            "save_strategy": "steps" if "save" in options else "no",
            "gradient_accumulation_steps": 2 if ranks == 1 else 1,
            "output_dir": folder / "out",
        }
        given |= LORA if options.pop("lora", False) else {}
        zero_3 = options.pop("zero_3", False)
        given |= ZERO_3 if zero_3 else {}
        reference = options.pop("reference", None)
        if reference is not None:
            given["ref_model"] = self.another if reference == "another" else reference
        if "evaluate" in options:
            given |= {"val_dataset": self.few / "test.jsonl", "eval_strategy": "steps"}
        if resume is not None:
            given["resume_from_checkpoint"] = resume
        given |= {self.key(name): value for name, value in options.items()}
        code, output = train(folder, given, ranks, fault, **(ON_CPU if zero_3 else {}))
        return Result.of_history(code, output, folder, _history(folder / "out", output))


def _history(folder: Path, output: str) -> list[dict[str, Any]]:
    """What a run logged: as ms-swift's own file says at the run's end, or so far."""
    path = folder / "logging.jsonl"
    if not path.exists():
        return []
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    whole = next((entry["log_history"] for entry in entries if "log_history" in entry), None)
    return whole if whole is not None else entries


@pytest.mark.xdist_group("contract of ms-swift")
class TestSwift(Contract, AnotherReference, PrecomputedReference):
    RESUMED_ON = 1  # transformers can't load an optimizer on two CPU ranks

    @pytest.fixture(scope="class")
    @classmethod
    def host(
        cls, tiny: Path, few: Path, another: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> SwiftHost:
        return SwiftHost(tiny, few, another, tmp_path_factory.mktemp)
