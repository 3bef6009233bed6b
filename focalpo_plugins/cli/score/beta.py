"""The beta that a model was trained with, from the records of its checkpoints."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...guards.resume import RECORD_FILE, of_trainer_state
from ...loss import check_beta

#: TRL's, Axolotl's and OpenRLHF's default.
DEFAULT = 0.1
# Where hosts write what a checkpoint was trained with, and how to read it.
_CHECKPOINTS = ("checkpoint-*", "global_step*", "*/global_step*")
_RECORDS: dict[str, Callable[[Any], Any]] = {
    "trainer_state.json": of_trainer_state,
    RECORD_FILE: dict,
}


def beta_of(asked: float | None, model: Path) -> tuple[float, str]:
    """The beta to score with, and a note: where it is from, or that training used another."""
    recorded, place = _recorded_beta(model)
    if recorded is None:
        if asked is not None:
            return asked, f"beta {asked:g}, from --beta"
        why = "MODEL does not say what it was trained with" + f" ({place})" * bool(place)
        return DEFAULT, f"beta {DEFAULT:g}, the default: {why}"
    if asked is None:
        return recorded, f"beta {recorded:g}, which MODEL was trained with ({place})"
    if asked != recorded:
        return asked, (
            f"warning: beta {asked:g}, from --beta, but MODEL was trained with {recorded:g} "
            f"({place})"
        )
    return asked, f"beta {asked:g}, from --beta, which MODEL was trained with ({place})"


def _recorded_beta(model: Path) -> tuple[float | None, str]:
    """The beta of the newest record that can be read, None without one; and the record's file.

    The newest is the one written last: a folder that is used again keeps checkpoints of the run
    before, maybe of a longer one.
    """
    for folder in _folders_of(model):
        found = sorted(_records_in(folder), key=lambda each: each[:2])
        if found:
            *_, beta, newest = found[-1]
            older = {of: file for *_, of, file in found}
            said = [
                f"{file}, which is older, {'has none' if of is None else f'says {of:g}'}"
                for of, file in older.items()
                if of != beta
            ]
            if beta is not None or said:
                return beta, "; ".join([str(newest), *said])
    return None, ""


def _folders_of(model: Path) -> list[Path]:
    """The model's folder, and that of the checkpoint or adapter that it was made from."""
    if not model.is_dir():
        return []
    if model.name == "merged":  # Axolotl's merge-lora, in the adapter's folder
        return [model, model.parent]
    if model.name.endswith("_hf"):  # OpenRLHF's --ckpt.save_hf, beside the checkpoint
        return [model, model.with_name(model.name.removesuffix("_hf"))]
    return [model]


def _records_in(folder: Path) -> list[tuple[int, int, float | None, Path]]:
    """Time, step, beta and file of each record in a folder and in the checkpoints inside it."""
    found = []
    inside = [place for pattern in _CHECKPOINTS for place in folder.glob(pattern)]
    for place in (folder, *inside):
        for name, record_of in _RECORDS.items():
            file = place / name
            try:
                record = record_of(json.loads(file.read_text(encoding="utf-8")))
                beta = None if record is None else record["beta"]  # not a run with this package
                if beta is not None:
                    check_beta(beta)
                written = file.stat().st_mtime_ns
            except (OSError, ValueError, TypeError, LookupError, AttributeError):
                continue  # there is no record, or the run was killed while it wrote one
            step = int("".join(re.findall(r"\d+$", place.name)) or -1)
            found.append((written, step, beta, file))
    return found
