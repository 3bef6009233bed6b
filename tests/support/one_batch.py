"""One batch on which policy and reference differ, the same in every host's environment.

Weights and tokens come only from torch's seeded generator, and the weights are exact in bfloat16,
so that no host changes them when it loads them.  ``MARGINS`` were computed in float64 throughout,
each sequence by itself and without padding; ``truth`` computes them again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from focalpo_plugins import focalpo_loss

BETA = 0.5
PAD = 0
# Lengths of prompt, chosen and rejected answer: the last pair's two sequences are equally long.
LENGTHS = [(3, 6, 2), (5, 1, 9), (2, 4, 7), (4, 5, 5)]
#: beta * ((chosen - rejected) - (reference chosen - reference rejected)), by pair.
MARGINS = [2.2833700413, -2.1166151965, -2.2442854815, -0.2791536181]


def model(seed: int) -> LlamaForCausalLM:
    """A small Llama whose weights are drawn name by name, independent of a host's initialiser."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",
    )
    network = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(network.named_parameters()):
            drawn = torch.randn(weight.shape, generator=generator) * 0.2
            weight.copy_((1 + drawn if "norm" in name else drawn).bfloat16())
    return network.eval()


def sequences() -> list[tuple[list[int], list[int], list[int]]]:
    """Prompt, chosen and rejected answer of each pair, as token ids."""
    generator = torch.Generator().manual_seed(0)
    return [
        tuple(torch.randint(3, 64, (n,), generator=generator).tolist() for n in lengths)
        for lengths in LENGTHS
    ]


def padded(rows: list[int]) -> tuple[list[torch.Tensor], list[int]]:
    """Token ids and masks of the chosen and of the rejected sequences, padded at the end, and the
    prompts' lengths, as OpenRLHF's trainer takes them."""
    pairs = [sequences()[row] for row in rows]
    found = []
    for side in (1, 2):
        whole = [[*pair[0], *pair[side]] for pair in pairs]
        width = max(map(len, whole))
        found.append(torch.tensor([s + [PAD] * (width - len(s)) for s in whole]))
        found.append(torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in whole]))
    return found, [len(pair[0]) for pair in pairs]


def logits(weights: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    """Llama's logits ``(n, 64)`` of one sequence, written out: transformers computes norms, angles
    and softmax in float32 whatever the model's dtype, and the last bits of these differ from
    processor to processor, and with where in memory a row begins."""
    n, heads, kv_heads = len(ids), 4, 2
    x = weights["model.embed_tokens.weight"][ids]
    size = x.shape[1] // heads
    frequencies = 10000.0 ** (-torch.arange(0, size, 2, dtype=x.dtype) / size)
    angles = torch.arange(n, dtype=x.dtype)[:, None] * frequencies
    turn = torch.polar(torch.ones_like(angles), angles)

    def normed(x: torch.Tensor, name: str) -> torch.Tensor:
        return weights[name] * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def by_head(x: torch.Tensor) -> torch.Tensor:
        return x.view(n, -1, size).transpose(0, 1)

    def turned(x: torch.Tensor) -> torch.Tensor:
        both = torch.complex(*by_head(x).chunk(2, -1)) * turn
        return torch.cat([both.real, both.imag], -1)

    later = torch.ones(n, n, dtype=torch.bool).triu(1)
    for layer in range(2):
        of = f"model.layers.{layer}."
        h = normed(x, of + "input_layernorm.weight")
        q, k, v = (h @ weights[f"{of}self_attn.{name}_proj.weight"].T for name in "qkv")
        k, v = (t.repeat_interleave(heads // kv_heads, 0) for t in (turned(k), by_head(v)))
        scores = (turned(q) @ k.transpose(1, 2) / size**0.5).masked_fill(later, -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(n, -1)
        x = x + mixed @ weights[of + "self_attn.o_proj.weight"].T
        h = normed(x, of + "post_attention_layernorm.weight")
        gate, up = (h @ weights[f"{of}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate * gate.sigmoid() * up) @ weights[of + "mlp.down_proj.weight"].T
    return normed(x, "model.norm.weight") @ weights["lm_head.weight"].T


def log_prob(
    weights: dict[str, torch.Tensor], prompt: list[int], answer: list[int]
) -> torch.Tensor:
    """The answer's log-probability."""
    ids = [*prompt, *answer]
    logps = logits(weights, ids).log_softmax(-1)
    # The token at i is predicted at i - 1.
    return sum(logps[i - 1, ids[i]] for i in range(len(prompt), len(ids)))


def truth() -> torch.Tensor:
    """The margins ``(4,)`` in float64."""
    policy, reference = (model(seed).double().state_dict() for seed in (1, 2))
    return torch.stack(
        [
            BETA
            * (
                (log_prob(policy, prompt, chosen) - log_prob(policy, prompt, rejected))
                - (log_prob(reference, prompt, chosen) - log_prob(reference, prompt, rejected))
            )
            for prompt, chosen, rejected in sequences()
        ]
    )


#: The losses that each host computes on the batch.
LOSSES = pytest.mark.parametrize(
    "options, label_smoothing",
    [
        (options, label_smoothing)
        for options in (
            {},
            {"gamma": 1.0, "variant": "incorrect"},
            {"gamma": 0.5, "variant": "correct_exact"},
        )
        for label_smoothing in (0.0, 0.1)
    ],
    ids=str,
)
# Of these rows in one batch: the mean loss, the margins, and the gradients of the margins.
Step: TypeAlias = Callable[[list[int]], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def check_losses_and_gradients(step: Step, options: dict[str, Any], label_smoothing: float) -> None:
    """The pairs padded together, and each pair by itself (the last one without any padding):
    margins, losses and the gradients of the margins are the core's at the float64 margins, up to
    the rounding of float32 log-probabilities."""
    z = torch.tensor(MARGINS, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(truth(), z.detach(), rtol=0, atol=1e-9)
    losses = focalpo_loss(z, **options, label_smoothing=label_smoothing)
    (slopes,) = torch.autograd.grad(losses.sum(), z)

    near = {"rtol": 0, "atol": 2e-5}
    whole, margins, of_margins = step([0, 1, 2, 3])
    torch.testing.assert_close(whole.double(), losses.mean(), **near)
    torch.testing.assert_close(margins.double(), z, **near)
    torch.testing.assert_close(of_margins.double() * 4, slopes, **near)
    for row in range(4):
        one, _, of_margin = step([row])
        torch.testing.assert_close(one.double(), losses[row], **near)
        torch.testing.assert_close(of_margin.double(), slopes[row : row + 1], **near)
