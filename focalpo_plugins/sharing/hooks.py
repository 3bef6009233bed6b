"""Shared prompts in a transformers model: two hooks on its backbone.

The hook before the backbone's forward turns a batch of pairs into one row
(:mod:`focalpo_plugins.compute.shared_prompts`).  The hook after it moves the last hidden states
back to their places in the batch.  The code around the backbone sees only the batch.  The hooks act
only inside :meth:`SharedPrompts.of`, so they don't change generation and saving.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakMethod, finalize, ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..compute.shared_prompts import Layout, kernel_for, layout_of_batch, layout_of_packed
from ..errors import InvalidValue, RunError, conflict
from .attention import KEYWORD, follow_layouts, refusal, row_inputs
from .comparison import REPLACED, compare, longest_pair, next_limit

# A row with this share of the padded batch's tokens, or more, is no faster: forming it takes about
# 5 % of the time of a batch that saves nothing.
_NO_FASTER = 0.95
_LONGER_THAN_ANY = 2**62  # a length, for a batch that has none


class _Hook:
    """A hook that keeps no object alive, and acts on one module.

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


class _Attached(NamedTuple):
    """Whose hooks a backbone has now, and whether its RoPE depends on the last position."""

    owner: ref[SharedPrompts]
    remove: finalize[[list[RemovableHandle]], SharedPrompts]
    rope_by_length: bool


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
        tokens_before: number of tokens in the batch that the row replaced, padding included.
    """

    def __init__(self, key: str, together: Callable[[Callable[[], None]], None]) -> None:
        self.key = key
        self.tokens = self.tokens_before = 0
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
            model: a model without wrappers; adapters' models may be around it.

        Raises:
            ValueError: its attention can't share prompts, or would compute something else.
        """
        if hasattr(model, "get_base_model"):  # PEFT's
            model = model.get_base_model()
        backbone = model.base_model
        before = _attached.get(backbone)
        if before is not None and before.owner() is self:
            return
        if backbone is model:
            raise refusal(
                self.key,
                f"needs a model made of a backbone and an output layer, got {type(model).__name__}",
            )
        follow_layouts(model, self.key)
        if before is not None:
            before.remove()
        ours = _Hook(self._before, backbone), _Hook(self._after, backbone)
        handles: list[RemovableHandle] = [
            backbone.register_forward_pre_hook(ours[0], with_kwargs=True),
            backbone.register_forward_hook(ours[1], with_kwargs=True),
        ]
        _attached[backbone] = _Attached(
            ref(self), finalize(self, _remove, handles), _rope_by_length(backbone.config.to_dict())
        )

    def describe(self, device: torch.device) -> str:
        """Text for the start-up line: prompts are shared, and by which attention on ``device``."""
        return f"prompts=shared attention={kernel_for(device)[0]!r}"

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
        if self._pairs is None or KEYWORD in kwargs:
            return None
        ids = args[0] if args else kwargs.get("input_ids")
        mask = kwargs.get("attention_mask")
        packed = self._lengths is not None
        if not isinstance(ids, Tensor) or len(ids) != (1 if packed else 2 * self._pairs):
            return None  # for example, a check on a few tokens
        self._refuse_other_inputs(ids, args, kwargs)
        self._check_on_all_ranks(backbone, ids, mask, kwargs)
        layout = self._layout_of(ids, mask)
        self._acted += 1
        self._calls = layout.calls
        saves = layout.tokens < _NO_FASTER * layout.tokens_before
        saves &= not _depends_on_padding(backbone, layout, ids, kwargs)
        if not self.tokens:
            self.tokens_before = layout.tokens_before
            self.tokens = layout.tokens if saves else self.tokens_before
        return ((), row_inputs(kwargs, layout)) if saves else None

    def _after(
        self, backbone: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        layout = kwargs.get(KEYWORD)
        if layout is None or self._pairs is None:
            return None
        layers = backbone.config.get_text_config().num_hidden_layers
        if layout.calls - self._calls != layers:
            raise refusal(
                self.key,
                f"needs {layers} calls of transformers' attention, one for each layer of "
                f"{type(backbone).__name__}, got {layout.calls - self._calls}: the model's layers "
                "attend in another way, or their attention was replaced",
            )
        if not isinstance(getattr(output, "last_hidden_state", None), Tensor):
            raise refusal(
                self.key,
                "needs a backbone that returns its last hidden states, got "
                f"{type(output).__name__} of {type(backbone).__name__}",
            )
        output.last_hidden_state = layout.states_of_batch(output.last_hidden_state)
        return output

    def _refuse_other_inputs(self, ids: Tensor, args: tuple[Any, ...], kwargs: Any) -> None:
        """Refuse inputs that a row can't have, such as one value for each token."""
        others = {f"argument {place}": value for place, value in enumerate(args) if place}
        others |= {name: value for name, value in kwargs.items() if name not in REPLACED}
        for name, value in others.items():
            by_token = isinstance(value, Tensor) and value.shape[:2] == ids.shape[:2]
            wanted = name.startswith("output_") and value
            if by_token or wanted or name == "past_key_values" and value is not None:
                shown = tuple(value.shape) if isinstance(value, Tensor) else value
                what, why = f"the model's input {name}", "a row of shared prompts has none"
                raise conflict(self.key, what, shown, why, f"Set {self.key} to false")

    def _layout_of(self, ids: Tensor, mask: Any) -> Layout:
        if self._layout is None or self._layout[0] is not ids:
            if self._lengths is not None:
                self._layout = ids, layout_of_packed(ids, self._lengths)
            elif not isinstance(mask, Tensor) or mask.shape != ids.shape:
                raise refusal(
                    self.key,
                    f"needs an attention mask of the batch's shape {tuple(ids.shape)}, got "
                    f"{getattr(mask, 'shape', mask)}",
                )
            else:
                self._layout = ids, layout_of_batch(ids, mask)
        return self._layout[1]

    def _check_on_all_ranks(self, backbone: nn.Module, ids: Tensor, mask: Any, kwargs: Any) -> None:
        """Compare where any rank's sequences may show more than those that were compared.

        Before that, all ranks end if one can't lay out its batch: the others would wait for it.
        """
        limit = self._compared.get(backbone, 0)  # the same on all ranks
        if limit == math.inf:
            return

        def lay_out() -> None:
            self._layout_of(ids, mask)

        try:
            longest = self._layout_of(ids, mask).longest
        except InvalidValue:  # raised again on all ranks
            longest = _LONGER_THAN_ANY
        longest = _of_all_ranks(longest, ids.device)
        if longest == _LONGER_THAN_ANY:
            self._together(lay_out)
        if longest > limit:
            self._together(lambda: self._compare(backbone, ids, mask, kwargs))
            self._compared[backbone] = next_limit(backbone, longest)

    def _compare(self, backbone: nn.Module, ids: Tensor, mask: Any, kwargs: Any) -> None:
        """Compare the longest pair's hidden states with those of the model's own attention."""
        pairs, self._pairs = self._pairs, None  # so that the hooks don't act
        assert pairs is not None
        try:
            compare(self.key, backbone, kwargs, *longest_pair(ids, mask, pairs, self._lengths))
        finally:
            self._pairs = pairs


def _of_all_ranks(length: int, device: torch.device) -> int:
    """The largest ``length`` of all ranks, so that all of them compare in the same step."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return length
    largest = torch.tensor(length, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest.item())


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


def rope_depends_on_batch(config: Any, max_length: int | None) -> bool:
    """Whether a model's frequencies depend on the longest sequence of a batch.

    Those of dynamic and long RoPE do, if a sequence is longer than those that the model was first
    trained on.

    Args:
        config: transformers' config of the model.
        max_length: the number of tokens that sequences are cut to; None if they aren't cut.
    """
    text = config.get_text_config()
    if not _rope_by_length(text.to_dict()):
        return False
    lengths = [text.max_position_embeddings, *_first_lengths(text.to_dict())]
    return max_length is None or max_length > min(lengths)


def _first_lengths(values: Mapping[str, Any]) -> Iterator[int]:
    """The lengths that a config says the model was first trained on; each kind of layer has one."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _first_lengths(value)
        elif name == "original_max_position_embeddings" and value is not None:
            yield value


def _rope_by_length(values: Mapping[str, Any]) -> bool:
    return any(
        _rope_by_length(value)
        if isinstance(value, Mapping)
        else name in ("rope_type", "type") and ("dynamic" in str(value) or value == "longrope")
        for name, value in values.items()
    )
