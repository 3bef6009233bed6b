"""The errors that this package raises with a message for the user.

Each is also one of Python's own, so ``except ValueError`` catches a wrong value as usual.
"""

from __future__ import annotations


class FocalPOError(Exception):
    """Base class of all errors of this package."""


class InvalidValue(FocalPOError, ValueError):
    """A key, argument or file has a value that can't be trained with."""


class InvalidType(FocalPOError, TypeError):
    """An argument has a type that can't be used."""


class RunError(FocalPOError, RuntimeError):
    """A run would train something else than was asked for, or another rank ended."""


class NotFinite(FocalPOError, FloatingPointError):
    """A pair's margin is NaN or infinite."""
