"""Axolotl: ``rl: focalpo`` in the YAML.

Nothing here imports Axolotl before Axolotl asks for the plugin: Axolotl swallows a plugin's
ImportError, and the run would continue without our loss.
"""

from __future__ import annotations

from typing import Any

PLUGIN = "focalpo_plugins.axolotl.FocalPOPlugin"
#: The key that asks for the fused path, for any loss of this package.
FUSED = "focalpo_fused"
#: The key that asks for shared prompts, for any loss.
SHARED = "focalpo_shared_prompts"
#: The key that asks for balanced batches, for any loss.
BALANCED = "focalpo_balanced_batches"
#: The key that lets a run resume a checkpoint of another loss.
ALLOW_CHANGED = "focalpo_allow_changed"
#: The key that lets a run train even if more than half of the data has a fault.
ALLOW_DATA = "focalpo_allow_data"
#: The keys above; each is true or false.
SWITCHES = (FUSED, SHARED, BALANCED, ALLOW_CHANGED, ALLOW_DATA)
#: The key for the margin that a loss is computed from, for any loss.
MARGIN = "focalpo_margin"
#: The keys that all our losses share.
COMMON_KEYS = (*SWITCHES, MARGIN)
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
