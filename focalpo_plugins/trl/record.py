"""The record of what a checkpoint was trained with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerCallback

from ..errors import InvalidValue
from ..guards.resume import IN_TRAINER_STATE, of_trainer_state


class Record(TrainerCallback, ExportableState):
    """Makes transformers write what was trained into each checkpoint's trainer_state.json."""

    _record: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, record: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            record: what an earlier run trained, as transformers reads it from a checkpoint; unused.
        """

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Record:
        """The callback that writes ``record``.

        Transformers may replace it by one of the same class, made from the checkpoint's state.  So
        the record belongs to the class: this run's is written, whatever was restored.
        """
        # Transformers keeps a callback's state under the name of its class.
        of_run: type[Record] = type(IN_TRAINER_STATE, (cls,), {"_record": record})
        return of_run()

    def state(self) -> dict[str, Any]:
        return {"args": {"record": dict(self._record)}, "attributes": {}}


class Saved(TrainerCallback):
    """Remembers the step of the last checkpoint that this process has saved.

    The folder alone doesn't tell: an earlier run may have left checkpoints there.
    """

    step: int | None = None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step


def read(checkpoint: Path) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The record in a checkpoint, None if none of our losses trained it; and transformers' state.

    Raises:
        ValueError: the checkpoint's state can't be read.
    """
    path = checkpoint / TRAINER_STATE_NAME
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        found = of_trainer_state(state)
        # Before 0.2.0 dpo was the only margin, and the record did not name it.
        return None if found is None else {"margin": "dpo", **found}, state
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise InvalidValue(
            f"resume_from_checkpoint must be a whole checkpoint, got {str(checkpoint)!r}: "
            f"{path.name} can't be read ({error}), as when a run was killed while it saved. "
            "Remove the folder, and resume from an earlier one."
        ) from None
