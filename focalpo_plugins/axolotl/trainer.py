"""Axolotl's DPO trainer with another pairwise loss."""

from __future__ import annotations

from collections.abc import Sequence

from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer

from ..registry import BoundLoss
from ..trl import PairwiseLossMixin


class AxolotlPairwiseTrainer(PairwiseLossMixin, AxolotlDPOTrainer):
    """Named in ``trainer_cls`` by the plugin, which also sets its loss once it is built."""

    def set_loss(
        self, loss: BoundLoss, packages: Sequence[str] = ("axolotl", "trl", "torch")
    ) -> None:
        super().set_loss(loss, packages)
        # Axolotl's own list, beside TRL's.
        self.tag_names: list[str] = [*self.tag_names, loss.name]
