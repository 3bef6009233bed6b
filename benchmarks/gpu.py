"""Shared prompts and the fused loss on a GPU: `python benchmarks/gpu.py`.

1. The attention kernel with variable lengths against torch's attention segment by segment, values
   and gradients, in bfloat16.
2. A step's loss and gradients, by four ways: plain, as the hosts compute DPO; fused; shared; both.
   The model has Llama-3-8B's shape, random weights, as many layers as fit, and a random LoRA
   adapter, which is off in the reference.

Needs torch, transformers and peft, and no host. Times are CUDA events' of steps in turns, memory is
the allocator's peak. It prints a Markdown table that names the card. `--device cpu --tiny` tries it
on a small model.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from measure import CUDA, peak_bytes, seconds
from torch import Tensor

from focalpo_plugins import focalpo_loss
from focalpo_plugins.backbone import SharedPrompts
from focalpo_plugins.compute.fused_loss import IGNORED, fused_logps, fused_pairwise_loss
from focalpo_plugins.compute.shared_prompts import (
    kernel_for,
    layout_of_batch,
    shared_attention,
)

BETA = 0.1
WAYS = {"plain": (False, False), "fused": (False, True), "shared": (True, False)}
WAYS["shared + fused"] = (True, True)
# Prompt, answers, pairs a batch.
CASES = ((256, 256, 4), (1024, 256, 4), (1024, 1024, 2))
TINY_CASES = ((8, 8, 2), (16, 4, 1))


def batch(prompt: int, answer: int, pairs: int, vocabulary: int, device: str) -> dict[str, Tensor]:
    """Pairs whose answers have from half to all of a length, padded behind."""
    drawn = torch.Generator().manual_seed(0)
    lengths = torch.randint(max(1, answer // 2), answer + 1, (2 * pairs,), generator=drawn)
    ids = torch.randint(6, vocabulary, (2 * pairs, prompt + answer), generator=drawn)
    ids[pairs:, :prompt] = ids[:pairs, :prompt]
    place = torch.arange(prompt + answer)
    mask = (place < prompt + lengths[:, None]).long()
    labels = torch.full_like(ids, IGNORED)
    learned = (mask[:, 1:] == 1) & (place[1:] >= prompt)
    labels[:, :-1] = torch.where(learned, ids[:, 1:], IGNORED)
    found = {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in found.items()}


def check_kernel(device: str, tiny: bool) -> str:
    """The largest difference of values and gradients, of the largest value."""
    name, kernel = kernel_for(torch.device(device))
    if kernel is None:
        return f"{name}: nothing to compare it with"
    prompt, answer, pairs = TINY_CASES[0] if tiny else CASES[1]
    given = batch(prompt, answer, pairs, 1000, device)
    layout = layout_of_batch(given["input_ids"], given["attention_mask"])
    worst = 0.0
    for window in (None, 64):
        torch.manual_seed(0)
        shapes = ((1, heads, layout.tokens, 128) for heads in (32, 8, 8))
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
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
    }
    shape |= {"num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32}
    if tiny:
        shape |= {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128}
        shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    elif CUDA:
        # 0.44 GB of weights a layer in bf16, 2.1 GB for both embeddings; half is for the step.
        free = torch.cuda.mem_get_info()[0]
        shape["num_hidden_layers"] = max(1, min(32, int((free / 2 - 2.1e9) / 0.44e9)))
    torch.manual_seed(0)
    with torch.device(device):
        network = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="sdpa"))
    network = network.to(torch.float32 if tiny else torch.bfloat16)
    # Not zero, so that margins aren't and the ways have something to agree on.
    adapter = LoraConfig(
        r=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
    )
    return get_peft_model(network, adapter)


def logps(network: Any, given: dict[str, Tensor]) -> Tensor:
    """Log-probs summed over each sequence's labels ``(2B,)``, from all logits."""
    logits = network(
        input_ids=given["input_ids"], attention_mask=given["attention_mask"], use_cache=False
    ).logits
    labels = given["labels"]
    tokens = logits.log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None]).squeeze(-1)
    return torch.where(labels == IGNORED, 0.0, tokens).sum(1, dtype=torch.float32)


def step(
    network: Any, sharing: SharedPrompts, given: dict[str, Tensor], shared: bool, fused: bool
) -> float:
    """Loss and gradients of one batch; the loss."""
    head = network.get_output_embeddings().weight
    backbone = network.base_model.model.base_model

    def states() -> Tensor:
        found: Tensor = backbone(
            input_ids=given["input_ids"], attention_mask=given["attention_mask"], use_cache=False
        ).last_hidden_state
        return found

    with sharing.of(len(given["input_ids"]) // 2) if shared else nullcontext():
        with torch.no_grad(), network.disable_adapter():
            reference = (
                fused_logps(states(), head, given["labels"]) if fused else logps(network, given)
            )
        if fused:
            args = (states(), head, given["labels"], reference, focalpo_loss)
            loss = fused_pairwise_loss(*args, beta=BETA).loss
        else:
            chosen, rejected = (logps(network, given) - reference).chunk(2)
            loss = focalpo_loss(BETA * (chosen - rejected)).mean()
    loss.backward()
    network.zero_grad(set_to_none=True)
    return loss.item()


def measure(device: str, tiny: bool, rounds: int) -> Iterator[str]:
    network = make_model(device, tiny)
    sharing = SharedPrompts("shared", lambda check: check())
    sharing.attach(network.base_model.model)
    layers = network.config.num_hidden_layers
    yield f"{layers} layers, {sum(w.numel() for w in network.parameters()) / 1e9:.3g} B weights\n"
    yield "| prompt, answers, pairs | " + " | ".join(WAYS) + " |"
    yield "| --- |" + " --- |" * len(WAYS)
    for prompt, answer, pairs in TINY_CASES if tiny else CASES:
        given = batch(prompt, answer, pairs, network.config.vocab_size, device)
        losses, cells = [], []
        runs: dict[str, Callable[[], float]] = {
            name: partial(step, network, sharing, given, *way) for name, way in WAYS.items()
        }
        times: dict[str, list[float]] = {name: [] for name in WAYS}
        for run in runs.values():
            losses.append(run())
        if max(losses) - min(losses) > (1e-5 if tiny else 0.05):  # what bf16 rounds of margins
            raise SystemExit(f"the ways differ: {dict(zip(WAYS, losses, strict=True))}")
        for number in range(rounds):
            for name in list(runs)[:: 1 if number % 2 else -1]:
                times[name].append(1e3 * seconds(runs[name]))
        plain = statistics.median(times["plain"])
        for name, run in runs.items():
            middle, peak = statistics.median(times[name]), peak_bytes(run) / 2**30
            cells.append(f"{middle:.0f} ms ({middle / plain:.2f}), {peak:.2f} GiB")
        yield f"| {prompt}, {answer}, {pairs} | " + " | ".join(cells) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="a small model, in float32")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    if args.device == "cuda" and not CUDA:
        parser.error("--device must be cpu where torch finds no CUDA, got cuda")
    card = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    print(f"{card}, torch {torch.__version__}", flush=True)
    print(check_kernel(args.device, args.tiny), flush=True)
    for line in measure(args.device, args.tiny, args.rounds):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
