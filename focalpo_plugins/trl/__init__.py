"""TRL: ``FocalPOTrainer`` and ``FocalPOConfig`` in place of ``DPOTrainer`` and ``DPOConfig``.

The trainers and configs for CPO, SimPO and ORPO load on first use.
"""

from typing import Any

from .config import FocalPOConfig
from .seam import check_host, check_loss_types
from .trainer import FocalPOTrainer, PairwiseLossMixin

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
    if name in __all__:
        from . import reference_free

        return getattr(reference_free, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
