"""Checks that a resumed run continues with the loss that trained its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from ..errors import InvalidValue
from .messages import say

#: The name under which transformers keeps our record in a checkpoint's trainer_state.json.
IN_TRAINER_STATE = "_Record"
#: The file that holds the record, if a checkpoint has no such state.
RECORD_FILE = "focalpo_plugins.json"


def of_trainer_state(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record in a checkpoint's trainer_state.json; None without a loss of this package.

    Raises:
        LookupError, AttributeError: ``state`` is not what transformers writes.
    """
    found = state["stateful_callbacks"].get(IN_TRAINER_STATE)
    # It is a list if a trainer was given its loss twice.
    last = found[-1] if isinstance(found, list) else found
    return None if last is None else last["args"]["record"]


def check_unchanged(
    recorded: Mapping[str, Any] | None,
    asked: Mapping[str, Any],
    checkpoint: str,
    allow: str,
    written: Mapping[str, str],
    of_host: Collection[str] = (),
) -> None:
    """Compare what a checkpoint was trained with and what is asked for.

    Args:
        recorded: values by key, as saved with the checkpoint; None if nothing was saved.
        asked: values by key that this run would train with.
        checkpoint: the checkpoint's path, for the message.
        allow: what the user sets to resume anyway, for the message.
        written: the user's names of keys for which the host has another name.
        of_host: keys that are compared only if they are recorded: an earlier release of this
            package recorded fewer of the host's values.

    Raises:
        ValueError: they differ; half a run would be trained with one loss and half with another.
    """
    if recorded is None:
        raise InvalidValue(
            f"the checkpoint {checkpoint} has no record of a loss of focalpo_plugins, got "
            f"loss={asked['loss']!r} for resuming. Resume it with the loss that it was trained "
            f"with, start without resuming, or set {allow}."
        )
    unknown = {key for key in of_host if key not in recorded}
    changed = [
        f"{written.get(key, key)} was {recorded.get(key)!r}, got {asked.get(key)!r}"
        for key in sorted({*recorded, *asked} - unknown)
        if not _same(recorded.get(key), asked.get(key))
    ]
    if changed:
        raise InvalidValue(
            f"{'; '.join(changed)}: resuming would change the loss of the checkpoint {checkpoint}. "
            "Set the values that it was trained with, start without resuming, or set "
            f"{allow}."
        )


def warn_of_unknown(
    recorded: Mapping[str, Any],
    of_host: Collection[str],
    checkpoint: str,
    written: Mapping[str, str],
) -> None:
    """Name the host's values that :func:`check_unchanged` could not compare.

    Call it on one rank only; the arguments are the same.
    """
    unknown = [written.get(key, key) for key in of_host if key not in recorded]
    if unknown:
        say(
            f"warning: the checkpoint {checkpoint} was saved by an earlier release of "
            f"focalpo_plugins, which did not record {', '.join(unknown)}. Make sure that they have "
            "the values it was trained with."
        )


def warn_of_another_length(before: int | None, now: int, moving: str) -> None:
    """Warn if a run whose loss changes over its steps resumes with another number of steps.

    Call it on one rank only.

    Args:
        before: optimizer steps of the run that saved the checkpoint; None if that isn't known.
        now: optimizer steps of this run.
        moving: the names of the options that change, as the user writes them.
    """
    if before not in (None, now):
        say(
            f"warning: {moving} changes over the run, and the checkpoint's run had {before} steps, "
            f"but this one has {now}: the value jumps at the first resumed step. To continue as "
            f"before, set {before} steps."
        )


def _same(recorded: object, asked: object) -> bool:
    return recorded == asked or json.dumps(recorded) == json.dumps(asked)  # NaN is not NaN
