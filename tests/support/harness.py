"""Processes as a user starts them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import forked
import yaml
from forked import SUPPORT, environment, free_port

__all__ = ["SUPPORT", "environment", "free_port"]  # and what is below
EXAMPLES = SUPPORT.parents[1] / "examples"
PLUGIN = "focalpo_plugins.axolotl.FocalPOPlugin"


def without_paths(output: str, *folders: Path) -> str:
    """The output without these folders, and without the checkout's path, which has the package's
    name in it wherever the environment is part of the checkout."""
    for folder in (*folders, EXAMPLES.parent):
        output = output.replace(str(folder), "")
    return output


def run_python(
    *arguments: str, path: Path | str | None = None, cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess:
    """A fresh interpreter, with ``path`` before everything else that it imports from."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("FOCALPO_", "PYTHONPATH"))}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, *arguments],
        env={**env, **variables},
        capture_output=True,
        text=True,
        cwd=cwd,
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


def at_once(
    commands: list[list[str]], environments: list[dict[str, str]], folder: Path
) -> list[tuple[int, str]]:
    """Exit code and output of commands that wait for each other."""
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in commands]
        processes = [
            subprocess.Popen(command, env=env, cwd=folder, stdout=out, stderr=subprocess.STDOUT)
            for command, env, out in zip(commands, environments, outputs, strict=True)
        ]
        codes = [process.wait() for process in processes]
        for out in outputs:
            out.seek(0)
        return [(code, out.read()) for code, out in zip(codes, outputs, strict=True)]


def with_nan(model: Path, pairs: Path, folder: Path) -> None:
    """A copy of the model in ``folder`` with NaN for the embedding of a token that occurs in only
    one pair, as if that weight had been lost."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    of_pairs = [
        {
            token
            for side in ("chosen", "rejected")
            for token in tokenizer(
                tokenizer.apply_chat_template(row[side], tokenize=False), add_special_tokens=False
            ).input_ids
        }
        for row in rows
    ]
    token = next(
        token
        for of_pair in of_pairs
        for token in sorted(of_pair)
        if sum(token in others for others in of_pairs) == 1
    )
    lost = AutoModelForCausalLM.from_pretrained(model)
    # The output layer keeps its weights.
    lost.config.tie_word_embeddings = False
    lost.lm_head.weight = torch.nn.Parameter(lost.lm_head.weight.detach().clone())
    with torch.no_grad():
        lost.get_input_embeddings().weight[token] = torch.nan
    lost.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


TWO_RANKS = ("--launcher", "torchrun", "--", "--nproc_per_node", "2")
# For ranks without a GPU.
ON_CPU = {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}


def zero3_on_cpu(folder: Path) -> str:
    """A copy of examples/deepspeed/zero3.json without ``overlap_comm``: without a GPU's streams,
    the ranks' collectives get out of step."""
    config = json.loads((EXAMPLES / "deepspeed" / "zero3.json").read_text())
    config["zero_optimization"]["overlap_comm"] = False
    path = folder / "zero3.json"
    path.write_text(json.dumps(config))
    return str(path)


class Axolotl:
    """Runs the installed ``axolotl`` command in its own folder."""

    def __init__(self, tiny: Path, folder: Path) -> None:
        self.tiny = tiny
        self.folder = folder

    def data(self, split: str, pairs: int) -> str:
        """Only the first pairs of the tiny data, so that fewer have to be prepared."""
        path = self.folder / f"{split}.jsonl"
        if not path.exists():
            lines = (self.tiny / path.name).read_text().splitlines(keepends=True)
            path.write_text("".join(lines[:pairs]))
        return str(path)

    def config(self, whole: bool = False, **changes: Any) -> Path:
        """``tiny_focalpo.yml``, cut to six steps and few pairs unless ``whole``, and with
        ``changes``; None removes a key."""
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
            "dataloader_num_workers": 0,
            "output_dir": str(self.folder / "out"),
        }
        for key, split, pairs in (("datasets", "train", 96), ("test_datasets", "test", 32)):
            path = str(self.tiny / f"{split}.jsonl") if whole else self.data(split, pairs)
            folders[key] = [{**config[key][0], "path": path}]
        config |= folders | ({} if whole else cut) | changes
        if not config["eval_steps"]:
            del config["test_datasets"]
        config = {key: value for key, value in config.items() if value is not None}
        path = self.folder / f"{len(list(self.folder.glob('*.yml')))}.yml"
        path.write_text(yaml.safe_dump(config))
        return path

    def __call__(
        self,
        command: str,
        config: Path,
        *more: str,
        ranks: int = 1,
        path: Sequence[Path | str] = (),
        first: Sequence[str] = (),
        fresh: bool = False,
        **variables: str,
    ) -> Run:
        """The command on the config, in processes forked off a waiting one, or if it has to be
        ``fresh``, in one of its own from the start.  The launcher that ``more`` may name starts
        fresh ones.  ``path`` comes before all else, and ``first`` is imported before the command."""
        folder = Path(yaml.safe_load(config.read_text())["output_dir"])
        argv = [command, str(config), *more]
        launched = "--launcher" in more
        if command in ("train", "evaluate") and not launched:
            argv += ["--launcher", "python"]  # one process fewer to start
        if fresh:
            try:
                done = subprocess.run(
                    ["axolotl", *argv],
                    env=environment(*path, **variables),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    cwd=self.folder,
                    timeout=600,  # seconds: a run that hangs is a failure
                )
            except subprocess.TimeoutExpired as late:
                output = (late.stdout or b"").decode(errors="replace")
                return Run(-1, f"{output}\n{late}", folder)
            return Run(done.returncode, done.stdout, folder)
        # With one rank Axolotl runs without the variables of a rank.
        code, output, _ = forked.run(
            "axolotl.cli.main:main", argv, self.folder, None if launched or ranks == 1 else ranks,
            path=path, first=first, merged=True, **variables,
        )  # fmt: skip
        return Run(code, output, folder)

    def train(
        self, *more: str, ranks: int = 1, how: dict[str, Any] | None = None, **changes: Any
    ) -> Run:
        """A run of the config with ``changes``; ``how`` goes to the call."""
        run = self("train", self.config(**changes), *more, ranks=ranks, **(how or {}))
        assert run.code == 0, run.output[-6000:]
        return run


def loaded(script: Path) -> ModuleType:
    """A script of examples/ as a module."""
    spec = spec_from_file_location(script.stem, script)
    module = module_from_spec(spec)
    sys.modules[script.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def launched(script: Path, folder: Path, **variables: str) -> list[str]:
    """The command line that a script starts its launcher with."""
    for launcher in ("deepspeed", "torchrun"):
        (folder / launcher).write_text('#!/bin/sh\nprintf "%s\\n" "$0" "$@"\n')
        (folder / launcher).chmod(0o755)
    env = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", **variables}
    done = subprocess.run(
        ["bash", str(script), "--local_rank", "0"],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def focalpo(
    *arguments: str | Path, path: Path | str | None = None, **variables: str
) -> subprocess.CompletedProcess:
    """The installed ``focalpo`` command."""
    command = Path(sys.executable).parent / "focalpo"
    return run_python(str(command), *map(str, arguments), path=path, **variables)


class ManyFocalpo:
    """``focalpo``, many times: each run is a process of its own, forked off one that has imported
    what it needs."""

    def __init__(self, cwd: Path, **variables: str) -> None:
        self.cwd, self.variables = cwd, variables

    def __call__(self, *argv: str | Path) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        return forked.run("focalpo_plugins.cli:main", argv, self.cwd, **self.variables)
