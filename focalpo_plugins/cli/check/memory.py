"""The memory of a model's state on a rank, computed from its config alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ...plan import Plan

GIB = 2**30
#: A weight in NF4 with double quantisation: 4 bits, and 0.127 for the scales (QLoRA, section 3).
_NF4_BYTES = (4 + 0.127) / 8
#: The two states of a float32 weight.
_ADAM_IN_FLOAT32 = 8

FORMULA = (
    "weights/W + gradients/G + optimizer/O + reference/W, with W, G, O the number of ranks from "
    "ZeRO stage 3, 2, 1 on and 1 below"
)
LEFT_OUT = "activations, DeepSpeed's buffers, CUDA's context, fragmentation"


class Room(NamedTuple):
    """The memory of a GPU.

    Attributes:
        size: bytes.
        said: where that is from.
    """

    size: float
    said: str


@dataclass
class Estimate:
    """Bytes on one rank, by purpose.

    ``reference`` is held while training.  ``reference_before`` is held only before the first step,
    in place of ``reference``.
    """

    parameters: int
    trained: int
    weights: float
    gradients: float
    optimizer: float
    reference: float
    reference_before: float
    logits: float

    @property
    def state(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.reference

    @property
    def least(self) -> float:
        """What a rank holds at the fullest moment that is estimated."""
        return max(self.state + self.logits, self.weights + self.reference_before)


def estimate(plan: Plan, tokens: int) -> Estimate | None:
    """The estimate; None if the state's sharding is unknown.

    Args:
        tokens: the largest number of tokens of a micro-batch whose logits are computed.
    """
    state = plan.state
    if state.zero_stage is None or state.unknown:
        return None
    total, trained, linear, wide = _count(plan)
    each, share = state.weight_bytes, [1, 1, 1]
    for place, stage in enumerate((3, 2, 1)):  # weights, gradients, optimizer
        if state.zero_stage >= stage:
            share[place] = plan.ranks
    more = wide * (4 - each)
    frozen: float = total * each + more
    if state.four_bit:
        frozen = (total - linear) * each + linear * _NF4_BYTES
    held, gradients = frozen, trained * each + more
    if state.lora is not None:
        gradients = trained * (state.adapter_bytes or each)
        held += gradients
    vocabulary = state.config.get_text_config().vocab_size
    logits = tokens * vocabulary
    if state.logits_at_once is not None:
        logits = min(logits, max(state.logits_at_once, vocabulary))
    here = {what: what not in state.offloaded for what in ("weights", "optimizer", "reference")}
    optimizer = (trained - wide) * state.optimizer_bytes + wide * _ADAM_IN_FLOAT32
    reference = frozen / share[0] * (state.reference and here["reference"])
    return Estimate(
        parameters=total,
        trained=trained,
        weights=held / share[0] * here["weights"],
        gradients=gradients / share[1],
        optimizer=optimizer / share[2] * here["optimizer"],
        reference=0.0 if state.reference_freed else reference,
        reference_before=reference if state.reference_freed else 0.0,
        logits=logits * 4.0,  # their log-probabilities are computed in float32
    )


def _count(plan: Plan) -> tuple[int, int, int, int]:
    """Numbers of parameters: all, trained, in the linear layers except the output layer, and in the
    modules that are held in float32 while others are not."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(plan.state.config)
    total = sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings()
    linear = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    )
    wide = sum(
        p.numel()
        for name, p in model.named_parameters()
        if any(part in name.rpartition(".")[0] for part in plan.state.in_float32)
    )
    if plan.state.lora is None:
        return total, total, linear, wide
    from peft import get_peft_model

    with torch.device("meta"):
        adapted = get_peft_model(model, plan.state.lora)
    return total, sum(p.numel() for p in adapted.parameters() if p.requires_grad), linear, wide
