"""Shared prompts in a transformers model: two hooks on its backbone, and an attention for them.

The hook before the backbone's forward turns a batch of pairs into one row
(:mod:`focalpo_plugins.compute.shared_prompts`).  The hook after it moves the last hidden states
back to their places in the batch.  The code around the backbone sees only the batch.  The hooks act
only inside :meth:`SharedPrompts.of`, so they don't change generation and saving.

The layout is passed to the attention functions as a keyword, which gradient checkpointing keeps for
its second forward pass.  These functions wrap transformers' own, which run if there is no keyword.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary, WeakMethod, finalize, ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
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
from .errors import FocalPOError, InvalidValue, RunError

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


class _Hook:
    """A hook that keeps nobody alive, and acts on one module.

    A model's copy copies its hooks, but the copy belongs to no trainer.
    """

    def __init__(self, method: Callable[..., Any], module: nn.Module) -> None:
        self._method = WeakMethod(method)
        self._module = ref(module)

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        method = self._method()
        return method(module, *given) if method and module is self._module() else None

    def __deepcopy__(self, memo: Any) -> _Hook:
        return self


class _Attached:
    """Whose hooks a backbone has now, and whether its RoPE depends on the last position."""

    def __init__(
        self, owner: SharedPrompts, handles: list[RemovableHandle], rope_by_length: bool
    ) -> None:
        self.owner = ref(owner)
        self.remove = finalize(owner, _remove, handles)
        self.rope_by_length = rope_by_length


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


_attached: WeakKeyDictionary[nn.Module, _Attached] = WeakKeyDictionary()


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
        # For each backbone that was compared: sequences longer than this may show more.
        self._compared: WeakKeyDictionary[nn.Module, float] = WeakKeyDictionary()
        self._pairs: int | None = None
        self._lengths: Sequence[int] | None = None
        self._layout: tuple[Tensor, Layout] | None = None
        self._acted = 0
        self._calls = 0  # calls of the attention before the backbone that runs now

    def attach(self, model: Any) -> None:
        """Make ``model`` share prompts; a second call does nothing.

        Hooks that another trainer has on it are removed.

        Args:
            model: a model without wrappers and adapters' models.

        Raises:
            ValueError: its attention can't share prompts, or would compute something else.
        """
        backbone = model.base_model
        before = _attached.get(backbone)
        if before is not None and before.owner() is self:
            return
        if backbone is model:
            raise InvalidValue(
                f"{self.key} needs a model that is a backbone and an output layer, got "
                f"{type(model).__name__}. Set {self.key} to false."
            )
        follow_layouts(model, self.key)
        if before is not None:
            before.remove()
        ours = _Hook(self._before, backbone), _Hook(self._after, backbone)
        handles: list[RemovableHandle] = [
            backbone.register_forward_pre_hook(ours[0], with_kwargs=True),
            backbone.register_forward_hook(ours[1], with_kwargs=True),
        ]
        _attached[backbone] = _Attached(self, handles, _rope_by_length(backbone.config.to_dict()))

    def describe(self, device: torch.device) -> str:
        """Text for the start-up line: prompts are shared, and by which attention on ``device``."""
        return f"prompts=shared attention={kernel_for(device)[0]!r} "

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
        limit = self._compared.get(backbone, 0)  # the same on all ranks
        if limit < math.inf and (longest := _of_all_ranks(layout.longest, ids.device)) > limit:
            self._together(lambda: self._compare(backbone, ids, mask, kwargs))
            self._compared[backbone] = _next_limit(backbone, longest)
        self._acted += 1
        self._calls = layout.calls
        saves = layout.tokens < _NOT_WORTH_IT * layout.tokens_before
        saves &= not _depends_on_padding(backbone, layout, ids, kwargs)
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
                f"{self.key} needs {layers} calls of transformers' attention, one for each layer "
                f"of {type(backbone).__name__}, got {layout.calls - self._calls}: the model's "
                "layers attend in another way, or another attention was put in its place. Set "
                f"{self.key} to false."
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

    def _compare(
        self, backbone: nn.Module, ids: Tensor, mask: Any, kwargs: Mapping[str, Any]
    ) -> None:
        """Compare the longest pair's hidden states with those of the model's own attention."""
        pairs, self._pairs = self._pairs, None
        assert pairs is not None
        own = {name: value for name, value in kwargs.items() if name not in _REPLACED}
        given, layout = _longest_pair(ids, mask, pairs, self._lengths)
        try:
            with _without_traces(backbone):
                plain = backbone(**{**own, **given}).last_hidden_state
                shared = layout.states_of_batch(self._of_row(backbone, kwargs, layout))
                self._refuse_noise(backbone, given["input_ids"])
        finally:
            self._pairs = pairs
        narrow = plain.dtype.itemsize < 4 or torch.is_autocast_enabled(ids.device.type)
        off = (shared - plain).float().norm(dim=-1) / plain.float().norm(dim=-1)
        # If the model's own states are not finite, the check of the margins stops the step.
        real = plain.isfinite().all(-1)
        if given["attention_mask"] is not None:
            real &= given["attention_mask"].bool()
        off = off[real]
        furthest = off.max().item() if len(off) else 0.0
        if not furthest <= _ROUNDING[narrow]:
            raise InvalidValue(
                f"{self.key} can't be used with {type(backbone).__name__}, got hidden states that "
                f"differ by {furthest:.3g} of their size from those of its own attention, beyond "
                f"{plain.dtype}'s rounding. Set {self.key} to false."
            )

    def _of_row(self, backbone: nn.Module, kwargs: Mapping[str, Any], layout: Layout) -> Tensor:
        """The row's last hidden states; the model has just computed the same pair by itself."""
        try:
            states: Tensor = backbone(**_inputs(kwargs, layout)).last_hidden_state
        except (FocalPOError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if isinstance(error, RuntimeError) and "allocate memory" in str(error):
                raise  # of a CPU
            raise InvalidValue(
                f"{self.key} can't be used with {type(backbone).__name__}, which fails on a row of "
                f"shared prompts, got {type(error).__name__}: {error}. Set {self.key} to false."
            ) from error
        return states

    def _refuse_noise(self, backbone: Any, ids: Tensor) -> None:
        """Refuse embeddings that a hook changes in training, as NEFTune's does.

        NEFTune's noise depends on the shape of the batch.
        """
        embeddings = backbone.get_input_embeddings()
        if not (embeddings._forward_hooks or embeddings._forward_pre_hooks):
            return
        mode, quiet = embeddings.training, embeddings(ids)
        embeddings.training = True
        try:
            noisy = embeddings(ids)
        finally:
            embeddings.training = mode
        if not torch.equal(quiet, noisy):
            raise InvalidValue(
                f"{self.key} can't be combined with noise on the embeddings, such as NEFTune's, "
                f"got a hook on {type(embeddings).__name__} that acts in training: it would read "
                f"the row's shape in place of the batch's. Remove it, or set {self.key} to false."
            )


def _of_all_ranks(length: int, device: torch.device) -> int:
    """The largest ``length`` of all ranks, so that all of them compare in the same step."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return length
    largest = torch.tensor(length, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest.item())


def _next_limit(backbone: Any, longest: int) -> float:
    """The length up to which sequences show no more than those of length ``longest`` did.

    A window shows only in longer sequences.  Its name in a config is the model's own, so every
    number of the config may be one.
    """
    numbers = _numbers(backbone.config.to_dict())
    return min((number for number in numbers if number >= longest), default=math.inf)


def _numbers(values: Any) -> Iterator[int]:
    """The whole numbers in a config, and in what it nests."""
    if isinstance(values, Mapping):
        values = list(values.values())
    if isinstance(values, list | tuple):
        yield from chain.from_iterable(map(_numbers, values))
    elif isinstance(values, int) and not isinstance(values, bool):
        yield values


def _depends_on_padding(
    backbone: Any, layout: Layout, ids: Tensor, kwargs: Mapping[str, Any]
) -> bool:
    """Whether the model computes its frequencies from a length that the row doesn't have.

    Dynamic and long RoPE take the last position, which is of the padding if a batch is padded to
    more than its longest sequence.
    """
    if not _attached[backbone].rope_by_length:
        return False  # without waiting for the device
    positions = kwargs.get("position_ids")
    last = ids.shape[1] if positions is None else int(positions.max()) + 1
    return last != layout.longest


def _rope_by_length(values: Mapping[str, Any]) -> bool:
    return any(
        _rope_by_length(value)
        if isinstance(value, Mapping)
        else name in ("rope_type", "type") and ("dynamic" in str(value) or value == "longrope")
        for name, value in values.items()
    )


def _longest_pair(
    ids: Tensor, mask: Any, pairs: int, lengths: Sequence[int] | None
) -> tuple[dict[str, Any], Layout]:
    """The pair with the longest sequence: inputs of the backbone, and their layout."""
    if lengths is None:
        longest = mask.sum(1)
        pair = int(torch.maximum(*longest.chunk(2)).argmax())
        rows = torch.tensor([pair, pairs + pair], device=ids.device)
        width = int(longest[rows].max())
        few, real = ids[rows, :width], mask[rows, :width]
        return {"input_ids": few, "attention_mask": real}, layout_of_batch(few, real)
    sides = list(zip(lengths[:pairs], lengths[pairs:], strict=True))
    pair = max(range(pairs), key=lambda i: max(sides[i]))
    begins = sum(lengths[:pair]), sum(lengths[: pairs + pair])
    places = [torch.arange(length) for length in sides[pair]]
    taken = [begin + place for begin, place in zip(begins, places, strict=True)]
    few = ids[:, torch.cat(taken).to(ids.device)]
    given = {
        "input_ids": few,
        "attention_mask": None,
        "position_ids": torch.cat(places)[None].to(ids.device),
    }
    return given, layout_of_packed(few, sides[pair])


@contextmanager
def _without_traces(backbone: nn.Module) -> Iterator[None]:
    """Inside, a forward pass has no gradient and no dropout, and leaves nothing behind."""
    modes = {module: module.training for module in backbone.modules()}
    for module in modes:
        # Except bitsandbytes' 4-bit layers: on a CPU they repack their weights in eval mode, and
        # every gradient after that is wrong.
        four_bit = hasattr(getattr(module, "weight", None), "quant_state")
        module.training = four_bit and module.training
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        # Before 2.11 torch gives autocast's copies of the weights, made without a gradient, to the
        # forward pass around this one.
        torch.clear_autocast_cache()


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
    if sliding_window is None and _has_window(module):
        raise InvalidValue(
            f"{key} needs attention that is given its window, got none in {type(module).__name__}, "
            "although the model's config has one: it would come from the mask, which the row does "
            f"without. Set {key} to false."
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


def _has_window(module: Any) -> bool:
    """Whether the config of a layer's attention gives it a window."""
    config = getattr(module, "config", None)
    kinds, layer = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if kinds and layer is not None:
        return bool(kinds[layer] == "sliding_attention")
    window = getattr(config, "sliding_window", None)
    return window is not None and getattr(config, "use_sliding_window", True) is not False
