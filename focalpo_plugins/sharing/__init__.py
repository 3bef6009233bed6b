"""Shared prompts in a transformers model, whichever host trains it."""

from .attention import check_layers
from .hooks import SharedPrompts, rope_depends_on_batch

__all__ = ["SharedPrompts", "check_layers", "rope_depends_on_batch"]
