"""Shared prompts in a transformers model: two hooks on its backbone, and an attention for them.

The hook before the backbone's forward turns a batch of pairs into one row
(:mod:`focalpo_plugins.compute.shared_prompts`).  The hook after it moves the last hidden states
back to their places in the batch.  The code around the backbone sees only the batch.  The hooks act
only inside :meth:`SharedPrompts.of`, so they don't change generation and saving.

The layout is passed to the attention functions as a keyword, which gradient checkpointing keeps for
its second forward pass.  These functions wrap transformers' own, which run if there is no keyword.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .compute.shared_prompts import (
    Layout,
    kernel_for,
    layout_of_batch,
    layout_of_packed,
    shared_attention,
)
from .errors import InvalidValue, RunError

# The keyword that passes a layout through a model.
_KEYWORD = "focalpo_layout"
# Types of layers that mix a sequence's tokens only by attention, over all tokens or a window.
_LAYERS = {"full_attention", "sliding_attention"}
# transformers' implementations that our attention can replace.
_OF_TRANSFORMERS = ("sdpa", "flash_attention_2", "flash_attention_3")
# Each model has its own eager function, so ours gets this name.  transformers would take a name
# with "flash" or "/" for a kernel of the hub.
_EAGER = "focalpo_eager"
# Arguments of attention that don't change its result, or that the layout replaces.
_NO_CHANGE = {"position_ids", "cache_position", "use_cache", "num_items_in_batch"}
# Inputs of a backbone that the row has in another form.
_REPLACED = {"input_ids", "attention_mask", "position_ids", "cache_position"}
# A row with this share of the padded batch's tokens, or more, is no faster: forming it takes about
# 5 % of the time of a batch that saves nothing.
_NOT_WORTH_IT = 0.95
# The kernels' limit, in channels of a head; they compute in 16 bits alone.
_WIDEST_HEAD = 256
#: Largest relative difference of hidden states that rounding explains: in float32 and above, and
#: below float32.
_ROUNDING = (1e-3, 0.1)


class SharedPrompts:
    """The hooks of one trainer, on its policy and its reference.

    Args:
        key: the key that asked for shared prompts, for messages.
        together: runs a check on every rank, and raises on all if the check raises on one.

    Attributes:
        tokens: number of tokens in the policy's last row.
        places: number of places in the batch that the row replaced, padding included.
    """

    def __init__(self, key: str, together: Callable[[Callable[[], None]], None]) -> None:
        self.key = key
        self.tokens = self.places = 0
        self._together = together
        self._attached: WeakSet[nn.Module] = WeakSet()
        self._compared: WeakSet[nn.Module] = WeakSet()
        self._pairs: int | None = None
        self._lengths: Sequence[int] | None = None
        self._layout: tuple[Tensor, Layout] | None = None
        self._acted = 0
        self._calls = 0  # calls of the attention before the backbone that runs now

    def attach(self, model: Any) -> None:
        """Make ``model`` share prompts; a second call does nothing.

        Args:
            model: a model without wrappers and adapters' models.

        Raises:
            ValueError: its attention can't share prompts, or would compute something else.
        """
        backbone = model.base_model
        if backbone in self._attached:
            return
        if backbone is model:
            raise InvalidValue(
                f"{self.key} needs a model that is a backbone and an output layer, got "
                f"{type(model).__name__}. Set {self.key} to false."
            )
        follow_layouts(model, self.key)
        backbone.register_forward_pre_hook(self._before, with_kwargs=True)
        backbone.register_forward_hook(self._after, with_kwargs=True)
        self._attached.add(backbone)

    def describe(self, device: torch.device) -> str:
        """Text for the start-up line: prompts are shared, and by which attention on ``device``."""
        return f"prompts=shared attention={kernel_for(device)[0]!r} "

    def __deepcopy__(self, memo: Any) -> SharedPrompts:
        return self  # a model's copy copies its hooks, which would copy the trainer too

    @contextmanager
    def of(self, pairs: int, lengths: Sequence[int] | None = None) -> Iterator[None]:
        """Inside, share the prompts of each batch of ``pairs`` pairs that an attached model gets.

        Args:
            pairs: ``B``.
            lengths: lengths of the ``2B`` sequences, if the batch is packed.

        Raises:
            RuntimeError: no attached model got such a batch.
        """
        # A host may compute its reference's log-probs in the middle of a step.
        around = self._pairs, self._lengths, self._layout, self._acted
        self._pairs, self._lengths, self._layout, self._acted = pairs, lengths, None, 0
        self.tokens = 0
        try:
            yield
            acted = self._acted
        finally:
            self._pairs, self._lengths, self._layout, self._acted = around
        if not acted:
            raise RunError(
                f"{self.key}: a step did not run the model's backbone on its batch of pairs, so "
                f"their prompts were not shared. Set {self.key} to false."
            )

    def _before(
        self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._pairs is None or _KEYWORD in kwargs:
            return None
        ids = args[0] if args else kwargs.get("input_ids")
        mask = kwargs.get("attention_mask")
        packed = self._lengths is not None
        if not isinstance(ids, Tensor) or len(ids) != (1 if packed else 2 * self._pairs):
            return None  # for example, a check on a few tokens
        self._refuse_other_inputs(ids, args, kwargs)
        layout = self._layout_of(ids, mask)
        if backbone not in self._compared:
            self._together(lambda: self._compare(backbone, ids, mask, kwargs))
            self._compared.add(backbone)
        self._acted += 1
        self._calls = layout.calls
        saves = layout.tokens < _NOT_WORTH_IT * layout.tokens_before
        if not self.tokens:
            self.places = layout.tokens_before
            self.tokens = layout.tokens if saves else self.places
        return ((), _inputs(kwargs, layout)) if saves else None

    def _after(
        self, backbone: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        layout = kwargs.get(_KEYWORD)
        if layout is None or self._pairs is None:
            return None
        layers = backbone.config.get_text_config().num_hidden_layers
        if layout.calls - self._calls != layers:
            raise InvalidValue(
                f"{self.key} can't be used with {type(backbone).__name__}, got "
                f"{layout.calls - self._calls} of its {layers} layers that asked for the attention "
                f"of transformers: another one was put in its place. Set {self.key} to false."
            )
        if not isinstance(getattr(output, "last_hidden_state", None), Tensor):
            raise InvalidValue(
                f"{self.key} needs a backbone that gives its last hidden states, got "
                f"{type(output).__name__} of {type(backbone).__name__}. Set {self.key} to false."
            )
        output.last_hidden_state = layout.states_of_batch(output.last_hidden_state)
        return output

    def _refuse_other_inputs(self, ids: Tensor, args: tuple[Any, ...], kwargs: Any) -> None:
        """Refuse inputs that the row has no place for, such as one value for each token."""
        others = {f"argument {place}": value for place, value in enumerate(args) if place}
        others |= {name: value for name, value in kwargs.items() if name not in _REPLACED}
        for name, value in others.items():
            by_token = isinstance(value, Tensor) and value.shape[:2] == ids.shape[:2]
            wanted = name.startswith("output_") and value
            if by_token or wanted or name == "past_key_values" and value is not None:
                shown = tuple(value.shape) if isinstance(value, Tensor) else value
                raise InvalidValue(
                    f"{self.key} can't be combined with a model that is given {name}, got "
                    f"{shown!r}. Set {self.key} to false."
                )

    def _layout_of(self, ids: Tensor, mask: Any) -> Layout:
        if self._layout is None or self._layout[0] is not ids:
            if self._lengths is not None:
                self._layout = ids, layout_of_packed(ids, self._lengths)
            elif not isinstance(mask, Tensor) or mask.shape != ids.shape:
                raise InvalidValue(
                    f"{self.key} needs an attention mask of the batch's shape {tuple(ids.shape)}, "
                    f"got {getattr(mask, 'shape', mask)}. Set {self.key} to false."
                )
            else:
                self._layout = ids, layout_of_batch(ids, mask)
        return self._layout[1]

    @torch.no_grad()
    def _compare(
        self, backbone: nn.Module, ids: Tensor, mask: Any, kwargs: Mapping[str, Any]
    ) -> None:
        """Compare the first pair's hidden states with those of the model's own attention."""
        pairs, self._pairs = self._pairs, None
        assert pairs is not None
        modes = {module: module.training for module in backbone.modules()}
        for module in modes:
            # Except bitsandbytes' 4-bit layers: on a CPU they repack their weights in eval mode,
            # and every gradient after that is wrong.
            four_bit = hasattr(getattr(module, "weight", None), "quant_state")
            module.training = four_bit and module.training
        own = {name: value for name, value in kwargs.items() if name not in _REPLACED}
        try:
            if self._lengths is None:
                rows = torch.tensor([0, pairs], device=ids.device)
                few, real = ids[rows], mask[rows]
                layout = layout_of_batch(few, real)
                whole = backbone(**{**own, "input_ids": few, "attention_mask": real})
            else:
                first, second = self._lengths[0], self._lengths[pairs]
                begin = sum(self._lengths[:pairs])
                few = torch.cat([ids[:, :first], ids[:, begin : begin + second]], 1)
                real = torch.ones_like(few)
                layout = layout_of_packed(few, [first, second])
                places = torch.cat([torch.arange(first), torch.arange(second)]).to(ids.device)
                whole = backbone(
                    **{**own, "input_ids": few, "attention_mask": None},
                    position_ids=places[None],
                )
            row = backbone(**_inputs(kwargs, layout)).last_hidden_state
        finally:
            for module, mode in modes.items():
                module.training = mode
            self._pairs = pairs
        plain, shared = whole.last_hidden_state, layout.states_of_batch(row)
        narrow = plain.dtype.itemsize < 4 or torch.is_autocast_enabled(ids.device.type)
        off = (shared - plain).float().norm(dim=-1) / plain.float().norm(dim=-1)
        # If the model's own states are not finite, the check of the margins stops the step.
        off = off[real.bool() & plain.isfinite().all(-1)]
        furthest = off.max().item() if len(off) else 0.0
        if not furthest <= _ROUNDING[narrow]:
            raise InvalidValue(
                f"{self.key} can't be used with {type(backbone).__name__}, got hidden states that "
                f"differ by {furthest:.3g} of their size from those of its own attention, beyond "
                f"{plain.dtype}'s rounding. Set {self.key} to false."
            )


def _inputs(kwargs: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """The backbone's inputs, with the row in place of the batch."""
    return {
        **kwargs,
        "input_ids": layout.ids,
        "position_ids": layout.positions,
        # With 4 dimensions transformers makes no mask itself, and doesn't look for packing.
        "attention_mask": torch.empty(1, 1, 1, 0, device=layout.ids.device),
        "use_cache": False,
        _KEYWORD: layout,
    }


def check_layers(config: Any, key: str, attention: str | None = None) -> None:
    """Refuse a model by its config alone; the model need not be loaded.

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
        raise InvalidValue(
            f"{key} needs layers of full or sliding attention, got {', '.join(kinds)} in a model "
            f"of type {text.model_type}: they mix tokens in another way. Set {key} to false."
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
        raise InvalidValue(
            f"{key} needs a model whose attention can be exchanged, got {type(model).__name__}, "
            f"which computes its own. Set {key} to false."
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


def _eager(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The eager attention of the module's own model."""
    return vars(sys.modules[type(module).__module__])["eager_attention_forward"](
        module, *args, **kwargs
    )


def _following(original: Callable[..., Any], key: str) -> Callable[..., Any]:
    """Wrap ``original``, an attention function of transformers; with a layout, ours runs."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key_states: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        layout = kwargs.pop(_KEYWORD, None)
        if layout is None:
            return original(module, query, key_states, value, attention_mask, *args, **kwargs)
        return _shared(module, query, key_states, value, layout, key, *args, **kwargs)

    attention.of_transformers = original  # type: ignore[attr-defined]
    return attention


def _shared(
    module: nn.Module,
    query: Tensor,
    key_states: Tensor,
    value: Tensor,
    layout: Layout,
    key: str,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    for name, given in others.items():
        if name not in _NO_CHANGE and given is not None and given is not False:
            shown = tuple(given.shape) if isinstance(given, Tensor) else given
            raise InvalidValue(
                f"{key} can't be combined with attention that is given {name}, as that of "
                f"{type(module).__name__} is, got {shown!r}. Set {key} to false."
            )
    if is_causal is False:
        raise InvalidValue(
            f"{key} needs causal attention, got is_causal=False in {type(module).__name__}. Set "
            f"{key} to false."
        )
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
    out = shared_attention(
        query,
        key_states,
        value,
        layout,
        scale=scaling,
        window=sliding_window,
        dropout=dropout,
        kernel=kernel,
    )
    return out.contiguous(), None
