"""LLaMA-Factory as a user runs it: a YAML, and data that ``dataset_info.json`` names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import forked
import yaml
from harness import Run

_SHAREGPT = {
    "formatting": "sharegpt",
    "ranking": True,
    "columns": {"messages": "messages", "chosen": "chosen", "rejected": "rejected"},
    "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user",
             "assistant_tag": "assistant", "system_tag": "system"},
}  # fmt: skip


LORA = {"finetuning_type": "lora", "lora_rank": 8, "lora_target": "all"}


def as_sharegpt(line: str) -> str:
    """A row of whole conversations with the prompt in a column of its own, as a user of this host
    has it; a row that can't be that stays what it is."""
    try:
        row = json.loads(line)
    except ValueError:
        return line
    sides = [row[side] for side in ("chosen", "rejected") if side in row]
    if any(side[:-1] != sides[0][:-1] for side in sides):
        return line
    found: dict[str, Any] = {"messages": sides[0][:-1]} if sides else {}
    found |= {side: row[side][-1] for side in ("chosen", "rejected") if side in row}
    return json.dumps(found) + "\n" * line.endswith("\n")


class LlamaFactory:
    """Runs ``llamafactory-cli`` in a folder of its own."""

    def __init__(self, tiny: Path, folder: Path) -> None:
        self.tiny, self.folder = tiny, folder
        self.entries: dict[str, Any] = {}

    def data(self, name: str, pairs: Path) -> str:
        """The name of a data set with the pairs of this file."""
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(map(as_sharegpt, pairs.read_text().splitlines(keepends=True))))
        self.entries[name] = {"file_name": path.name, **_SHAREGPT}
        (self.folder / "dataset_info.json").write_text(json.dumps(self.entries))
        return name

    def config(self, **changes: Any) -> dict[str, Any]:
        """A FocalPO run of five steps with ``changes``; None removes a key."""
        config = {
            "model_name_or_path": str(self.tiny / "model"),
            "stage": "dpo",
            "do_train": True,
            "finetuning_type": "full",
            "pref_loss": "focalpo",
            "focalpo_gamma": 0.05,
            "dataset_dir": str(self.folder),
            "dataset": "train",
            "template": "llama3",
            "cutoff_len": 128,
            "output_dir": str(self.folder / "out"),
            "overwrite_output_dir": True,
            "max_steps": 5,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-4,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            **changes,
        }
        return {key: value for key, value in config.items() if value is not None}

    def write(self, config: dict[str, Any]) -> Path:
        path = self.folder / f"{len(list(self.folder.glob('*.yaml')))}.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    def __call__(self, config: dict[str, Any], *more: str, ranks: int = 1, **how: Any) -> Run:
        """The command on the config; on two ranks, what torchrun starts on each."""
        folder = Path(config["output_dir"])
        path = str(self.write(config))
        command, argv = ("llamafactory.cli:main", ["train", path, *more])
        if ranks > 1:
            command, argv = "llamafactory.train.tuner:run_exp", [path, *more]
        code, output, _ = forked.run(
            command, argv, self.folder, ranks if ranks > 1 else None, merged=True, **how
        )
        return Run(code, output, folder)

    def train(self, *more: str, ranks: int = 1, **changes: Any) -> Run:
        """Of the first pairs of the tiny data; the run has to end well."""
        run = self(self.config(**changes), *more, ranks=ranks)
        assert run.code == 0, run.output[-6000:]
        return run
