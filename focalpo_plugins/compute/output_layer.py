"""A language model's output layer, and checks that the logits come from only this layer."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InvalidValue

# Gemma 2's final_logit_softcapping, Cohere's logit_scale, Granite's logits_scaling, ...
_CHANGES_LOGITS = re.compile(
    r"(?!.*(attn|attention|router)).*logit.*(cap|scal).*|lm_head_multiplier"
)
# Relative to the largest logit; bfloat16 rounds to half a percent.
_TOLERANCE = 0.01


@dataclass
class Head:
    """A causal language model in two parts.

    Attributes:
        model: the whole model, without adapters' wrappers.
        backbone: the part that gives the last hidden states.
        layer: the output layer, which turns them into logits.
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
    """The two parts of ``model``, which has no adapters' wrappers.

    Args:
        key: the key that asked for the fused path, for the message.

    Raises:
        ValueError: the fused path would compute other log-probs than the model.
    """
    backbone, layer = model.base_model, model.get_output_embeddings()
    weight = getattr(layer, "weight", None)
    plain = (
        backbone is not model
        and isinstance(weight, Tensor)
        and weight.is_floating_point()
        # Outside the model's forward, FSDP and tensor parallelism hold only parts of it.
        and type(weight) in (Tensor, nn.Parameter)
    )
    if not plain:
        raise InvalidValue(
            f"{key} needs a model made of a backbone and one linear output layer, got "
            f"{type(model).__name__} with {type(layer).__name__}. Set {key} to false."
        )
    return Head(model, backbone, layer)


def check_config(config: Any, key: str) -> None:
    """Raise ``ValueError`` if a config says that the model changes its output layer's logits."""
    text = config.get_text_config()
    for name, value in text.to_dict().items():
        changes = isinstance(value, int | float) and value not in (0, 1)
        if changes and _CHANGES_LOGITS.fullmatch(name):
            raise InvalidValue(
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
        gathered: a context manager; inside ``gathered(weight, bias)`` both are in one piece.

    Raises:
        ValueError: they differ by more than rounding.
    """
    states: list[Tensor] = []
    # In one pass, so that dropout is the same for both.
    hook = head.backbone.register_forward_hook(
        lambda module, args, output: states.append(output.last_hidden_state)
    )
    try:
        # Not model(...): this already runs inside the forward of the model and its wrappers.
        logits = head.model.forward(input_ids=ids[None], use_cache=False).logits
    finally:
        hook.remove()
    with gathered(head.weight, head.bias):
        expected = F.linear(states[0].to(head.weight.dtype), head.weight, head.bias).float()
    # Before 2.11 torch gives autocast's copies of the weights, made without a gradient, to the
    # forward pass around this one.
    torch.clear_autocast_cache()
    logits = logits.float()
    # States that are not finite make both logits so; the check of the margins reports them.
    same = (logits == expected) | (logits.isnan() & expected.isnan())
    off = (logits - expected).abs().masked_fill(same, 0).max().item()
    largest = expected.abs().nan_to_num(0, 0).max().item()
    if not off <= _TOLERANCE * largest:
        raise InvalidValue(
            f"{key} can't be used with {type(head.model).__name__}: its logits differ by {off:.3g} "
            "from those of its output layer, so the model changes them afterwards. Set "
            f"{key} to false."
        )
