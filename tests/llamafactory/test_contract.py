"""LLaMA-Factory keeps the contract: its command, on one rank, or under DDP on two."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from contract import AnotherReference, Contract, PrecomputedReference, Result, TrainerHost
from harness import SUPPORT, environment, zero3_on_cpu
from llamafactory_run import LORA, LlamaFactory

KEYS = {"beta": "pref_beta", "loss": "pref_loss", "steps": "max_steps", "save": "save_steps",
        "evaluate": "eval_steps", "rate": "learning_rate", "model": "model_name_or_path",
        "reference": "ref_model"}  # fmt: skip


class LlamaFactoryHost(TrainerHost):
    trainer, packages = "LlamaFactoryPairwiseTrainer", ("llamafactory", "trl")
    tokens = 884  # its template adds one
    keys, spread = KEYS, 0.1
    apart: dict[str, Any] = {"rate": 1e-12, "beta": 1.0, "reference": "another"}
    refused = {
        "equal answers": (
            "training data refused: 16 of 16 pairs have identical answers",
            "The first is row 0 of the tokenized data, ",
        ),
        "most answers equal": ("training data refused: 9 of 16 pairs have identical answers",),
        "empty answers": ("training data refused: 16 of 16 pairs have an empty answer",),
        # It has one prompt for both sides.
        "earlier turns that differ": (
            "its first row has chosen (4 messages: user, assistant, user, ...)",
            "write the prompt's messages into one column, and each answer as one message or as text",
        ),
        "prompts beyond the limit": (
            "training data refused: 16 of 16 pairs have a prompt whose end is cut off to fit cutoff_len=128",
        ),
        "an empty file": ("dataset must hold a pair, got ", "train.jsonl': the file is empty"),
        "a cut first line": ("train.jsonl': line 1 can't be used: ",),
        "a cut last line": ("train.jsonl': line 16 can't be used: ",),
        "no column chosen": ("it has no 'chosen'",),
        "no column rejected": ("it has no 'rejected'",),
    }
    unknown = "unknown key focalpo_gama, got 0.1; did you mean 'focalpo_gamma'?"

    def run(
        self,
        options: dict[str, Any],
        pairs: Path | None = None,
        ranks: int = 1,
        resume: Path | None = None,
        fault: str | None = None,
    ) -> Result:
        host, options = LlamaFactory(self.tiny, self.new("llamafactory")), dict(options)
        lora, zero_3 = (options.pop(name, False) for name in ("lora", "zero_3"))
        changes = {self.key(name): value for name, value in {"loss": "focalpo", **options}.items()}
        changes = {k: str(v) if isinstance(v, Path) else v for k, v in changes.items()}
        if changes["pref_loss"] == "dpo":
            changes |= {"pref_loss": "sigmoid", "focalpo_gamma": None}
        if changes.get("ref_model") == "another":
            changes["ref_model"] = str(self.another)
        changes["dataset"] = host.data("train", pairs or self.few / "train.jsonl")
        for steps, strategy in (("save_steps", "save_strategy"), ("eval_steps", "eval_strategy")):
            if steps in changes:
                changes[strategy] = "steps"
        if "eval_steps" in changes:
            held_out = host.data("held_out", self.few / "test.jsonl")
            changes |= {"eval_dataset": held_out, "per_device_eval_batch_size": 4}
        changes |= LORA if lora else {}
        changes |= {"deepspeed": zero3_on_cpu(host.folder)} if zero_3 else {}
        changes["gradient_accumulation_steps"] = 2 // ranks
        changes["resume_from_checkpoint"] = resume and str(resume)
        how: dict[str, Any] = {"ranks": ranks}
        if fault == "read-only":
            folder = host.folder / "read only"
            folder.mkdir(mode=0o555)
            changes["output_dir"] = str(folder)
            how |= {"first": ["disk_faults.sitecustomize"], "PERMISSIONS_HOLD": "1"}
        config = host.config(**changes)
        if fault == "no network":
            env = environment(SUPPORT / "no_network", NETWORK_ASKED=str(host.folder / "asked"))
            command = ["llamafactory-cli", "train", str(host.write(config))]
            done = subprocess.run(
                command, env=env, cwd=host.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True,
            )  # fmt: skip
            return self._result(done.returncode, done.stdout, Path(config["output_dir"]))
        run = host(config, **how)
        return self._result(run.code, run.output, run.folder)

    def _result(self, code: int, output: str, folder: Path) -> Result:
        """By the state that is saved at the end, or by the last checkpoint's."""
        states = sorted(folder.glob("**/trainer_state.json"), key=lambda path: path.stat().st_mtime)
        history = json.loads(states[-1].read_text())["log_history"] if states else []
        if not history and "'loss':" in output:
            history = [{"step": 1, "loss": float("nan"), "focalpo/p": float("nan")}]
        return Result.of_history(code, output, folder, history)


@pytest.mark.xdist_group("contract of LLaMA-Factory")
class TestLlamaFactory(Contract, AnotherReference, PrecomputedReference):
    RESUMED_ON = 1  # transformers can't load an optimizer on two CPU ranks

    @pytest.fixture(scope="class")
    @classmethod
    def host(
        cls, tiny: Path, few: Path, another: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> LlamaFactoryHost:
        return LlamaFactoryHost(tiny, few, another, tmp_path_factory.mktemp)
