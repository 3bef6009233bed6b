"""FocalPO, a preference-optimisation loss, for the fine-tuning stacks people already run.

The names below load on first use: importing this package imports neither torch nor a host.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .hookspecs import hookimpl
    from .loss import VARIANTS, FocalPOLoss, focalpo_loss, focalpo_weight, reversal_margin
    from .trl import FocalPOConfig, FocalPOTrainer

_MODULE_OF = {
    "FocalPOConfig": ".trl",
    "FocalPOLoss": ".loss",
    "FocalPOTrainer": ".trl",
    "VARIANTS": ".loss",
    "focalpo_loss": ".loss",
    "focalpo_weight": ".loss",
    "hookimpl": ".hookspecs",
    "reversal_margin": ".loss",
}

__all__ = [
    "VARIANTS",
    "FocalPOConfig",
    "FocalPOLoss",
    "FocalPOTrainer",
    "focalpo_loss",
    "focalpo_weight",
    "hookimpl",
    "reversal_margin",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("focalpo_plugins")
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
