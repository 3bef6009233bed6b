"""OpenRLHF's command in processes as a user starts them, on a tiny model."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import pytest
from harness import ManyFocalpo, at_once, environment, free_port
from openrlhf_flags import of_host

COMMAND = "openrlhf.cli.train_dpo"
OURS = "focalpo_plugins: "  # the start of each line of this package


@pytest.fixture(scope="session")
def openrlhf() -> SimpleNamespace:
    """The parts of the real OpenRLHF that tests call, imported as its command is: with the CPU mode
    first."""
    from focalpo_plugins.openrlhf import cpu

    cpu.stand_in()
    from openrlhf.datasets import RewardDataset
    from openrlhf.models import Actor, DPOLoss
    from openrlhf.trainer.dpo_trainer import DPOTrainer

    gc.freeze()  # as tests/conftest.py does
    return SimpleNamespace(
        Actor=Actor, DPOLoss=DPOLoss, DPOTrainer=DPOTrainer, RewardDataset=RewardDataset
    )


@pytest.fixture(scope="session")
def forward_only(openrlhf: SimpleNamespace) -> Any:
    """OpenRLHF's trainer, with only the parts that compute log-probabilities."""
    import one_batch  # here: xdist's main process runs no test, but would import torch anyway

    trainer = object.__new__(openrlhf.DPOTrainer)
    trainer.tokenizer = SimpleNamespace(pad_token_id=one_batch.PAD)
    trainer.strategy = SimpleNamespace(ring_attn_group=None)
    return trainer


@dataclass
class Run:
    """The results of a training run."""

    returncode: int
    stdout: str
    stderr: str
    folder: Path

    @property
    def output(self) -> str:
        return self.stdout[-4000:] + self.stderr[-8000:]

    def steps(self, prefix: str = "") -> dict[int, dict[str, float]]:
        """TensorBoard's values by step and tag, for tags that begin like this."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found: dict[int, dict[str, float]] = {}
        for events in sorted((self.folder / "tensorboard").rglob("events.*")):
            accumulator = EventAccumulator(str(events))
            accumulator.Reload()
            for tag in accumulator.Tags()["scalars"]:
                for event in accumulator.Scalars(tag):
                    if tag.startswith(prefix):
                        found.setdefault(event.step, {})[tag.removeprefix(prefix)] = event.value
        return found

    def said(self, what: str) -> list[str]:
        """This package's lines that contain a text, to their ends. The text before one may be
        another process's, such as a progress bar whose line hasn't ended."""
        lines = [line.partition(OURS) for line in self.stderr.splitlines() if what in line]
        return ["".join(line[1:]) for line in lines if what in "".join(line[1:])]

    def seen(self) -> list[list[list]]:
        """By rank, what ``watched_openrlhf`` recorded."""
        return [
            [json.loads(line) for line in path.read_text().splitlines()]
            for path in sorted(self.folder.glob("rank*.jsonl"))
        ]


@pytest.fixture(scope="session")
def focalpo(tmp_path_factory: pytest.TempPathFactory) -> ManyFocalpo:
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    return ManyFocalpo(tmp_path_factory.mktemp("focalpo"), **alone)


@pytest.fixture(scope="session")
def train(tiny: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """``train(*flags, ranks=1)`` runs OpenRLHF's command on the tiny data, in processes forked off
    one that has it imported; or, if a launcher or a module is named, in processes as a user starts
    them.  ``path`` comes before all else, and ``first`` is imported before the command."""

    def run(
        *flags: str,
        launcher: str | None = None,
        ranks: int = 1,
        module: str | None = None,
        folder: Path | None = None,
        path: Sequence[Path | str] = (),
        first: Sequence[str] = (),
        **variables: str,
    ) -> Run:
        folder = folder or tmp_path_factory.mktemp("run")
        argv = of_host([*tiny_flags(tiny, few, folder), *flags])
        if launcher is None and module is None:
            command = "focalpo_plugins.openrlhf.train_dpo:main"
            variables = {"COLUMNS": "200", **variables}
            return Run(
                *forked.run(command, argv, folder, ranks, path=path, first=first, **variables),
                folder,
            )
        launcher = launcher or ("python" if ranks == 1 else "torchrun")
        start = {
            "python": [sys.executable, "-m"],
            "torchrun": ["torchrun", "--standalone", f"--nproc_per_node={ranks}", "-m"],
            "deepspeed": ["deepspeed", f"--num_gpus={ranks}", f"--master_port={free_port()}"]
            + ["--module"],
        }[launcher]
        one_rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        one_rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        done = subprocess.run(
            [*start, module or COMMAND, *argv],
            env=environment(*path, **(one_rank if launcher == "python" else {}), **variables),
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=600,  # seconds: a run that hangs is a failure
        )
        return Run(done.returncode, done.stdout, done.stderr, folder)

    return run


@pytest.fixture
def on_two_nodes(tiny: Path, few: Path, tmp_path: Path) -> Callable[..., Run]:
    """``on_two_nodes(script, *flags)`` starts a launch script twice, as examples/multinode.md does
    for nodes without ssh, with the tiny model and data set by further flags."""

    def run(script: Path, *flags: str) -> Run:
        (tmp_path / "hosts").write_text("first slots=1\nsecond slots=1\n")
        deepspeed = f"deepspeed --hostfile {tmp_path / 'hosts'} --no_ssh --master_addr 127.0.0.1"
        port = free_port()
        evaluate = ["--eval.dataset", str(few / "test.jsonl"), "--eval.split", "train"]
        command = ["bash", str(script), *tiny_flags(tiny, few, tmp_path), *evaluate, *flags]
        launchers = [f"{deepspeed} --master_port {port} --node_rank {rank}" for rank in range(2)]
        environments = [environment(DEEPSPEED=launcher) for launcher in launchers]
        ends = at_once([command] * 2, environments, tmp_path)
        code = max((code for code, _ in ends), key=abs)
        return Run(code, "", "".join(output for _, output in ends), tmp_path)

    return run


@pytest.fixture(scope="session")
def ranks_apart(tiny: Path, few: Path) -> Callable[..., list[Run]]:
    """``ranks_apart(folder, flags, flags)`` starts the command without a launcher, once for each
    rank; the ranks share only the network."""

    def run(
        folder: Path, *flags: Sequence[str], module: str, path: Sequence[Path | str], **more: str
    ) -> list[Run]:
        world = {"WORLD_SIZE": str(len(flags)), "MASTER_ADDR": "127.0.0.1"}
        world |= {"MASTER_PORT": free_port(), "LOCAL_RANK": "0"}
        command = [sys.executable, "-m", module, *of_host(tiny_flags(tiny, few, folder))]
        ends = at_once(
            [[*command, *of_host(own)] for own in flags],
            [environment(*path, **world, RANK=str(rank), **more) for rank in range(len(flags))],
            folder,
        )
        return [Run(code, "", output, folder) for code, output in ends]

    return run


def tiny_flags(tiny: Path, few: Path, folder: Path) -> list[str]:
    flags = {
        "--model.model_name_or_path": tiny / "model",
        "--data.dataset": few / "train.jsonl",
        "--data.max_len": 128,
        "--ds.attn_implementation": "eager",
        "--train.micro_batch_size": 2,
        "--train.batch_size": 8,
        "--adam.lr": 1e-3,
        "--ckpt.output_dir": folder / "out",
        "--ckpt.path": folder / "checkpoints",
        "--logger.tensorboard_dir": folder / "tensorboard",
    }
    words = [str(word) for flag in flags.items() for word in flag]
    return [*words, "--data.apply_chat_template"]


@pytest.fixture(scope="session")
def flags_of_reader(
    tiny: Path, few: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Sequence[str]], list[str]]:
    """``flags_of_reader(words)`` is what ``...`` stands for in a command with these words."""

    def of(words: Sequence[str]) -> list[str]:
        given = tiny_flags(tiny, few, tmp_path_factory.mktemp("reader"))
        if "--data.dataset" in words:
            at = given.index("--data.dataset")
            given[at : at + 2] = []
        return given

    return of


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[tuple[int, str]]]:
    """``commands([argv, ...], *path)`` runs OpenRLHF's command with each; exit codes and output."""

    def run(argvs: Sequence[Sequence[str]], *path: Path | str) -> list[tuple[int, str]]:
        folder, command = (
            tmp_path_factory.mktemp("commands"),
            "focalpo_plugins.openrlhf.train_dpo:main",
        )
        ends = [
            forked.run(command, of_host(argv), folder, 1, path=path, COLUMNS="200")
            for argv in argvs
        ]
        return [(code, stdout + stderr) for code, stdout, stderr in ends]

    return run


@pytest.fixture(scope="session")
def train_many(train: Callable[..., Run]) -> Callable[..., dict[str, Run]]:
    """``train_many({name: flags, ...}, *path)`` runs one training after the other."""

    def run(runs: dict[str, Sequence[str]], *path: Path | str, **how: Any) -> dict[str, Run]:
        return {name: train(*flags, path=path, **how) for name, flags in runs.items()}

    return run


@pytest.fixture(scope="session")
def watched(
    train: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Run]:
    """``watched(flags, ranks, fault)`` trains with ``watched_openrlhf``, which records and makes
    the fault."""

    def run(flags: Sequence[str], ranks: int, fault: dict[str, Any]) -> Run:
        folder = tmp_path_factory.mktemp("run")
        (folder / "faults.json").write_text(json.dumps(fault))
        return train(*flags, ranks=ranks, folder=folder, first=["watched_openrlhf"])

    return run
