"""Axolotl's DPO trainer with another pairwise loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
from axolotl.integrations.base import PluginManager

from ..registry import BoundLoss
from ..trl import PairwiseLossMixin
from .plugin import requested_loss


class AxolotlPairwiseTrainer(PairwiseLossMixin, AxolotlDPOTrainer):
    """Named in ``trainer_cls`` by the plugin; trains the loss that Axolotl's config asks for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Axolotl hands its config to no trainer, and `axolotl evaluate` calls no hook that has it.
        cfg = PluginManager.get_instance().cfg
        loss = None if cfg is None else requested_loss(cfg)
        if loss is not None:
            self.set_loss(loss)

    def set_loss(
        self, loss: BoundLoss, packages: Sequence[str] = ("axolotl", "trl", "torch")
    ) -> None:
        super().set_loss(loss, packages)
        # Axolotl's own list, beside TRL's.
        self.tag_names: list[str] = [*self.tag_names, loss.name]
