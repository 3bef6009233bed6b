"""The log of a run in TensorBoard's event files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from ...guards.resume import RECORD_FILE
from .. import CommandError
from .quantities import Log, Series, quantities


def from_event_files(path: Path) -> tuple[Log, list[str]]:
    """The log of a folder and of the runs that it resumed, and remarks on it for the user."""
    points: Log = {"train": {}, "eval": {}}
    notes = []
    parts = _parts(path)
    for part, until in reversed(parts):  # the oldest first
        for newer in _logs(part, until):
            notes += _go_on(points, newer)
    names = _divide_sets(points)
    notes += [f"its steps up to {last:g} are from the log {part.name}" for part, last in parts[1:]]
    if len(names) == 1:
        points[f"eval_{names[0]}"] = {**points.pop("eval"), **points[f"eval_{names[0]}"]}
    elif names:
        del points["eval"]
        notes.append(
            f"TRL's metrics of the evaluation sets {', '.join(names)} have one name in "
            "TensorBoard, and are left out: give a checkpoint's trainer_state.json for them."
        )
    return quantities(points), notes


def _logs(part: Path, until: float) -> list[Log]:
    """The logs of a folder or a file, oldest first, up to the step ``until``."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        raise CommandError(
            f"reading {part} needs tensorboard, which is not installed: "
            "pip install 'focalpo_plugins[tensorboard]'."
        ) from None
    files = [part] if part.is_file() else part.glob("*.tfevents.*")
    events = [EventAccumulator(str(file), size_guidance={"scalars": 0}) for file in files]  # all
    events = [each.Reload() for each in events]
    events = [each for each in events if each.Tags()["scalars"]]
    found: list[Log] = []
    for each in sorted(events, key=lambda each: each.FirstEventTimestamp()):
        found.append({"train": {}, "eval": {}})
        for tag in each.Tags()["scalars"]:
            split, _, key = tag.partition("/")
            if split in found[-1]:
                found[-1][split][key] = {
                    e.step: e.value for e in each.Scalars(tag) if e.step <= until
                }
    return found


def _divide_sets(points: Log) -> list[str]:
    """Give each evaluation set that has a name a split of its own, and return the names."""
    shared = points["eval"]
    timed = [key.removesuffix("_runtime") for key in shared if key.endswith("_runtime")]
    names = [name for name in timed if f"{name}_loss" in shared]
    points |= {f"eval_{name}": {} for name in names}
    for name in sorted(names, key=len, reverse=True):  # `a_b` before `a`
        for key in [key for key in shared if key.startswith(f"{name}_")]:
            points[f"eval_{name}"][key.removeprefix(f"{name}_")] = shared.pop(key)
    return names


def _parts(folder: Path) -> list[tuple[Path, float]]:
    """The folder, and those of the runs that it resumed, each with the last step that counts."""
    parts = [(folder, math.inf)]
    while True:
        try:
            link = json.loads((parts[-1][0] / RECORD_FILE).read_text(encoding="utf-8"))["resumed"]
            before, last = folder.parent / link["log"], min(parts[-1][1], int(link["after"]))
        except (OSError, ValueError, LookupError, TypeError):  # it resumed no run
            return parts
        if not before.is_dir() or before in (part for part, _ in parts):
            return parts
        parts.append((before, last))


def _go_on(
    points: Mapping[str, dict[str, Series]], newer: Mapping[str, Mapping[str, Series]]
) -> list[str]:
    """Add a newer log to the older ones of its folder; says if it takes the place of steps.

    A run that is resumed, or begun again in the same folder, replaces all steps from its first on.
    """
    first = min((step for of in newer.values() for s in of.values() for step in s), default=None)
    if first is None:
        return []
    last = 0
    for split, logged in points.items():
        last = max([last, *(step for series in logged.values() for step in series)])
        for key in {**logged, **newer[split]}:
            before = {step: v for step, v in logged.get(key, {}).items() if step < first}
            logged[key] = {**before, **newer[split].get(key, {})}
            if not logged[key]:
                del logged[key]
    if last < first:
        return []
    return [f"an older log in the folder has steps up to {last}: left out from step {first} on"]
