"""Axolotl's DPO trainer with another pairwise loss."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
from datasets import Dataset
from pyarrow.compute import list_slice
from transformers import TrainerCallback

from ..errors import RunError
from ..guards.faults import Fault
from ..registry import BoundLoss
from ..trl.pairwise import TRL
from ..trl.trainer import PairwiseLossMixin
from ..yaml_keys import ALLOW_CHANGED, ALLOW_DATA
from .conversations import text_faults
from .keys import KEYS, betas, fused_key, requested_loss
from .plugin import config_of


class _OneBosTrainer(AxolotlDPOTrainer):
    """Axolotl's trainer, with one BOS instead of two.

    Axolotl's strategies render text, and TRL tokenizes it.  If the chat template writes a BOS, as
    Llama-3's does, the tokenizer puts another one before it.  Axolotl has a method that removes the
    second one, but TRL no longer calls it.
    """

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, *more: Any, **named: Any
    ) -> Any:
        dataset = super()._prepare_dataset(dataset, processing_class, args, *more, **named)
        bos = getattr(processing_class, "tokenizer", processing_class).bos_token_id
        # Every row is checked: in a mix of data sets, some render a BOS and some don't.
        if bos is None or isinstance(dataset, Dataset) and not _any_doubled(dataset, bos):
            return dataset
        with args.main_process_first():
            return dataset.map(_with_one_bos, fn_kwargs={"bos": bos})


class OfConfig:
    """Takes the loss and its settings from the config that Axolotl builds the trainer for."""

    _marker: str | None
    _switch_on: Callable[[Collection[str]], None]
    tag_names: list[str]
    _host_saves = True
    _keys: Mapping[str, str] = {}  # the config's names of TRL's arguments, if they differ

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Not PluginManager's config, which is the last one that was loaded.
        self._cfg = cfg = config_of(kwargs.get("callbacks"))
        loss = None if cfg is None else requested_loss(cfg)
        if loss is None:
            raise RunError(
                f"{type(self).__name__} must be built by Axolotl for a config with a loss of "
                f"focalpo_plugins, got {'no' if cfg is None else 'another'} config. Load one with "
                "rl: focalpo."
            )
        beta = next(iter(betas(cfg)), "rl_beta")
        keys = {**TRL.keys, "max_length": "sequence_len", **self._keys, "beta": beta}
        packages = ("axolotl", *TRL.packages)
        self._host = replace(
            TRL,
            name="Axolotl",
            packages=packages,
            allow_changed=f"{ALLOW_CHANGED}: true",
            allow_data=f"{ALLOW_DATA}: true",
            keys=keys,
        )
        self._read(cfg, kwargs)
        self._switch_on(KEYS.asked(loss, cfg.get).on)
        super().__init__(*args, **kwargs)
        self.set_loss(loss)

    def _read(self, cfg: Any, given: dict[str, Any]) -> None:
        """Read the settings that only one margin has.

        Args:
            given: the trainer's arguments by name.
        """

    def _faults(self, dataset: Any, tokenizer: Any, evaluation: bool) -> list[Fault]:
        """The faults of the config's rows as Axolotl has rendered them."""
        host: Any = super()
        return [
            *host._faults(dataset, tokenizer, evaluation),
            *text_faults(self._cfg, tokenizer, evaluation, self._marker),
        ]

    def set_loss(self, loss: BoundLoss) -> None:
        super().set_loss(loss)  # type: ignore[misc]
        # Axolotl has its own list of tags beside TRL's.
        self.tag_names = [*self.tag_names, loss.name]


class _SetAside(TrainerCallback):
    """Hides all objects from the garbage collector when training begins."""

    done = False

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        if gc.get_freeze_count():  # the user has frozen some: unfreezing later would free them too
            return
        gc.collect()
        gc.freeze()
        self.done = True

    def undo(self) -> None:
        if self.done:
            gc.unfreeze()


class AxolotlPairwiseTrainer(OfConfig, PairwiseLossMixin, _OneBosTrainer):
    """Named in ``trainer_cls`` by the plugin; trains the loss that Axolotl's config asks for."""

    # Axolotl loads the reference itself, and evaluates only the data of its config.
    _keeps_reference = False
    _keys = {
        key: f"dpo_{key}"
        for key in ("label_smoothing", "loss_type", "loss_weights", "use_weighting")
    }
    # Axolotl's chat_template strategies render an answer after this text, and cut the text off.
    _marker = "[[dummy_message]]"

    def _read(self, cfg: Any, given: dict[str, Any]) -> None:
        self._fused_key = fused_key(cfg)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Axolotl's training, which before 0.21 collects garbage after every micro-batch.

        Each collection looks at all objects of the process, and Axolotl's imports make hundreds of
        thousands.  The objects that exist before the first step are hidden until training ends.
        """
        set_aside = _SetAside()
        self.add_callback(set_aside)
        try:
            return super().train(*args, **kwargs)
        finally:
            set_aside.undo()
            self.remove_callback(set_aside)


def _any_doubled(dataset: Dataset, bos: int) -> bool:
    starts = dataset.select_columns(["prompt_ids"]).with_format("arrow").iter(batch_size=1000)
    return any([bos, bos] in list_slice(rows["prompt_ids"], 0, 2).to_pylist() for rows in starts)


def _with_one_bos(row: dict[str, Any], bos: int) -> dict[str, Any]:
    """The row without the first of two BOS; a row with one BOS is unchanged."""
    if row["prompt_ids"][:2] == [bos, bos]:
        row["prompt_ids"] = row["prompt_ids"][1:]
    return row
