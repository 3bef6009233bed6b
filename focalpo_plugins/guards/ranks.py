"""A check that runs on every rank and ends all of them together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..errors import FocalPOError, InvalidValue, RunError
from .messages import one_line


def together(check: Callable[[], None], gather: Callable[[Any], Sequence[Any]]) -> None:
    """Run ``check`` on every rank, and raise on all ranks if it raises on one.

    If one rank ended alone, the others would wait for it.

    Args:
        check: may raise any error.
        gather: returns what every rank has passed to it, in the order of the ranks.

    Raises:
        InvalidValue: an error of this package; all ranks raise the first rank's.
        RunError: any other error; the message names the rank and the error.
    """
    mine: Exception | None = None
    try:
        check()
    except Exception as error:  # any error, because the other ranks wait
        mine = error
    for rank, found in enumerate(gather(mine and (isinstance(mine, FocalPOError), one_line(mine)))):
        if found is not None:
            ours, words = found
            if ours:
                raise InvalidValue(words)
            raise RunError(f"on rank {rank}: {words}") from mine
