"""Processes as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

SUPPORT = Path(__file__).parent
EXAMPLES = SUPPORT.parents[1] / "examples"
PLUGIN = "focalpo_plugins.axolotl.FocalPOPlugin"


def run_python(
    *arguments: str, path: Path | str | None = None, **variables: str
) -> subprocess.CompletedProcess:
    """A fresh interpreter, with ``path`` before everything else that it imports from."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("FOCALPO_", "PYTHONPATH"))}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, *arguments], env={**env, **variables}, capture_output=True, text=True
    )


@dataclass
class Run:
    """A finished command and what it left behind."""

    code: int
    output: str
    folder: Path

    @property
    def checkpoints(self) -> list[Path]:
        return sorted(
            self.folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])
        )

    @property
    def log(self) -> list[dict[str, float]]:
        """What the host logged, by step, train and eval alike."""
        return json.loads((self.checkpoints[-1] / "trainer_state.json").read_text())["log_history"]

    def steps(self, *names: str) -> list[tuple[float, ...]]:
        """The named values of every training step."""
        return [tuple(entry[name] for name in names) for entry in self.log if "loss" in entry]


class Axolotl:
    """Runs the installed ``axolotl`` command in a folder of its own."""

    def __init__(self, tiny: Path, folder: Path) -> None:
        self.tiny = tiny
        self.folder = folder

    def config(self, whole: bool = False, **changes: Any) -> Path:
        """``tiny_focalpo.yml``, cut to six steps unless ``whole``, and with ``changes``; None
        removes a key."""
        config = yaml.safe_load((EXAMPLES / "tiny_focalpo.yml").read_text())
        cut = {
            "max_steps": 6,
            "micro_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "warmup_steps": 0,
            "eval_steps": None,
            "save_steps": 3,
            "save_only_model": None,
            "skip_prepare_dataset": None,
        }
        assert set(cut) <= set(config)
        folders = {
            "base_model": str(self.tiny / "model"),
            "dataset_prepared_path": str(self.folder / "prepared"),
            "output_dir": str(self.folder / "out"),
            "datasets": [{**config["datasets"][0], "path": str(self.tiny / "train.jsonl")}],
            "test_datasets": [
                {**config["test_datasets"][0], "path": str(self.tiny / "test.jsonl")}
            ],
        }
        config |= folders | ({} if whole else cut) | changes
        if not config["eval_steps"]:
            del config["test_datasets"]
        config = {key: value for key, value in config.items() if value is not None}
        path = self.folder / f"{len(list(self.folder.glob('*.yml')))}.yml"
        path.write_text(yaml.safe_dump(config))
        return path

    def __call__(self, command: str, config: Path, *more: str, **variables: str) -> Run:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("FOCALPO_", "PYTHONPATH"))}
        env |= {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}",
            "AXOLOTL_DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",  # the same sums in the same order, run after run
            "TOKENIZERS_PARALLELISM": "false",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(SUPPORT),
        }
        if "PYTHONPATH" in variables:
            variables["PYTHONPATH"] += os.pathsep + env["PYTHONPATH"]
        if command in ("train", "evaluate") and "--launcher" not in more:
            more = ("--launcher", "python", *more)  # one process less to start
        done = subprocess.run(
            ["axolotl", command, str(config), *more],
            env={**env, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.folder,
        )
        folder = Path(yaml.safe_load(config.read_text())["output_dir"])
        return Run(done.returncode, done.stdout, folder)

    def train(self, *more: str, variables: dict[str, str] | None = None, **changes: Any) -> Run:
        run = self("train", self.config(**changes), *more, **(variables or {}))
        assert run.code == 0, run.output[-6000:]
        return run


def focalpo(
    *arguments: str | Path, path: Path | str | None = None, **variables: str
) -> subprocess.CompletedProcess:
    """The installed ``focalpo`` command."""
    command = Path(sys.executable).parent / "focalpo"
    return run_python(str(command), *map(str, arguments), path=path, **variables)


class ManyFocalpo:
    """``focalpo``, many times: each run is a process of its own, forked off one that has imported
    ``modules``."""

    def __init__(self, *modules: str, cwd: Path, **variables: str) -> None:
        dropped = ("FOCALPO_", "PYTHONPATH", "TORCH_DEVICE_BACKEND_AUTOLOAD", "DS_ACCELERATOR")
        env = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
        env |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        env |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(SUPPORT / "many_focalpo.py"), *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**env, "PYTHONPATH": str(SUPPORT), **variables},
            cwd=cwd,
            text=True,
        )

    def __call__(self, *argv: str | Path) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        self.process.stdin.write(json.dumps([str(word) for word in argv]) + "\n")
        self.process.stdin.flush()
        report = self.process.stdout.readline()
        assert report, "the process that runs focalpo died; its error is above"
        return tuple(json.loads(report))

    def __enter__(self) -> ManyFocalpo:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
