"""OpenRLHF: ``--loss focalpo`` on the command line of ``openrlhf.cli.train_dpo``.

Nothing here imports OpenRLHF before OpenRLHF's own command does: a machine without CUDA has to be
prepared for it first (:mod:`.cpu`).
"""

from __future__ import annotations

from typing import Any

COMMAND = "openrlhf.cli.train_dpo"


def __getattr__(name: str) -> Any:
    if name == "PairwiseDPOLoss":
        from .loss import PairwiseDPOLoss

        return PairwiseDPOLoss
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
