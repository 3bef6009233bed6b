"""The keys that the plug-in adds to Axolotl's YAML: ``NAME_o`` for the option ``o`` of a loss, and
for whichever loss of ours is trained ``focalpo_fused``, ``focalpo_allow_changed`` and
``focalpo_allow_data``."""

from __future__ import annotations

from typing import Any

from axolotl.utils.schemas.config import AxolotlInputConfig
from pydantic import BaseModel, create_model

from ..registry import losses
from . import ALLOW_CHANGED, ALLOW_DATA, FUSED


def _keys() -> dict[str, Any]:
    keys = {
        # A default of None doesn't tell what else it may be.
        f"{loss.name}_{option}": (Any if default is None else type(default) | None, None)
        for loss in losses().values()
        for option, default in loss.options.items()
    }
    # A loss that takes a name of Axolotl's own is refused where it is asked for.
    keys = {key: kind for key, kind in keys.items() if key not in AxolotlInputConfig.model_fields}
    return {
        **keys,
        FUSED: (bool | None, None),
        ALLOW_CHANGED: (bool | None, None),
        ALLOW_DATA: (bool | None, None),
        # Written by the plugin, not by the user: which loss `rl` asked for before it became `dpo`.
        "focalpo_loss": (str | None, None),
    }


FocalPOArgs: type[BaseModel] = create_model("FocalPOArgs", **_keys())
