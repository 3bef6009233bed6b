"""The loss part with Llama 3's vocabulary: TRL's plain path, its Liger path, and ours.

Three real trainers around the same model of one small layer, so that what is measured is the way
from hidden states to loss and gradients: ``compute_loss`` and backward, on one pair of sequences
of random tokens of which the last three quarters are the completion, with a reference model.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from measure import (
    CUDA,
    DEVICE,
    Result,
    compare,
    in_turns,
    peak_bytes,
    seconds,
    what_a_trainer_needs,
)

VOCABULARY = 128_256
HIDDEN, DTYPE = (1024, torch.bfloat16) if CUDA else (64, torch.float32)
LENGTHS = (256, 1024, 2048, 4096) if CUDA else (256, 1024, 2048)
# Liger's loss alone: its layers are Triton's, and no part of what is compared.
LAYERS = ("rope", "rms_norm", "swiglu", "cross_entropy", "fused_linear_cross_entropy")


def trainers(folder: Path, *, frozen: bool) -> dict[str, Any]:
    """By name, each with its own copies of policy and reference."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import DPOConfig, DPOTrainer

    from focalpo_plugins import FocalPOConfig, FocalPOTrainer

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    liger = {"use_liger_kernel": True, "liger_kernel_config": dict.fromkeys(LAYERS, False)}
    found = {}
    for name, trainer, args, more in (
        ("plain", DPOTrainer, DPOConfig, {}),
        ("liger", DPOTrainer, DPOConfig, liger),
        ("ours", FocalPOTrainer, FocalPOConfig, {"focalpo_fused": True}),
    ):
        torch.manual_seed(0)
        policy, reference = (LlamaForCausalLM(config).to(DEVICE, DTYPE) for _ in range(2))
        policy.lm_head.requires_grad_(not frozen)
        found[name] = trainer(
            policy,
            reference,
            args=args(
                str(folder / name),
                report_to="none",
                bf16=CUDA,
                use_cpu=not CUDA,
                gradient_checkpointing=False,
                **more,
            ),
            **what_a_trainer_needs(),
        )
    if not hasattr(found["liger"], "liger_loss"):
        del found["liger"]  # a TRL with its own fused path
    elif not CUDA:
        # Liger compiles its loss by default, to Triton.
        found["liger"].liger_loss.compiled = False
    return found


def batch(length: int) -> dict[str, torch.Tensor]:
    """One pair, chosen above rejected; prompts of a quarter of the length."""
    torch.manual_seed(length)
    ids = torch.randint(3, VOCABULARY, (2, length), device=DEVICE)
    ids[1, : length // 4] = ids[0, : length // 4]
    completion = torch.ones_like(ids)
    completion[:, : length // 4] = 0
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": completion,
    }


def step(trainer: Any, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    def work() -> None:
        trainer.model.zero_grad(set_to_none=True)
        trainer.compute_loss(trainer.model, dict(inputs)).backward()

    return work


def measure(rounds: int) -> Iterator[Result]:
    quiet = io.StringIO()
    for frozen in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
                found = trainers(Path(folder), frozen=frozen)
            for length in LENGTHS if not frozen else (1024,):
                inputs = batch(length)
                works = {name: step(trainer, inputs) for name, trainer in found.items()}
                peaks = {}
                for name, work in works.items():
                    work()
                    peaks[name] = [peak_bytes(work) / 2**20] * 2
                for name in [name for name in works if name != "ours"]:
                    case = f"2 x {length} tokens, {'frozen' if frozen else 'trained'} output layer"
                    against = f"TRL's {'Liger' if name == 'liger' else 'plain'} path"
                    yield compare("fused", case, "peak memory", "MiB",
                                  peaks["ours"], peaks[name], against)  # fmt: skip
                    ours, theirs = in_turns(
                        lambda works=works: seconds(works["ours"]),
                        lambda works=works, name=name: seconds(works[name]),
                        rounds,
                    )
                    yield compare("fused", case, "time", "s", ours, theirs, against)
