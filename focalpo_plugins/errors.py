"""The errors that this package raises with a message for the user.

Each is also one of Python's built-in errors: ``except ValueError`` catches a wrong value as usual.
"""

from __future__ import annotations


class FocalPOError(Exception):
    """Base class of all errors of this package."""


class InvalidValue(FocalPOError, ValueError):
    """A key, argument or file has a value that can't be trained with."""


class InvalidType(FocalPOError, TypeError):
    """An argument has a type that can't be used."""


class RunError(FocalPOError, RuntimeError):
    """A run would train something other than what was asked for, or another rank failed."""


class NotFinite(FocalPOError, FloatingPointError):
    """A pair's margin is NaN or infinite."""


def conflict(key: str, other: str, got: object, why: str, fix: str) -> InvalidValue:
    """The error for a key that can't be combined with another setting.

    Args:
        key: this package's key or flag, as the user writes it.
        other: what it can't be combined with, as the user writes it.
        got: the value of ``other``.
        why: the reason, without a full stop.
        fix: what to do, without a full stop.
    """
    return InvalidValue(f"{key} can't be combined with {other}, got {got!r}: {why}. {fix}.")
