"""Axolotl's trainers without a reference, with another pairwise loss on their margin."""

from __future__ import annotations

from typing import Any

from axolotl.core.trainers import AxolotlCPOTrainer, AxolotlORPOTrainer

from ..trl.reference_free import CPOLossMixin, ORPOLossMixin
from .keys import margin
from .trainer import AxolotlPairwiseTrainer, OfConfig


class AxolotlPairwiseCPOTrainer(OfConfig, CPOLossMixin, AxolotlCPOTrainer):
    """Named in ``trainer_cls`` by the plugin for the margins ``simpo`` and ``cpo``."""

    _marker = AxolotlPairwiseTrainer._marker

    def _read(self, cfg: Any, given: dict[str, Any]) -> None:
        if margin(cfg) == "cpo":
            # Axolotl sets SimPO's loss type for every use of this trainer.
            given["args"].loss_type = "sigmoid"


class AxolotlPairwiseORPOTrainer(OfConfig, ORPOLossMixin, AxolotlORPOTrainer):
    """The same for the margin ``orpo``."""
