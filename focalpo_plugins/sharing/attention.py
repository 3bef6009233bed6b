"""The attention of a transformers model, made to follow the layout of a row of shared prompts.

A layout is passed to the attention functions as a keyword, which gradient checkpointing keeps for
its second forward pass.  These functions wrap transformers' own, which run if there is no keyword.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..compute.shared_prompts import Layout, kernel_for, shared_attention
from ..errors import InvalidValue, conflict

#: The keyword that passes a layout through a model.
KEYWORD = "focalpo_layout"
# Types of layers that mix a sequence's tokens only by attention, over all tokens or a window.
_LAYERS = {"full_attention", "sliding_attention"}
# transformers' implementations that our attention can replace.
_OF_TRANSFORMERS = ("sdpa", "flash_attention_2", "flash_attention_3")
# Each model has its own eager function, so ours gets this name.  transformers would read a name
# with "flash" or "/" as a kernel of the hub.
_EAGER = "focalpo_eager"
# Arguments of attention that don't change its result, or that the layout replaces.
_NO_CHANGE = {"position_ids", "cache_position", "use_cache", "num_items_in_batch"}
# The kernels' limit, in channels of a head; they compute in 16 bits only.
_WIDEST_HEAD = 256


def refusal(key: str, why: str) -> InvalidValue:
    """The error for a model that can't share prompts: ``key``, ``why``, and what to do."""
    return InvalidValue(f"{key} {why}. Set {key} to false.")


def check_layers(config: Any, key: str, attention: str | None = None) -> None:
    """Refuse a model by its config; the model need not be loaded.

    Args:
        config: transformers' config of the model.
        key: the key that asked for shared prompts.
        attention: the model's ``attn_implementation``, if it is known.

    Raises:
        ValueError: the model mixes tokens in another way, or its attention can't be exchanged.
    """
    text = config.get_text_config()
    kinds = sorted({*(getattr(text, "layer_types", None) or _LAYERS)} - _LAYERS)
    if kinds:
        raise refusal(
            key,
            f"needs layers of full or sliding attention, got {', '.join(kinds)} in a model of type "
            f"{text.model_type}: these mix tokens in another way",
        )
    if attention is not None and attention not in ("eager", _EAGER, *_OF_TRANSFORMERS):
        raise InvalidValue(
            f"{key} needs attn_implementation to be one of eager, {', '.join(_OF_TRANSFORMERS)}, "
            f"got {attention!r}. Set one of these, or {key} to false."
        )


def follow_layouts(model: Any, key: str) -> None:
    """Make the attention of ``model`` follow layouts.

    Raises:
        ValueError: the model mixes tokens in another way, or its attention can't be exchanged.
    """
    before = model.config.get_text_config()._attn_implementation
    check_layers(model.config, key, str(before))
    if not getattr(model, "_supports_attention_backend", False):
        raise refusal(
            key,
            f"needs a model whose attention can be replaced, got {type(model).__name__}, which "
            "computes its own",
        )
    if before in _OF_TRANSFORMERS:
        original = ALL_ATTENTION_FUNCTIONS[before]
        if not hasattr(original, "of_transformers"):
            ALL_ATTENTION_FUNCTIONS[before] = _following(original, key)
        return
    if before == "eager":
        AttentionInterface.register(_EAGER, _following(_eager, key))
        AttentionMaskInterface.register(_EAGER, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
        model.set_attn_implementation(_EAGER)
    assert model.config.get_text_config()._attn_implementation == _EAGER


def row_inputs(kwargs: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """The backbone's inputs, with the row in place of the batch."""
    return {
        **kwargs,
        "input_ids": layout.ids,
        "position_ids": layout.positions,
        # With 4 dimensions transformers makes no mask itself, and doesn't look for packing.
        "attention_mask": torch.empty(1, 1, 1, 0, device=layout.ids.device),
        "use_cache": False,
        KEYWORD: layout,
    }


def _eager(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The eager attention of the module's own model."""
    return vars(sys.modules[type(module).__module__])["eager_attention_forward"](
        module, *args, **kwargs
    )


def _following(original: Callable[..., Any], key: str) -> Callable[..., Any]:
    """Wrap ``original``, an attention function of transformers; ours runs if there is a layout."""

    def attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        layout = kwargs.pop(KEYWORD, None)
        if layout is None:
            return original(module, *args, **kwargs)
        return _shared(layout, key, module, *args, **kwargs)

    attention.of_transformers = original  # type: ignore[attr-defined]
    return attention


def _shared(
    layout: Layout,
    key: str,
    module: nn.Module,
    query: Tensor,
    key_states: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # the layout replaces it
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    _check(module, key, is_causal is False, sliding_window, others)
    layout.calls += 1
    device = query.device
    _, kernel = kernel_for(device)
    if kernel is not None:
        dtype = query.dtype
        if dtype == torch.float32:
            # Norms in float32 give float32 queries, and autocast doesn't cast a kernel's inputs.
            narrow = torch.is_autocast_enabled(device.type)
            dtype = torch.get_autocast_dtype(device.type) if narrow else value.dtype
            query, key_states, value = (x.to(dtype) for x in (query, key_states, value))
        # A model entirely in float32 gets torch's attention, which takes any dtype and head.
        if dtype.itemsize > 2 or query.shape[-1] > _WIDEST_HEAD:
            kernel = None
    states = query, key_states, value
    out = shared_attention(
        *states, layout, scale=scaling, window=sliding_window, dropout=dropout, kernel=kernel
    )
    return out.contiguous(), None


def _check(
    module: nn.Module, key: str, both_ways: bool, window: int | None, others: Mapping[str, Any]
) -> None:
    """Refuse arguments of an attention that would change what the layout says."""
    layer = type(module).__name__
    for name, given in others.items():
        if name not in _NO_CHANGE and given is not None and given is not False:
            shown = tuple(given.shape) if isinstance(given, Tensor) else given
            what = f"the argument {name} of {layer}"
            why = "the attention of a row of shared prompts doesn't support it"
            raise conflict(key, what, shown, why, f"Set {key} to false")
    if both_ways:
        raise refusal(key, f"needs causal attention, got is_causal=False in {layer}")
    if window is None and _has_window(module):
        raise refusal(
            key,
            f"needs attention that gets its window as an argument, got none in {layer}, but the "
            "config has one: a row of shared prompts has no mask that would hold it",
        )


def _has_window(module: Any) -> bool:
    """Whether the config of a layer's attention gives it a window."""
    config = getattr(module, "config", None)
    kinds, layer = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if kinds and layer is not None:
        return bool(kinds[layer] == "sliding_attention")
    window = getattr(config, "sliding_window", None)
    return window is not None and getattr(config, "use_sliding_window", True) is not False
