"""The record of what a checkpoint was trained with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerCallback

from ..errors import InvalidValue
from ..guards.resume import IN_TRAINER_STATE, of_trainer_state


class Record(TrainerCallback, ExportableState):
    """Makes transformers write what was trained into each checkpoint's trainer_state.json."""

    def __init__(self, record: Mapping[str, Any] | None = None) -> None:
        self.record = record

    def state(self) -> dict[str, Any]:
        return {"args": {"record": self.record}, "attributes": {}}


# Transformers keeps a callback's state under the name of its class.
Record.__name__ = IN_TRAINER_STATE


def recorded(checkpoint: Path) -> dict[str, Any] | None:
    """The record in a checkpoint; None if none of our losses trained it.

    Raises:
        ValueError: the checkpoint's state can't be read.
    """
    path = checkpoint / TRAINER_STATE_NAME
    try:
        found = of_trainer_state(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, AttributeError) as error:
        raise InvalidValue(
            f"resume_from_checkpoint must be a whole checkpoint, got {str(checkpoint)!r}: "
            f"{path.name} can't be read ({error}), as when a run was killed while it saved. "
            "Remove the folder, and resume from an earlier one."
        ) from None
    # Before 0.2.0 dpo was the only margin, and the record did not name it.
    return None if found is None else {"margin": "dpo", **found}
