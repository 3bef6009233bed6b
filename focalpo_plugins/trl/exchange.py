"""Replaces TRL's loss by a loss of this package.

``DPOTrainer._compute_loss`` has no hook for the loss.  But its DPO-family branches call
``F.logsigmoid`` on the reward margin, and ``F`` is a name of the trainer's module.
``CPOTrainer.cpo_loss`` and ``ORPOTrainer.odds_ratio_loss`` do the same with their margins.  During
that call the name refers to a proxy whose ``logsigmoid`` is minus our loss.  The calls are counted,
and an unexpected count stops the run: if a TRL release moves its loss, it must never train its own
loss under another loss's name.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from types import ModuleType
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from trl import DPOTrainer

from ..errors import InvalidValue, RunError
from ..registry import BoundLoss
from ..releases import TESTED, install

# For each TRL loss type that a pairwise loss can replace, one entry for each log-sigmoid it calls:
# whether we apply the label smoothing. `robust` applies its own, with a second log-sigmoid.
_LOGSIGMOIDS: Mapping[str, Sequence[bool]] = {
    "sigmoid": (True,),
    "sigmoid_norm": (True,),
    "robust": (False, False),
    "sft": (),
}

_WHY_NOT = {
    "nca_pair": "its log-sigmoids are of each reward, not of the margin",
    "bco_pair": "its log-sigmoids are of each reward, not of the margin",
    "exo_pair": "its log-sigmoid is one term of a divergence, not the loss",
    "discopop": "its log-sigmoid is blended with an exponential",
    "aot": "it sorts the batch, and a sorted margin belongs to no pair",
    "aot_unpaired": "it sorts the batch, and a sorted margin belongs to no pair",
    "hinge": "it has no log-sigmoid of the margin",
    "ipo": "it has no log-sigmoid of the margin",
    "sppo_hard": "it has no log-sigmoid of the margin",
    "apo_zero": "it has no log-sigmoid of the margin",
    "apo_down": "it has no log-sigmoid of the margin",
}


def check_host(trainer: type = DPOTrainer, method: str = "_compute_loss") -> None:
    """Raise ``RuntimeError`` unless the installed TRL computes its loss where we exchange it.

    Args:
        trainer: TRL's trainer.
        method: its method that computes the loss.
    """
    if not calls_logsigmoid(trainer, method):
        what = trainer.__name__.removesuffix("Trainer")
        raise RunError(
            f"focalpo_plugins {version('focalpo_plugins')} does not know where trl "
            f"{version('trl')} computes its {what} loss: it must call F.logsigmoid in "
            f"{trainer.__name__}.{method}, as trl {TESTED['trl']} do. Install one of these."
        )


def calls_logsigmoid(trainer: type, method: str) -> bool:
    """Whether a trainer's method calls ``F.logsigmoid`` where :func:`loss_exchanged` finds it."""
    names = inspect.unwrap(getattr(trainer, method, check_host)).__code__.co_names
    return "logsigmoid" in names and getattr(_module_of(trainer), "F", None) is F


def check_loss_types(types: Sequence[str], key: str = "loss_type") -> None:
    """Raise ``ValueError`` unless a pairwise loss can replace each of TRL's loss types.

    At least one of them must not be ``sft``.
    """
    for loss_type in types:
        if str(loss_type) not in _LOGSIGMOIDS:
            why = _WHY_NOT.get(str(loss_type), "it is not known to be a log-sigmoid of the margin")
            raise InvalidValue(
                f"{key} must be one of {', '.join(_LOGSIGMOIDS)}, got {loss_type!r}: {why}. "
                "Remove it; 'sigmoid' is the default."
            )
    if not any(_LOGSIGMOIDS[str(loss_type)] for loss_type in types):
        raise InvalidValue(
            f"{key} must hold one of sigmoid, sigmoid_norm, robust, got {list(types)}: it has no "
            "preference loss. Add 'sigmoid' to 'sft'."
        )


def smoothing_of(types: Sequence[str], label_smoothing: float) -> list[float]:
    """For each log-sigmoid that DPO's loss types call, the label smoothing that our loss applies.

    It is 0 if TRL applies its own.
    """
    return [
        label_smoothing if ours else 0.0 for loss_type in types for ours in _LOGSIGMOIDS[loss_type]
    ]


def smoothing_of_both(label_smoothing: float) -> list[float | None]:
    """The same if the host computes the log-sigmoids of ``z`` and of ``-z``.

    It multiplies the second one by the label smoothing, even if that is 0.
    """
    return [0.0, 0.0 if label_smoothing else None]


@contextmanager
def loss_exchanged(
    loss: BoundLoss, smoothing: Sequence[float | None], asked: str, trainer: type = DPOTrainer
) -> Iterator[list[Tensor]]:
    """Replace TRL's loss by ``loss`` for one call of the trainer's loss method.

    Args:
        smoothing: for each log-sigmoid that TRL is expected to call, the label smoothing that our
            loss applies; None if TRL multiplies the result by 0, and then TRL's own is kept.
        asked: the setting that the number of calls follows from, for the message.
        trainer: TRL's trainer.

    Returns:
        The margins ``(B,)`` of each log-sigmoid that TRL called; the list is filled by the call.

    Raises:
        RuntimeError: TRL called an unexpected number of log-sigmoids.
    """
    margins: list[Tensor] = []

    def logsigmoid(z: Tensor) -> Tensor:
        margins.append(z)
        if len(margins) > len(smoothing):
            return z  # the count below stops the run
        label_smoothing = smoothing[len(margins) - 1]
        # Another package's loss may be infinite there, and 0 times infinity would be NaN.
        return F.logsigmoid(z) if label_smoothing is None else -loss(z, label_smoothing)

    with _logsigmoid_replaced(_module_of(trainer), logsigmoid):
        yield margins
    if len(margins) != len(smoothing):
        raise RunError(
            f"trl {version('trl')} called logsigmoid {len(margins)} times for {asked}, but "
            f"focalpo_plugins {version('focalpo_plugins')} expects {len(smoothing)}: its loss has "
            f"moved, and this step would not have trained {loss.name}. {install('trl')}"
        )


def _module_of(trainer: type = DPOTrainer) -> ModuleType:
    """The module in which TRL's trainer looks up ``F``, which we replace during its loss method."""
    return sys.modules[trainer.__module__]


#: Held by the one trainer whose loss method is running.
_SWAPPED = threading.Lock()


@contextmanager
def _logsigmoid_replaced(
    module: ModuleType, logsigmoid: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Give ``module.F`` another ``logsigmoid`` for this thread; one thread at a time.

    Raises:
        RuntimeError: the name doesn't refer to ``torch.nn.functional`` beforehand.
    """
    with _SWAPPED:
        if module.F is not F:
            raise RunError(
                f"{module.__name__}.F must be torch.nn.functional, got {module.F!r}: another "
                "package has replaced it, and would compute another loss. Remove that package."
            )
        module.F = _Functional(logsigmoid)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            # Restore the constant and not a saved value: it can't be another trainer's proxy.
            module.F = F  # type: ignore[attr-defined]


class _Functional:
    """``torch.nn.functional`` with another ``logsigmoid``, for the thread that made it.

    A plain ``DPOTrainer`` in another thread looks up the same name.
    """

    def __init__(self, logsigmoid: Callable[[Tensor], Tensor]) -> None:
        self._logsigmoid = logsigmoid
        self._thread = threading.get_ident()

    def logsigmoid(self, z: Tensor) -> Tensor:
        ours = threading.get_ident() == self._thread
        return self._logsigmoid(z) if ours else F.logsigmoid(z)

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)
