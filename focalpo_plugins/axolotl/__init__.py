"""Axolotl: ``rl: focalpo`` in the YAML.

Nothing here imports Axolotl before Axolotl asks for the plugin: Axolotl swallows a plugin's
ImportError, and the run would continue without our loss.
"""

from __future__ import annotations

from typing import Any

PLUGIN = "focalpo_plugins.axolotl.FocalPOPlugin"
#: Written by the plugin, not by the user: the loss that `rl` named before Axolotl's own value.
RL_AS_WRITTEN = "focalpo_rl"
#: For each margin, Axolotl's value of `rl` that computes it, and our trainer.
MARGINS = {
    "dpo": ("dpo", "focalpo_plugins.axolotl.trainer.AxolotlPairwiseTrainer"),
    "simpo": ("simpo", "focalpo_plugins.axolotl.reference_free.AxolotlPairwiseCPOTrainer"),
    "cpo": ("simpo", "focalpo_plugins.axolotl.reference_free.AxolotlPairwiseCPOTrainer"),
    "orpo": ("orpo", "focalpo_plugins.axolotl.reference_free.AxolotlPairwiseORPOTrainer"),
}
TRAINERS = frozenset(trainer for _, trainer in MARGINS.values())


def __getattr__(name: str) -> Any:
    if name == "FocalPOPlugin":
        from .plugin import FocalPOPlugin

        return FocalPOPlugin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
