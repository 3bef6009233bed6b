"""The keys that the plug-in adds to Axolotl's YAML: ``NAME_o`` for the option ``o`` of a loss, and
for whichever loss of ours is trained ``focalpo_fused``, ``focalpo_allow_changed`` and
``focalpo_allow_data``."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, create_model

from ..registry import losses
from . import ALLOW_CHANGED, ALLOW_DATA, FUSED


def _keys() -> dict[str, Any]:
    keys = {
        f"{loss.name}_{option}": (type(default) | None, None)
        for loss in losses().values()
        for option, default in loss.options.items()
    }
    return {
        **keys,
        FUSED: (bool | None, None),
        ALLOW_CHANGED: (bool | None, None),
        ALLOW_DATA: (bool | None, None),
        # Written by the plugin, not by the user: which loss `rl` asked for before it became `dpo`.
        "focalpo_loss": (str | None, None),
    }


FocalPOArgs: type[BaseModel] = create_model("FocalPOArgs", **_keys())
