"""FocalPO, a preference loss, for Axolotl, TRL, OpenRLHF, LLaMA-Factory and ms-swift.

==================================  ==============================================================
``focalpo_loss(margins, gamma)``    loss of each pair, from its reward margin
``focalpo_weight(margins, gamma)``  the factor by which that loss multiplies DPO's gradient
``reversal_margin(gamma)``          the margin below which a pair is pushed the wrong way
``gamma_at(progress, start, end)``  gamma at a point of a run that changes gamma
``FocalPOLoss``                     the loss as a ``torch.nn.Module``
``FocalPOTrainer``                  TRL's ``DPOTrainer`` with this loss; its args are a
                                    ``FocalPOConfig``
``FocalCPOTrainer``                 the same for ``CPOTrainer`` (CPO, SimPO); ``FocalCPOConfig``
``FocalORPOTrainer``                the same for ``ORPOTrainer``; ``FocalORPOConfig``
``check(trainer)``                  prints what a trainer of TRL will train on, and what it takes
``hookimpl``                        marks the hook with which a package adds its own loss
``FocalPOError``                    the base class of the errors of this package
``VARIANTS``, ``SCHEDULES``         the names of the factors, and of the schedules of gamma
==================================  ==============================================================

See ``help(focalpo_plugins.focalpo_loss)`` and so on for details. Axolotl (``rl: focalpo``),
OpenRLHF (``--loss focalpo``), LLaMA-Factory (``pref_loss: focalpo``) and ms-swift (``--loss_type
focalpo``) need no import from here. The names load on first use, so importing this package imports
neither torch nor a host.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cli.check import check
    from .errors import FocalPOError
    from .hookspecs import hookimpl
    from .loss import (
        SCHEDULES,
        VARIANTS,
        FocalPOLoss,
        focalpo_loss,
        focalpo_weight,
        gamma_at,
        reversal_margin,
    )
    from .trl import FocalPOConfig, FocalPOTrainer
    from .trl.reference_free import (
        FocalCPOConfig,
        FocalCPOTrainer,
        FocalORPOConfig,
        FocalORPOTrainer,
    )

_MODULE_OF = {
    "FocalCPOConfig": ".trl.reference_free",
    "FocalCPOTrainer": ".trl.reference_free",
    "FocalORPOConfig": ".trl.reference_free",
    "FocalORPOTrainer": ".trl.reference_free",
    "FocalPOConfig": ".trl",
    "FocalPOError": ".errors",
    "FocalPOLoss": ".loss",
    "FocalPOTrainer": ".trl",
    "SCHEDULES": ".loss",
    "VARIANTS": ".loss",
    "check": ".cli.check",
    "focalpo_loss": ".loss",
    "focalpo_weight": ".loss",
    "gamma_at": ".loss",
    "hookimpl": ".hookspecs",
    "reversal_margin": ".loss",
}

__all__ = [
    "SCHEDULES",
    "VARIANTS",
    "FocalCPOConfig",
    "FocalCPOTrainer",
    "FocalORPOConfig",
    "FocalORPOTrainer",
    "FocalPOConfig",
    "FocalPOError",
    "FocalPOLoss",
    "FocalPOTrainer",
    "check",
    "focalpo_loss",
    "focalpo_weight",
    "gamma_at",
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
    # If TRL is missing, its names are left out: help() reads every listed name.
    listed = [name for name in __all__ if not _MODULE_OF[name].startswith(".trl") or _has_trl()]
    return sorted([*globals(), *listed, "__version__"])


def _has_trl() -> bool:
    return find_spec("trl") is not None
