"""A run that goes on from a checkpoint goes on with the loss that trained it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

#: By this name transformers keeps what was trained in a checkpoint's trainer_state.json.
IN_TRAINER_STATE = "_Record"
#: The file that holds it, where a checkpoint has no such state.
RECORD_FILE = "focalpo_plugins.json"


def of_trainer_state(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record in a checkpoint's trainer_state.json; None where no loss of ours has trained it.

    Raises:
        LookupError, AttributeError: ``state`` is not what transformers writes.
    """
    found = state["stateful_callbacks"].get(IN_TRAINER_STATE)
    # A list where a trainer was given its loss twice.
    last = found[-1] if isinstance(found, list) else found
    return None if last is None else last["args"]["record"]


def check_unchanged(
    recorded: Mapping[str, Any] | None,
    asked: Mapping[str, Any],
    checkpoint: str,
    allow: str,
    written: Mapping[str, str],
) -> None:
    """Compare what a checkpoint was trained with and what is asked for.

    Args:
        recorded: by key, as saved with the checkpoint; None where nothing was.
        asked: by key, what this run would train.
        checkpoint: where it is, for the message.
        allow: what the user gives to go on all the same.
        written: the keys as the user writes them, where the host has another name for one.

    Raises:
        ValueError: they differ; half a run would be trained with one loss and half with another.
    """
    rest = f"give the values it was trained with, start without resuming, or give {allow}."
    if recorded is None:
        raise ValueError(
            f"the checkpoint {checkpoint} does not say that it was trained with a loss of "
            f"focalpo_plugins, got loss={asked['loss']!r} to go on with. Resume it with the loss "
            f"that began it, start without resuming, or give {allow}."
        )
    changed = [
        f"{written.get(key, key)} was {recorded.get(key)!r}, got {asked.get(key)!r}"
        for key in sorted({*recorded, *asked})
        if not _same(recorded.get(key), asked.get(key))
    ]
    if changed:
        raise ValueError(
            f"{'; '.join(changed)}: resuming would change the loss of the checkpoint {checkpoint}; "
            f"{rest}"
        )


def _same(recorded: object, asked: object) -> bool:
    return recorded == asked or json.dumps(recorded) == json.dumps(asked)  # NaN is not NaN
