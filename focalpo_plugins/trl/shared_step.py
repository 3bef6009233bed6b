"""Shared prompts in a TRL trainer, for every batch of pairs that policy or reference gets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from ..guards.ranks import together
from ..hf_trainer import RANKS
from ..sharing import SharedPrompts
from .parts import check_shared_parts

if TYPE_CHECKING:
    # The class of super() in the mixin's methods, by the order of the bases.
    from transformers import Trainer as _Host
else:
    _Host = object


class SharedStepMixin(_Host):
    """The part of a TRL trainer of pairs that shares their prompts."""

    ref_model: Any = None
    _shared_key: str | None = None  # the key that asked for shared prompts, for messages

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._sharing: SharedPrompts | None = None
        if self._shared_key is not None:
            # Before TRL's __init__, which may precompute the reference.
            self._sharing = SharedPrompts(self._shared_key, partial(together, RANKS))
        super().__init__(*args, **kwargs)
        if self._sharing is not None:
            built = {
                "model": self.accelerator.unwrap_model(self.model),
                "processing_class": self.processing_class,
            }
            check_shared_parts(built, self.args, self._sharing.key)
            self._attach(self._sharing)

    def _ask_for_sharing(self, given: Mapping[str, Any], config: Any) -> None:
        """Keep whether a config asks for shared prompts, and refuse what can't be combined.

        Args:
            given: the trainer's arguments by name.
            config: TRL's config, one of these arguments.
        """
        if self._shared_key is None and getattr(config, "focalpo_shared_prompts", False):
            self._shared_key = "focalpo_shared_prompts"
        if self._shared_key is not None:
            check_shared_parts(given, config, self._shared_key)

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

    def _tokens_of_step(self) -> tuple[int, int]:
        """Tokens that the policy computed for the last batch, and tokens of the padded batch."""
        return (self._sharing.tokens, self._sharing.tokens_before) if self._sharing else (0, 0)

    def _said_of_sharing(self) -> str:
        """What the start-up line says of shared prompts, after a space; empty without them."""
        sharing = self._sharing
        return "" if sharing is None else f" {sharing.describe(self.accelerator.device)}"
