"""Axolotl's DPO trainer with another pairwise loss."""

from __future__ import annotations

from typing import Any

from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer

from ..registry import BoundLoss
from ..trl import PairwiseLossMixin
from . import ALLOW_CHANGED
from .plugin import FocalPOPlugin, fused_key, requested_loss


class AxolotlPairwiseTrainer(PairwiseLossMixin, AxolotlDPOTrainer):
    """Named in ``trainer_cls`` by the plugin; trains the loss that Axolotl's config asks for."""

    _packages = ("axolotl", "trl", "torch")
    # Axolotl loads the reference itself, and evaluates no data but that of its config.
    _keeps_reference = False
    _written = {
        "beta": "rl_beta",
        "label_smoothing": "dpo_label_smoothing",
        "loss_type": "dpo_loss_type",
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Not PluginManager's config: that is the one which was loaded last.
        cfg = FocalPOPlugin.building
        loss = None if cfg is None else requested_loss(cfg)
        if loss is None:
            raise RuntimeError(
                f"{type(self).__name__} must be built by Axolotl for a config that asks for a loss "
                f"of ours, got {'none' if cfg is None else 'another'}. Load one with rl: focalpo."
            )
        self._fused = fused_key(cfg)
        self._allow_changed = bool(cfg.get(ALLOW_CHANGED))
        super().__init__(*args, **kwargs)
        self.set_loss(loss)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, *more: Any, **named: Any
    ) -> Any:
        """The host's own, with one BOS where it leaves two.

        Axolotl's strategies render text, TRL tokenizes it, and where the chat template writes a BOS
        (Llama-3's does) the tokenizer puts another before it.  Axolotl means to take the second
        out in a method that TRL no longer calls.
        """
        dataset = super()._prepare_dataset(dataset, processing_class, args, *more, **named)
        bos = getattr(processing_class, "tokenizer", processing_class).bos_token_id
        first: dict[str, Any] = next(iter(dataset), {})
        if bos is None or first.get("prompt_ids", [])[:2] != [bos, bos]:
            return dataset
        with args.main_process_first():
            return dataset.map(_with_one_bos, fn_kwargs={"bos": bos})

    def set_loss(self, loss: BoundLoss) -> None:
        super().set_loss(loss)
        # Axolotl's own list, beside TRL's.
        self.tag_names: list[str] = [*self.tag_names, loss.name]


def _with_one_bos(row: dict[str, Any], bos: int) -> dict[str, Any]:
    """The row as it is, but for the first of two BOS."""
    if row["prompt_ids"][:2] == [bos, bos]:
        row["prompt_ids"] = row["prompt_ids"][1:]
    return row
