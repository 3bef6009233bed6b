"""The keys that the plug-in adds to Axolotl's YAML."""

from __future__ import annotations

from typing import Any

from axolotl.utils.schemas.config import AxolotlInputConfig
from pydantic import BaseModel, Field, create_model

from . import RL_AS_WRITTEN
from .keys import KEYS


def _keys() -> dict[str, Any]:
    keys: dict[str, Any] = {
        name: (Any if key.kind is None else key.kind | None, Field(None, description=key.help))
        for name, key in KEYS.all().items()
        # If a loss takes one of Axolotl's own keys, it is refused when a config asks for it.
        if name not in AxolotlInputConfig.model_fields
    }
    return {**keys, RL_AS_WRITTEN: (str | None, None)}


FocalPOArgs: type[BaseModel] = create_model("FocalPOArgs", **_keys())
