"""TRL keeps the contract: a user's script, in processes as torchrun starts them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
from contract import Contract, Result, TrainerHost
from harness import SUPPORT, environment

SCRIPT = SUPPORT / "train_trl.py"
KEYS = {"beta": "beta", "steps": "max_steps", "rate": "learning_rate", "save": "save_steps",
        "evaluate": "eval_steps"}  # fmt: skip


class TRL(TrainerHost):
    trainer, packages = "FocalPOTrainer", ("trl",)
    keys, spread, loads_the_model = KEYS, 0.1, False
    out = "out"
    apart: dict[str, Any] = {"rate": 1e-12, "beta": 1.0, "reference": "another"}
    refused = {
        "equal answers": ("training data refused: 16 of 16 pairs have identical answers",),
        "most answers equal": ("training data refused: 9 of 16 pairs have identical answers",),
        "empty answers": ("training data refused: 16 of 16 pairs have an empty answer",),
        "prompts beyond the limit": ("max_length=128",),
        # The script reads the file, before this package is asked.
        "an empty file": (),
        "a cut first line": (),
        "a cut last line": (),
        "no column chosen": ("chosen",),
        "no column rejected": ("rejected",),
    }
    unknown = "unexpected keyword argument 'focalpo_gama'"

    def run(
        self,
        options: dict[str, Any],
        pairs: Path | None = None,
        ranks: int = 1,
        resume: Path | None = None,
        fault: str | None = None,
    ) -> Result:
        folder, options = self.new("trl"), dict(options)
        asked = {
            "loss": options.pop("loss", "focalpo"),
            "model": str(options.pop("model", self.tiny / "model")),
            "reference": str(self.another) if options.pop("reference", None) else None,
            "pairs": str(pairs or self.few / "train.jsonl"),
            "held_out": str(self.few / "test.jsonl") if "evaluate" in options else None,
            "resume": resume and str(resume),
            "output_dir": str(folder / "out"),
            "arguments": {self.key(name): value for name, value in options.items()},
        }
        if ranks == 1:
            asked["arguments"]["gradient_accumulation_steps"] = 2
        if fault == "read-only":
            (folder / "out").mkdir(mode=0o555)
        if fault == "no network":
            env = environment(SUPPORT / "no_network", NETWORK_ASKED=str(folder / "asked"))
            command = [sys.executable, str(SCRIPT), json.dumps(asked)]
            done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
            ended = (done.returncode, done.stdout, done.stderr)
        else:
            disk = ["disk_faults.sitecustomize"] if fault else []
            ended = forked.run(
                str(SCRIPT), [json.dumps(asked)], folder, ranks if ranks > 1 else None, first=disk,
                **({"PERMISSIONS_HOLD": "1"} if fault else {}),
            )  # fmt: skip
        log = folder / "log.json"
        history = json.loads(log.read_text()) if log.exists() else []
        return Result.of_history(ended[0], ended[1] + ended[2], folder, history)


@pytest.mark.xdist_group("contract of TRL")
class TestTRL(Contract):
    RESUMED_ON = 1  # transformers can't load an optimizer on two CPU ranks

    @pytest.fixture(scope="class")
    @classmethod
    def host(
        cls, tiny: Path, few: Path, another: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> TRL:
        return TRL(tiny, few, another, tmp_path_factory.mktemp)
