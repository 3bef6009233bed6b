"""The Axolotl plugin: what Axolotl calls in a run with a loss of this package."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import axolotl.utils.config
from axolotl.integrations.base import BasePlugin, PluginManager
from transformers import TrainerCallback

from ..errors import InvalidValue, RunError
from ..guards.messages import say
from . import MARGINS, RL_AS_WRITTEN
from .autoload import patch
from .keys import margin, requested_loss
from .refusals import check_adapter, ignored


class Config(TrainerCallback):
    """Does nothing in a run; it carries the config to the trainer that it is a callback of."""

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg


def config_of(callbacks: Iterable[Any] | None) -> Any:
    """The config of a trainer that Axolotl builds with these callbacks; None without Axolotl."""
    return next((each.cfg for each in callbacks or () if isinstance(each, Config)), None)


class FocalPOPlugin(BasePlugin):
    """``plugins: [focalpo_plugins.axolotl.FocalPOPlugin]``; needed only if the autoload is off."""

    def get_input_args(self) -> str | None:
        plugins = PluginManager.get_instance().plugins.values()
        first = next((plugin for plugin in plugins if isinstance(plugin, FocalPOPlugin)), self)
        # The keys can be declared only once, but the plugin may be listed under two names.
        return "focalpo_plugins.axolotl.args.FocalPOArgs" if self is first else None

    def register(self, cfg: Any) -> None:
        """Make ``validate_config``, which Axolotl calls next, accept our losses.

        The config is the user's own object, and is not changed.
        """
        patch(axolotl.utils.config)

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[TrainerCallback]:
        """Give the config to the trainer, which Axolotl builds without it."""
        return [Config(cfg)]

    def pre_model_load(self, cfg: Any) -> None:
        """Refuse an adapter that Axolotl wouldn't load, and another plugin's trainer, which would
        run instead of this plugin's."""
        if requested_loss(cfg) is None:
            return
        check_adapter(cfg)
        for name, plugin in PluginManager.get_instance().plugins.items():
            trainer = plugin.get_trainer_cls(cfg)
            if trainer is not None:
                raise InvalidValue(
                    f"plugins lists {name}, whose trainer {trainer.__name__} would run instead of "
                    f"the one that trains rl: {cfg[RL_AS_WRITTEN]}. Remove one of the two."
                )

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Make sure that Axolotl built our trainer, with the loss that the config asks for.

        Raises:
            RuntimeError: Axolotl built another trainer, or a trainer with another loss.
        """
        loss = requested_loss(cfg)
        if loss is None:
            return
        module, _, needed = MARGINS[margin(cfg)][1].rpartition(".")
        if not isinstance(trainer, getattr(import_module(module), needed)):
            raise RunError(
                f"Axolotl built {type(trainer).__name__}, but rl: {loss.name} needs {needed}: it "
                "would have trained another loss. Remove what replaces the trainer (trainer_cls, "
                "another plugin)."
            )
        if trainer.pairwise_loss != loss:
            raise RunError(
                f"Axolotl built a trainer for {trainer.pairwise_loss}, but the config asks for "
                f"{loss}."
            )
        dropped = ignored(cfg)
        if dropped is not None and trainer.accelerator.is_main_process:
            say(f"warning: {dropped}")
        # Axolotl adds the data to the model card only for its own trainer class.
        trainer.dataset_tags = [d["path"] for d in cfg.datasets if not Path(d["path"]).is_dir()]
