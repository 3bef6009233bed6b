"""TRL: ``FocalPOTrainer`` and ``FocalPOConfig`` in place of ``DPOTrainer`` and ``DPOConfig``.

Each name loads on first use, so a host that pins another release of TRL can use the names for which
that release has the parts.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import FocalPOConfig
    from .exchange import check_host, check_loss_types
    from .reference_free import (
        FocalCPOConfig,
        FocalCPOTrainer,
        FocalORPOConfig,
        FocalORPOTrainer,
    )
    from .trainer import FocalPOTrainer, PairwiseLossMixin

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

__all__ = [
    "FocalCPOConfig",
    "FocalCPOTrainer",
    "FocalORPOConfig",
    "FocalORPOTrainer",
    "FocalPOConfig",
    "FocalPOTrainer",
    "PairwiseLossMixin",
    "check_host",
    "check_loss_types",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
