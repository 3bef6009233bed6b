"""Megatron in ms-swift, which can't train our losses: it would train DPO under their name."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from ..registry import losses
from .keys import types_of_host


def refusal(types: Sequence[str], words: Sequence[str] = ()) -> str | None:
    """Why Megatron can't train what is asked for; None if nothing of ours is.

    Args:
        types: the values of ``loss_type``.
        words: the command line.
    """
    known = [name for name in types if name in losses()]
    asked = [f"loss_type {name}" for name in known if name not in types_of_host()]
    asked += [word for word in words if word.startswith("--focalpo")]
    if not asked:
        return None
    return (
        f"megatron rlhf can't train a loss of this package, got {asked[0]}: its trainer computes "
        "DPO whatever loss_type says. Use swift rlhf, with deepspeed zero3 for large models."
    )


def refusing(host: type) -> type:
    """Megatron's arguments, which refuse our losses."""
    before: Any = host.__post_init__  # type: ignore[attr-defined]

    @functools.wraps(before)
    def __post_init__(self: Any) -> None:
        types = self.loss_type
        why = refusal([types] if isinstance(types, str) else list(types or ()))
        if why is not None:
            from ..errors import InvalidValue

            raise InvalidValue(why)
        before(self)

    host.__post_init__ = __post_init__  # type: ignore[attr-defined]
    return host
