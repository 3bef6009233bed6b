"""Shared prompts and balanced batches in a trainer of TRL, or in one that derives from TRL's."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from ..balanced import Cost
from ..guards.ranks import together
from ..hf_trainer import RANKS
from ..sharing import SharedPrompts
from ..yaml_keys import ALLOW_CHANGED, ALLOW_DATA, BALANCED, SHARED
from .data import unpadded
from .parts import check_balanced_parts, check_shared_parts

if TYPE_CHECKING:
    # The class of super() in the mixin's methods, by the order of the bases.
    from transformers import Trainer as _Host
else:
    _Host = object


class SharedStepMixin(_Host):
    """The part of such a trainer that shares their prompts, and balances its batches."""

    ref_model: Any = None
    _shared_key: str | None = None  # the key that asked for shared prompts, for messages
    _balanced_key: str | None = None  # the same of balanced batches
    _batch: Mapping[str, Any]  # the last one that was trained or evaluated

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._sharing: SharedPrompts | None = None
        if self._shared_key is not None:
            # Before TRL's __init__, which may precompute the reference.
            self._sharing = SharedPrompts(self._shared_key, partial(together, RANKS))
        super().__init__(*args, **kwargs)
        built = {
            "model": self.accelerator.unwrap_model(self.model),
            "processing_class": self.processing_class,
        }
        if self._sharing is not None:
            check_shared_parts(built, self.args, self._sharing.key)
            self._attach(self._sharing)
        if self._balanced_key is not None:
            check_balanced_parts(built, self.args, self._balanced_key)

    def _switch_on(self, keys: Collection[str]) -> None:
        """Do what the keys ask for; before ``__init__``."""
        self._shared_key = SHARED if SHARED in keys else None
        self._balanced_key = BALANCED if BALANCED in keys else None
        self._allow_changed, self._allow_data = ALLOW_CHANGED in keys, ALLOW_DATA in keys

    def _ask(self, given: Mapping[str, Any], config: Any) -> None:
        """Note which of the two a config asks for, and refuse what can't be combined with them.

        Args:
            given: the trainer's arguments by name.
            config: TRL's config, one of these arguments.
        """
        if self._shared_key is None and getattr(config, SHARED, False):
            self._shared_key = SHARED
        if self._shared_key is not None:
            check_shared_parts(given, config, self._shared_key)
        if self._balanced_key is None and getattr(config, BALANCED, False):
            self._balanced_key = BALANCED
        if self._balanced_key is not None:
            check_balanced_parts(given, config, self._balanced_key)

    def _attach(self, sharing: SharedPrompts) -> None:
        for wrapper in (self.model, self.ref_model):
            if wrapper is not None:
                sharing.attach(self.accelerator.unwrap_model(wrapper))

    @contextmanager
    def _prompts_shared(self, pairs: int) -> Iterator[None]:
        """Inside, policy and reference share the prompts of a batch, if that is asked for."""
        if self._sharing is None:
            yield
            return
        self._attach(self._sharing)  # a reference that was set aside may be back
        with self._sharing.of(pairs):
            yield

    # Most hosts collate all chosen sequences, and after them all rejected ones.
    def _pairs_of_step(self) -> list[tuple[list[int], list[int]]]:
        whole = unpadded(self._batch["input_ids"], self._batch["attention_mask"])
        pairs = len(whole) // 2
        return list(zip(whole[:pairs], whole[pairs:], strict=True))

    def _places(self) -> int:
        """The tokens of the last batch, padding included."""
        return int(self._batch["input_ids"].numel())

    def _cost(self) -> Cost:
        return "padded" if self._sharing is None else "unpadded_backbone"

    def _tokens_of_step(self) -> tuple[int, int]:
        """Tokens that the policy computed for the last batch, and tokens of the padded batch."""
        if self._sharing is not None:
            return self._sharing.tokens, self._sharing.tokens_before
        return (0 if self._balanced_key is None else self._places()), 0

    def _said_of_batches(self) -> str:
        """The start-up line's text about the two, after a space; empty without them."""
        sharing = self._sharing
        said = [] if sharing is None else [sharing.describe(self.accelerator.device)]
        said += [] if self._balanced_key is None else ["batches=balanced"]
        return "".join(f" {words}" for words in said)
