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
OF_ANY = (FUSED, SHARED, ALLOW_CHANGED, ALLOW_DATA)
#: Written by the plugin, not by the user: which loss `rl` asked for before it became `dpo`.
REQUESTED = "focalpo_rl"
TRAINER = "focalpo_plugins.axolotl.trainer.AxolotlPairwiseTrainer"


def __getattr__(name: str) -> Any:
    if name == "FocalPOPlugin":
        from .plugin import FocalPOPlugin

        return FocalPOPlugin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
