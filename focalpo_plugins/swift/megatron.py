"""Megatron in ms-swift, which can't train our losses: it would train DPO under their name."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any


def patch(module: ModuleType | None) -> None:
    """Refuse our losses: on the command line before it runs, or in Megatron's arguments.

    Args:
        module: that of Megatron's arguments; None if the command is about to run.
    """
    if module is not None:
        refuse(module.MegatronRLHFArguments)
        return
    why = refusal_of_words(sys.argv[1:])
    if why is not None:
        raise SystemExit(f"focalpo_plugins: {why}")


def refusal_of_words(words: Sequence[str]) -> str | None:
    """Why Megatron can't train what a command line asks for; None if it doesn't ask for our losses.

    The keys of a YAML are words here too.
    """
    found = next((word for word in words if word.startswith("--focalpo")), None)
    flag = ""
    for word in words:
        flag, _, value = word.partition("=") if word.startswith("--") else (flag, "", word)
        if flag in ("--loss_type", "--loss-type") and value == "focalpo":
            found = found or f"{flag} focalpo"
    return None if found is None else _why(found)


def refuse(arguments: Any) -> None:
    """Have Megatron's arguments refuse our losses."""
    before = arguments.__post_init__

    @functools.wraps(before)
    def __post_init__(self: Any) -> None:
        from ..errors import InvalidValue
        from .keys import ours_among

        types = self.loss_type
        names = ours_among([types] if isinstance(types, str) else list(types or ()))
        if names:
            raise InvalidValue(_why(f"loss_type {names[0]}"))
        before(self)

    arguments.__post_init__ = __post_init__


def _why(asked: str) -> str:
    return (
        f"megatron rlhf can't train a loss of this package, got {asked}: its trainer computes DPO "
        "whatever loss_type says. Use swift rlhf, with deepspeed zero3 for large models."
    )
