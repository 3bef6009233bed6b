"""TRL: ``FocalPOTrainer`` and ``FocalPOConfig`` in place of ``DPOTrainer`` and ``DPOConfig``.

Each name loads on first use, so a host that brings another release of TRL can use what that release
has the parts for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MODULE_OF = {
    "FocalCPOConfig": ".reference_free",
    "FocalCPOTrainer": ".reference_free",
    "FocalORPOConfig": ".reference_free",
    "FocalORPOTrainer": ".reference_free",
    "FocalPOConfig": ".config",
    "FocalPOTrainer": ".trainer",
    "PairwiseLossMixin": ".trainer",
    "check_host": ".exchange",
    "check_loss_types": ".exchange",
}

__all__ = [*_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
