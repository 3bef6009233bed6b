"""OpenRLHF's ranks, and checks on all of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from ..errors import InvalidValue
from ..guards import last_line
from ..guards.messages import say
from ..guards.ranks import on_first, together


class StrategyRanks:
    """The ranks of OpenRLHF's ``strategy``."""

    def __init__(self, strategy: Any) -> None:
        self._strategy = strategy

    @property
    def rank(self) -> int:
        return torch.distributed.get_rank()

    @property
    def count(self) -> int:
        return torch.distributed.get_world_size()

    def reduce(self, values: Tensor, how: Literal["sum", "max"]) -> Tensor:
        reduced: Tensor = self._strategy.all_reduce(values, how)
        return reduced

    def gather(self, thing: Any) -> list[Any]:
        found: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, thing)
        return found


def on_rank_0(strategy: Any, do: Callable[[], None]) -> None:
    """Run ``do`` on the first rank; if it raises, all ranks end."""
    with _ended_together(strategy):
        on_first(StrategyRanks(strategy), do)


def on_all_ranks(strategy: Any, check: Callable[[], None]) -> None:
    """Run ``check`` on every rank; if it raises on one rank, all ranks end.

    The first rank prints the message of an error of this package.  Any other error is raised.
    """
    with _ended_together(strategy):
        together(StrategyRanks(strategy), check)


@contextmanager
def _ended_together(strategy: Any) -> Iterator[None]:
    try:
        yield
    except InvalidValue as error:
        stop_all(strategy, str(error))


def stop_all(strategy: Any, why: str) -> NoReturn:
    """End this rank, as all other ranks do; the first one prints why."""
    if strategy.is_rank_0():
        say(why)
        last_line.repeat(why)
    sys.exit(1)
