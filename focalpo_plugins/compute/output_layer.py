"""A language model's output layer by itself, and whether the logits are that layer's alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

# Gemma 2's final_logit_softcapping, Cohere's logit_scale, Granite's logits_scaling, ...
_CHANGES_LOGITS = re.compile(
    r"(?!.*(attn|attention|router)).*logit.*(cap|scal).*|lm_head_multiplier"
)
# Of the largest logit; bfloat16 rounds to half a percent.
_TOLERANCE = 0.01


@dataclass
class Head:
    """A causal language model in two.

    Attributes:
        model: the whole, without adapters' wrappers.
        backbone: what gives the last hidden states.
        layer: what makes logits of them.
    """

    model: Any
    backbone: Any
    layer: Any

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.layer.weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.layer, "bias", None)


def head_of(model: Any, key: str) -> Head:
    """The two parts of ``model``, which is without adapters' wrappers.

    Args:
        key: what asked for the fused path, for the message.

    Raises:
        ValueError: the fused path would compute other log-probs than the model.
    """
    backbone, layer = model.base_model, model.get_output_embeddings()
    weight = getattr(layer, "weight", None)
    plain = (
        backbone is not model
        and isinstance(weight, Tensor)
        and weight.is_floating_point()
        # FSDP's and tensor parallelism's pieces of it, outside of the model's forward.
        and type(weight) in (Tensor, nn.Parameter)
    )
    if not plain:
        raise ValueError(
            f"{key} needs a model that is a backbone and one linear output layer, got "
            f"{type(model).__name__} with {type(layer).__name__}. Set {key} to false."
        )
    return Head(model, backbone, layer)


def check_config(config: Any, key: str) -> None:
    """Raise ``ValueError`` where a transformers config says that the logits are changed after the
    output layer."""
    text = config.get_text_config()
    for name, value in text.to_dict().items():
        changes = isinstance(value, int | float) and value not in (0, 1)
        if changes and _CHANGES_LOGITS.fullmatch(name):
            raise ValueError(
                f"{key} can't be combined with a model whose {name} is set, got {value!r}: the "
                f"fused path takes the output layer's logits as they are. Set {key} to false."
            )


def check_logits(
    head: Head,
    ids: Tensor,
    key: str,
    gathered: Callable[..., AbstractContextManager[None]],
) -> None:
    """Compare the model's own logits of one sequence with its output layer's.

    Args:
        ids: token ids ``(n,)``; a few will do.
        gathered: ``gathered(weight, bias)`` has both in one piece inside.

    Raises:
        ValueError: they differ by more than rounding.
    """
    states: list[Tensor] = []
    # In one pass, so that dropout is the same for both.
    hook = head.backbone.register_forward_hook(
        lambda module, args, output: states.append(output.last_hidden_state)
    )
    try:
        # Not model(...): this runs inside its forward already, and so inside its wrappers'.
        logits = head.model.forward(input_ids=ids[None], use_cache=False).logits
    finally:
        hook.remove()
    with gathered(head.weight, head.bias):
        expected = F.linear(states[0].to(head.weight.dtype), head.weight, head.bias).float()
    logits = logits.float()
    # States that are not finite give such logits on both ways; the margins' check says so.
    same = (logits == expected) | (logits.isnan() & expected.isnan())
    off = (logits - expected).abs().masked_fill(same, 0).max().item()
    largest = expected.abs().nan_to_num(0, 0).max().item()
    if not off <= _TOLERANCE * largest:
        raise ValueError(
            f"{key} can't be used with {type(head.model).__name__}, got logits that differ by "
            f"{off:.3g} from those of its output layer: the model changes them afterwards. Set "
            f"{key} to false."
        )
