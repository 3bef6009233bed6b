"""Shared prompts in a transformers model, whichever host trains it."""

from .attention import check_layers
from .hooks import SharedPrompts

__all__ = ["SharedPrompts", "check_layers"]
