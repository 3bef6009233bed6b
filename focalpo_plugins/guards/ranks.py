"""The interface of a host's ranks, and checks that end all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from torch import Tensor

from ..errors import FocalPOError, InvalidValue, RunError
from .messages import one_line


class Ranks(Protocol):
    """A host's collectives; each is called on every rank, in the same order."""

    @property
    def rank(self) -> int:
        """This process's number among all of them."""

    @property
    def count(self) -> int:
        """The number of processes."""

    def reduce(self, values: Tensor, how: Literal["sum", "max"]) -> Tensor:
        """The sum or the maximum over the ranks of each number."""

    def gather(self, thing: Any) -> Sequence[Any]:
        """What each rank has passed, in the order of the ranks."""


def together(ranks: Ranks, check: Callable[[], Any]) -> None:
    """Run ``check`` on every rank, and raise on all ranks if it raises on one.

    If only one rank ended, the others would wait for it.

    Args:
        check: may raise any error.

    Raises:
        InvalidValue: an error of this package; all ranks raise the first rank's.
        RunError: any other error; the message names the rank and the error.
    """
    mine: Exception | None = None
    try:
        check()
    except Exception as error:  # any error, because the other ranks wait
        mine = error
    found = ranks.gather(mine and (isinstance(mine, FocalPOError), one_line(mine)))
    for rank, wrong in enumerate(found):
        if wrong is not None:
            ours, words = wrong
            if ours:
                raise InvalidValue(words)
            raise RunError(f"on rank {rank}: {words}") from mine


def on_first(ranks: Ranks, do: Callable[[], Any]) -> None:
    """Run ``do`` on the first rank only; all ranks raise if it raises, as in :func:`together`."""
    together(ranks, do if ranks.rank == 0 else lambda: None)
