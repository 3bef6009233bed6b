"""Axolotl: ``rl: focalpo`` in the YAML.

Nothing here imports Axolotl before it asks for the plugin: Axolotl swallows a plugin's
ImportError, and the run would go on without us.
"""

from __future__ import annotations

from typing import Any

PLUGIN = "focalpo_plugins.axolotl.FocalPOPlugin"
#: The key that asks for the fused path, under any loss of ours.
FUSED = "focalpo_fused"
#: The key that asks for shared prompts, under any loss of ours.
SHARED = "focalpo_shared_prompts"
#: The key that lets a run go on from a checkpoint of another loss.
ALLOW_CHANGED = "focalpo_allow_changed"
#: The key that lets a run go on with data that mostly can't be learnt from.
ALLOW_DATA = "focalpo_allow_data"
#: All of these, each true or false.
SWITCHES = (FUSED, SHARED, ALLOW_CHANGED, ALLOW_DATA)
#: The key for the margin that a loss is of, under any loss of ours.
MARGIN = "focalpo_margin"
#: Those of any loss of ours.
OF_ANY = (*SWITCHES, MARGIN)
#: Written by the plugin, not by the user: which loss `rl` asked for before it became Axolotl's own.
REQUESTED = "focalpo_rl"
#: For each margin, the `rl` of Axolotl's that makes it, and the trainer of ours.
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
