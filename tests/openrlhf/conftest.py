"""OpenRLHF's command in processes as a user starts them, on a tiny model."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

COMMAND = "openrlhf.cli.train_dpo"
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def openrlhf() -> SimpleNamespace:
    """The parts of the real OpenRLHF that tests call, imported as its command is: CPU mode first."""
    from focalpo_plugins.openrlhf import cpu

    cpu.stand_in()
    from openrlhf.datasets import RewardDataset
    from openrlhf.models import Actor, DPOLoss
    from openrlhf.trainer.dpo_trainer import DPOTrainer

    return SimpleNamespace(
        Actor=Actor, DPOLoss=DPOLoss, DPOTrainer=DPOTrainer, RewardDataset=RewardDataset
    )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two small layers, and pairs in which the shorter answer is the chosen one."""
    folder = tmp_path_factory.mktemp("tiny")
    rng = random.Random(0)
    words = [a + b for a in "bdfgklmn" for b in ("a", "e", "i", "o", "u")]

    def message(role: str, length: int) -> dict[str, str]:
        return {"role": role, "content": " ".join(rng.choices(words, k=length))}

    for name, count in (("train", 40), ("test", 10)):
        with open(folder / f"{name}.jsonl", "w") as file:
            for _ in range(count):
                prompt = message("user", rng.randint(3, 6))
                chosen = [prompt, message("assistant", rng.randint(3, 6))]
                rejected = [prompt, message("assistant", rng.randint(8, 14))]
                file.write(json.dumps({"chosen": chosen, "rejected": rejected}) + "\n")

    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<|end|>", "<|user|>", "<|assistant|>", "<unk>"]
    vocabulary = {token: number for number, token in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|end|>", unk_token="<unk>",
        additional_special_tokens=special[2:4], chat_template=TEMPLATE,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        pad_token_id=0, eos_token_id=1, bos_token_id=None, tie_word_embeddings=False,
        initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    fast.save_pretrained(folder / "model")
    return folder


@dataclass
class Run:
    """What a training run left behind."""

    returncode: int
    stdout: str
    stderr: str
    folder: Path

    @property
    def output(self) -> str:
        return self.stdout[-4000:] + self.stderr[-8000:]

    def scalars(self) -> dict[str, list[float]]:
        """What TensorBoard shows, by tag; the parts of a resumed run one after the other."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found: dict[str, list[float]] = {}
        for events in sorted((self.folder / "tensorboard").rglob("events.*")):
            accumulator = EventAccumulator(str(events))
            accumulator.Reload()
            for tag in accumulator.Tags()["scalars"]:
                found.setdefault(tag, []).extend(event.value for event in accumulator.Scalars(tag))
        return found


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def environment(path: Sequence[Path | str] = (), **variables: str) -> dict[str, str]:
    dropped = ("FOCALPO_", "PYTHONPATH", "TORCH_DEVICE_BACKEND_AUTOLOAD", "DS_ACCELERATOR", "WANDB_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    env["PATH"] = str(Path(sys.executable).parent) + os.pathsep + env["PATH"]
    env |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**env, **variables}


@pytest.fixture(scope="session")
def train(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """``train(*flags, launcher="python")`` runs OpenRLHF's own command on the tiny data."""

    def run(
        *flags: str,
        launcher: str = "python",
        ranks: int = 1,
        module: str = COMMAND,
        folder: Path | None = None,
        path: Sequence[Path | str] = (),
        **variables: str,
    ) -> Run:
        folder = folder or tmp_path_factory.mktemp("run")
        one_rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        one_rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        start = {
            "python": [sys.executable, "-m", module],
            "torchrun": ["torchrun", "--standalone", f"--nproc_per_node={ranks}", "-m", module],
            "deepspeed": ["deepspeed", f"--num_gpus={ranks}", f"--master_port={free_port()}"]
            + ["--module", module],
        }[launcher]
        env = environment(path, **(one_rank if launcher == "python" else {}), **variables)
        done = subprocess.run(
            [*start, *tiny_flags(tiny, folder), *flags], env=env, cwd=folder, capture_output=True, text=True
        )
        return Run(done.returncode, done.stdout, done.stderr, folder)

    return run


def tiny_flags(tiny: Path, folder: Path) -> list[str]:
    flags = {
        "--model.model_name_or_path": tiny / "model",
        "--data.dataset": tiny / "train.jsonl",
        "--data.max_len": 64,
        "--ds.attn_implementation": "eager",
        "--train.micro_batch_size": 2,
        "--train.batch_size": 8,
        "--adam.lr": 5e-3,
        "--ckpt.output_dir": folder / "out",
        "--ckpt.path": folder / "checkpoints",
        "--logger.tensorboard_dir": folder / "tensorboard",
    }
    words = [str(word) for flag in flags.items() for word in flag]
    return [*words, "--data.apply_chat_template"]


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[tuple[int, str]]]:
    """``commands([argv, ...])`` runs OpenRLHF's command with each; exit codes and output."""
    one_rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    one_rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "COLUMNS": "200"}

    def run(argvs: Sequence[Sequence[str]], *path: Path | str) -> list[tuple[int, str]]:
        done = subprocess.run(
            [sys.executable, str(Path(__file__).parent / "many_commands.py")],
            input=json.dumps([list(argv) for argv in argvs]),
            env=environment(path, **one_rank),
            cwd=tmp_path_factory.mktemp("commands"),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return [(code, output) for code, output in json.loads(done.stdout)]

    return run
