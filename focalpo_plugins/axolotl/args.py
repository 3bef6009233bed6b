"""The keys that the plug-in adds to Axolotl's YAML.

Option ``o`` of the loss ``NAME`` has the key ``NAME_o``.  All our losses share ``focalpo_margin``,
``focalpo_fused``, ``focalpo_shared_prompts``, ``focalpo_balanced_batches``,
``focalpo_allow_changed`` and ``focalpo_allow_data``.
"""

from __future__ import annotations

from typing import Any

from axolotl.utils.schemas.config import AxolotlInputConfig
from pydantic import BaseModel, Field, create_model

from ..options import OF_ANY_LOSS, of_margins
from ..registry import losses
from . import COMMON_KEYS, MARGIN, MARGINS, RL_AS_WRITTEN


def _keys() -> dict[str, Any]:
    keys = {
        # A default of None doesn't tell the option's type.
        f"{loss.name}_{option}": (
            Any if default is None else type(default) | None,
            Field(default=None, description=loss.help.get(option)),
        )
        for loss in losses().values()
        for option, default in loss.options.items()
    }
    # If a loss takes one of Axolotl's own keys, it is refused when a config asks for it.
    keys = {key: kind for key, kind in keys.items() if key not in AxolotlInputConfig.model_fields}
    described = {**OF_ANY_LOSS, "margin": of_margins(MARGINS)}
    for key in COMMON_KEYS:
        description = described[key.removeprefix("focalpo_")]
        kind = str if key == MARGIN else bool
        keys[key] = (kind | None, Field(default=None, description=description))
    return {**keys, RL_AS_WRITTEN: (str | None, None)}


FocalPOArgs: type[BaseModel] = create_model("FocalPOArgs", **_keys())
