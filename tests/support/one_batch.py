"""One batch on which policy and reference differ, the same in every host's environment.

Weights and tokens come from torch's seeded generator alone, and the weights are exact in bfloat16,
so that no host changes them when it loads them.  ``MARGINS`` were computed from the logits in
float64, each sequence by itself and without padding; ``truth`` computes them again.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

BETA = 0.5
PAD = 0
# Lengths of prompt, chosen and rejected answer: the last pair's two sequences are equally long.
LENGTHS = [(3, 6, 2), (5, 1, 9), (2, 4, 7), (4, 5, 5)]
#: beta * ((chosen - rejected) - (reference chosen - reference rejected)), by pair.
MARGINS = [2.2833702757, -2.1166141441, -2.2442850255, -0.2791535302]


def model(seed: int) -> LlamaForCausalLM:
    """A small Llama whose weights are drawn name by name: no initialiser of a host's release."""
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


def log_prob(network: LlamaForCausalLM, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """The answer's log-probability, in the model's dtype."""
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        logps = network(ids).logits[0].log_softmax(-1)
    # The token at i is predicted at i - 1.
    return sum(logps[i - 1, ids[0, i]] for i in range(len(prompt), ids.shape[1]))


def with_exact_angles(network: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model with its rotary embedding in float64: transformers computes it in float32 whatever
    the model's dtype, and float32 sines differ in their last bit from processor to processor."""
    size = network.config.hidden_size // network.config.num_attention_heads
    frequencies = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)

    def angles(states: torch.Tensor, position_ids: torch.Tensor, *more: object, **named: object):
        of_positions = position_ids[..., None].double() * frequencies
        both = torch.cat([of_positions, of_positions], -1)
        return both.cos().to(states.dtype), both.sin().to(states.dtype)

    network.model.rotary_emb.forward = angles
    return network


def truth() -> torch.Tensor:
    """The margins ``(4,)`` in float64."""
    policy, reference = (with_exact_angles(model(seed).double()) for seed in (1, 2))
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
