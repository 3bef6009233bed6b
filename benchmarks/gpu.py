"""FocalPO on a GPU, checked and measured: `python benchmarks/gpu.py`.

1. The loss, eager and compiled, values and gradients, against float64 on the CPU.
2. The attention kernel with variable lengths against torch's attention segment by segment, values
   and gradients, in bfloat16.
3. Loss and gradients of a step: TRL's DPOTrainer against FocalPOTrainer, plain, fused, with shared
   prompts, and with both. Llama-3-8B's shape, random weights, a LoRA adapter whose copy is the
   reference, bf16 and gradient checkpointing, which are TRL's defaults.

Needs TRL and peft. Times are CUDA events' of steps in turns, memory is the allocator's peak without
the weights. It prints Markdown tables that name the card, and ends with an error where a difference
is larger than rounding. `--device cpu --tiny` tries it on a small model.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from itertools import product
from typing import Any

import torch
from gpu_steps import OF_HOST, SHAPE, TINY_SHAPE, accumulated, whole_steps
from measure import CUDA, installed, peak_bytes, seconds, what_a_trainer_needs
from torch import Tensor

from focalpo_plugins import VARIANTS, focalpo_loss
from focalpo_plugins.compute.shared_prompts import (
    kernel_for,
    layout_of_batch,
    shared_attention,
)

OWN = "DPOTrainer"
FUSED, SHARED = {"focalpo_fused": True}, {"focalpo_shared_prompts": True}
WAYS: dict[str, dict[str, bool] | None] = {OWN: None, "FocalPOTrainer": {}, "fused": FUSED}
WAYS |= {"shared": SHARED, "shared + fused": FUSED | SHARED}
# Prompt, the longest answer, pairs a batch; in tokens.
CASES = ((128, 512, 8), (1024, 512, 4), (1024, 1024, 2), (2048, 256, 2))
TINY_CASES = ((8, 8, 2), (16, 4, 1))
# How much our ways may differ: losses, and gradients as a share of their norm. In bf16 the log-prob
# of a sequence of 1000 tokens is off by about half a nat, whichever way it is computed.
OF_LOSSES, OF_GRADIENTS = {True: 1e-5, False: 0.15}, {True: 1e-3, False: 0.25}


def rows(prompt: int, answer: int, pairs: int, vocabulary: int) -> list[dict[str, list[int]]]:
    """Pairs whose answers have from half to all of a length, as token ids."""
    drawn = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(6, vocabulary, (count,), generator=drawn).tolist()

    def length() -> int:
        return int(torch.randint(max(1, answer // 2), answer + 1, (), generator=drawn))

    return [
        {"prompt_ids": ids(prompt), "chosen_ids": ids(length()), "rejected_ids": ids(length())}
        for _ in range(pairs)
    ]


def check_loss(device: str) -> str:
    """Values and gradients at 20,001 margins, in units of what rounding explains."""
    worst = 0.0
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    for variant, gamma, dtype in product(VARIANTS, (0.0, 0.05, 0.9), dtypes):
        given = torch.linspace(-100, 100, 20_001, dtype=torch.float64).to(dtype)
        exact = given.double().requires_grad_()
        truth = focalpo_loss(exact, gamma, variant)
        truths = truth, *torch.autograd.grad(truth.sum(), exact)
        limits = torch.finfo(dtype)
        arithmetic = min(torch.finfo(torch.float32).eps, limits.eps)
        condition = 4 * (1 + (1 + gamma) * (exact.detach().abs() + 0.7)) * arithmetic
        condition += limits.eps
        # The gradient is a difference: gamma times the loss bounds what cancels.
        scales = [truths[0].abs(), truths[1].abs() + gamma * truths[0].abs()]
        function = partial(focalpo_loss, gamma=gamma, variant=variant)
        functions = [function]
        if device == "cuda" and gamma == 0.05 and dtype in (torch.bfloat16, torch.float32):
            functions.append(torch.compile(function, dynamic=False))
        for function in functions:
            z = given.to(device).requires_grad_()
            losses = function(z)
            found = losses, *torch.autograd.grad(losses.sum(), z)
            for ours, theirs, scale in zip(found, truths, scales, strict=True):
                off = (ours.cpu().double() - theirs.clamp(limits.min, limits.max)).abs()
                worst = max(worst, (off / (condition * scale + limits.tiny)).max().item())
    if not worst <= 1:
        raise SystemExit(f"the loss differs from float64 by {worst:.3g} of what rounding explains")
    how = "eager and compiled" if device == "cuda" else "eager"
    return f"loss: within {worst:.2g} of what rounding explains, {how}, four dtypes"


def check_kernel(device: str, tiny: bool) -> str:
    """The largest difference of values and gradients, of the largest value."""
    name, kernel = kernel_for(torch.device(device))
    if kernel is None:
        return f"{name}: nothing to compare it with"
    pairs = rows(*(TINY_CASES[0] if tiny else (1024, 512, 4)), 1000)
    sequences = [pair["prompt_ids"] + pair[f"{side}_ids"]
                 for side in ("chosen", "rejected") for pair in pairs]  # fmt: skip
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(s) for s in sequences], batch_first=True)
    lengths = torch.tensor([len(s) for s in sequences])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    layout = layout_of_batch(ids.to(device), mask.long().to(device))
    worst = 0.0
    for window, (heads, size) in product((None, 64), ((8, 128), (32, 64), (8, 256))):
        torch.manual_seed(0)
        shapes = ((1, count, layout.tokens, size) for count in (heads, 8, 8))
        tensors = [torch.randn(s, device=device, dtype=torch.bfloat16) for s in shapes]
        tensors = [tensor.requires_grad_() for tensor in tensors]
        found = []
        for each in (kernel, None):
            out = shared_attention(*tensors, layout, window=window, kernel=each)
            found.append([out, *torch.autograd.grad(out.float().square().sum(), tensors)])
        for ours, theirs in zip(*found, strict=True):
            off = (ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()
            worst = max(worst, off.item())
    if not worst < 0.02:
        raise SystemExit(
            f"{name} differs from SDPA by segments by {worst:.3g} of the largest value"
        )
    return f"{name}: within {worst:.2g} of SDPA by segments, values and gradients, bf16"


def make_model(device: str, tiny: bool) -> Any:
    """A random LoRA adapter on a random Llama."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = {**TINY_SHAPE, "vocab_size": 256} if tiny else dict(SHAPE)
    if CUDA and not tiny:
        # 0.44 GB of weights a layer in bf16, 2.1 GB for both embeddings; half is for the step.
        free = torch.cuda.mem_get_info()[0]
        shape["num_hidden_layers"] = max(1, min(32, int((free / 2 - 2.1e9) / 0.44e9)))
    torch.manual_seed(0)
    config = LlamaConfig(**shape, max_position_embeddings=4096)
    with torch.device(device):
        network = AutoModelForCausalLM.from_config(
            config,
            dtype=torch.float32 if tiny else torch.bfloat16,
            attn_implementation="sdpa",
        )
    return get_peft_model(network, LoraConfig(r=16, target_modules="all-linear"))


def make_trainers(network: Any, folder: str, device: str, tiny: bool) -> dict[str, Any]:
    """One for each way, all around the same model."""
    from trl import DPOConfig, DPOTrainer

    from focalpo_plugins import FocalPOConfig, FocalPOTrainer

    needed = what_a_trainer_needs()
    found = {}
    for name, keys in WAYS.items():
        if "ref" in network.peft_config:
            network.delete_adapter("ref")  # of the trainer before; the next one copies it again
        trainer, config = (
            (DPOTrainer, DPOConfig) if keys is None else (FocalPOTrainer, FocalPOConfig)
        )
        arguments = config(
            folder, max_length=None, report_to="none", use_cpu=device == "cpu",
            bf16=device == "cuda", **(keys or {}),
        )  # fmt: skip
        found[name] = trainer(network, args=arguments, **needed)
    # What training does when it starts.
    network.gradient_checkpointing_enable({"use_reentrant": False})
    network.train()
    # A policy that has moved away from its reference, so that the margins are not zero.
    torch.manual_seed(1)
    for weights, tensor in network.named_parameters():
        if "lora_B.default" in weights:
            torch.nn.init.normal_(tensor, std=0.1 if tiny else 1e-3)
    return found


def step(trainer: Any, batch: dict[str, Tensor]) -> float:
    """Loss and gradients of one batch; the loss."""
    network = trainer.model
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(network, dict(batch))
    loss.backward()
    return float(loss.detach())


def gradients(network: Any) -> Tensor:
    found = [w.grad.flatten().float() for w in network.parameters() if w.grad is not None]
    network.zero_grad(set_to_none=True)
    return torch.cat(found)


def compare_ways(
    trainers: dict[str, Any], given: dict[str, Tensor], tiny: bool
) -> tuple[str, bool]:
    """Our ways' losses and gradients against those of plain FocalPOTrainer."""
    losses, found = {}, {}
    for name, trainer in trainers.items():
        losses[name] = step(trainer, given)
        found[name] = gradients(trainer.model)
    del losses[OWN], found[OWN]
    first = next(iter(found.values()))
    apart = max(losses.values()) - min(losses.values())
    off = max(((each - first).norm() / first.norm()).item() for each in found.values())
    shown = f"loss {losses['FocalPOTrainer']:.4f} ± {apart:.1g}, gradients ± {off:.1g}"
    return shown, apart < OF_LOSSES[tiny] and off < OF_GRADIENTS[tiny]


def quiet_trainers(network: Any, device: str, tiny: bool) -> dict[str, Any]:
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        return make_trainers(network, folder, device, tiny)


def measure(
    network: Any, trainers: dict[str, Any], device: str, tiny: bool, rounds: int
) -> Iterator[str]:
    layers = network.config.num_hidden_layers
    weights = sum(w.numel() for w in network.parameters()) / 1e9
    yield f"{layers} layers, {weights:.3g} B weights; ours over {OWN}'s, time and memory\n"
    yield "| prompt, answers, pairs | " + " | ".join(WAYS) + " | our ways agree |"
    yield "| --- |" + " --- |" * len(WAYS) + " --- |"
    differ = []
    for prompt, answer, pairs in TINY_CASES if tiny else CASES:
        listed = rows(prompt, answer, pairs, network.config.vocab_size)
        given = trainers[OWN].data_collator(listed)
        given = {name: tensor.to(device) for name, tensor in given.items()}
        shown, agree = compare_ways(trainers, given, tiny)
        differ += [] if agree else [shown]
        runs: dict[str, Callable[[], float]] = {
            name: partial(step, trainer, given) for name, trainer in trainers.items()
        }
        times: dict[str, list[float]] = {name: [] for name in WAYS}
        for number in range(rounds):
            for name in list(runs)[:: 1 if number % 2 else -1]:
                times[name].append(1e3 * seconds(runs[name]))
                network.zero_grad(set_to_none=True)
        middle = {name: statistics.median(found) for name, found in times.items()}
        peaks = {}
        for name, run in runs.items():
            peaks[name] = peak_bytes(run) / 2**30
            network.zero_grad(set_to_none=True)
        cells = [f"{middle[OWN]:.0f} ms, {peaks[OWN]:.2f} GiB"]
        cells += [f"{middle[name] / middle[OWN]:.2f}, {peaks[name] / peaks[OWN]:.2f}"
                  for name in WAYS if name != OWN]  # fmt: skip
        yield f"| {prompt}, {answer}, {pairs} | " + " | ".join([*cells, shown]) + " |"
    if differ:
        raise SystemExit(f"our ways differ by more than rounding: {'; '.join(differ)}")


def of_trl(parts: list[str], device: str, tiny: bool, rounds: int) -> Iterator[str]:
    network = make_model(device, tiny)
    trainers = quiet_trainers(network, device, tiny)
    if "ways" in parts:
        yield from measure(network, trainers, device, tiny, rounds)
    if "accumulated" in parts:
        plain, shared = trainers["FocalPOTrainer"], trainers["shared"]
        of_ways = {"plain": plain, "balanced": plain, "shared": shared, "both": shared}
        yield from accumulated(of_ways, step, gradients, device, tiny, max(1, rounds // 4))


# Each part and the packages that it needs.
PARTS: dict[str, tuple[str, ...]] = {
    "loss": (),
    "kernel": (),
    "ways": ("trl", "peft"),
    "accumulated": ("trl", "peft"),
    "axolotl": ("axolotl",),
    "openrlhf": ("openrlhf",),
}


def lines(parts: list[str], args: argparse.Namespace) -> Iterator[str]:
    """What the parts print, one after the other."""
    if "loss" in parts:
        yield check_loss(args.device)
    if "kernel" in parts:
        yield check_kernel(args.device, args.tiny)
    half = max(1, args.rounds // 2)
    # Before this process holds anything on the GPU.
    for host in OF_HOST:
        if host in parts:
            yield from whole_steps(host, args.device, args.tiny, half, args.layers)
    if {"ways", "accumulated"} & {*parts}:
        yield from of_trl(parts, args.device, args.tiny, args.rounds)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    there = [part for part, needs in PARTS.items() if all(map(installed, needs))]
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: all"
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="a small model, in float32")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--layers", type=int, help="of the hosts' models (default: what fits)")
    args = parser.parse_args()
    if args.device == "cuda" and not CUDA:
        parser.error("--device must be cpu where torch finds no CUDA, got cuda")
    for name in ("rounds", "layers"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    for part in args.parts:
        if part not in PARTS:
            parser.error(f"PART must be one of {', '.join(PARTS)}, got {part!r}")
        if part not in there:
            parser.error(f"{part} needs {' and '.join(PARTS[part])}, got none installed")
    os.environ["HF_HUB_OFFLINE"] = "1"
    card = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    known = ("torch", "transformers", "trl", "axolotl", "openrlhf", "deepspeed")
    print(", ".join([card, *(f"{name} {version(name)}" for name in known if installed(name))]))
    for line in lines(args.parts or there, args):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
