"""Axolotl's DPO trainer with another pairwise loss."""

from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer

from ..trl import PairwiseLossMixin


class AxolotlPairwiseTrainer(PairwiseLossMixin, AxolotlDPOTrainer):
    """Named in ``trainer_cls`` by the plugin, which also sets its loss once it is built."""

    def set_loss(self, loss, packages=("axolotl", "trl", "torch")) -> None:  # type: ignore[no-untyped-def]
        super().set_loss(loss, packages)
        self.tag_names = [*self.tag_names, loss.name]  # Axolotl's own list, beside TRL's
