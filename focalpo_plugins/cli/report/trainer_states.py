"""The log of a run in the trainer_state.json of its checkpoints, as transformers writes it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...guards.resume import of_trainer_state
from .quantities import Log, quantities


def from_states(states: Sequence[tuple[dict[str, Any], Path]]) -> tuple[Log, Path, list[str]]:
    """The log of the newest run among ``states``, its file, and remarks on it for the user."""
    state, source = _newest(states)
    series = _series(state)
    notes = [*_of_other_runs(states, state, source), *_silence(state, series), *_of_target(state)]
    return series, source, notes


def read_state(path: Path) -> dict[str, Any]:
    state = json.loads(path.read_text(encoding="utf-8"))
    entries = state["log_history"]
    if not (isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)):
        raise TypeError
    return {**state, "global_step": int(state["global_step"])}


def _newest(states: Sequence[tuple[dict[str, Any], Path]]) -> tuple[dict[str, Any], Path]:
    """The log of the newest run: the file written last, or one with more steps of the same run.

    Each state holds the whole log up to its step.  A folder that is used again keeps checkpoints of
    the run before, maybe of a longer one; copying a folder may give its files any order in time.
    """
    latest, _ = max(states, key=lambda s: (s[1].stat().st_mtime_ns, s[0]["global_step"]))
    same = [found for found in states if _begins_with(found[0], latest)]
    return max(same, key=lambda found: found[0]["global_step"])


def _begins_with(state: Mapping[str, Any], part: Mapping[str, Any]) -> bool:
    """Whether a log continues another one, so that both belong to one run."""
    # As text, because NaN is not equal to itself.
    texts = [[json.dumps(entry) for entry in each["log_history"]] for each in (state, part)]
    return texts[0][: len(texts[1])] == texts[1]


def _of_other_runs(
    states: Sequence[tuple[dict[str, Any], Path]], state: Mapping[str, Any], source: Path
) -> list[str]:
    """A remark on the logs of other runs; none if there are none."""
    others = [str(file) for each, file in states if not _begins_with(state, each)]
    if not others:
        return []
    return [f"left out, from an older run than {source.parent.name}: {', '.join(others)}"]


def _of_target(state: Mapping[str, Any]) -> list[str]:
    """A remark that this package's margin has its target subtracted, and TRL's has not."""
    try:
        recorded = of_trainer_state(state) or {}
    except (LookupError, TypeError, AttributeError):
        return []
    if recorded.get("margin") != "simpo":
        return []
    return [
        "SimPO: margin and accuracy are without the target simpo_gamma; m_correct, m_incorrect, "
        "weight and reversed are of the margin less the target"
    ]


def _silence(state: Mapping[str, Any], series: Mapping[str, Any]) -> list[str]:
    """Why a run has no training loss in its log."""
    steps, every = state["global_step"], state.get("logging_steps")
    # The summary that is logged at a run's end is not the log of a step.
    of_steps = [e for e in state["log_history"] if not {"train_runtime", *_evaluated(e)} & set(e)]
    if "loss" in series.get("train", {}) or of_steps or not steps:
        return []
    every = every if isinstance(every, int | float) else math.inf
    if every <= steps:
        return [f"no training loss was logged in {steps} steps: look at logging_strategy."]
    return [
        f"no training loss was logged: logging_steps{f', {every},' * (every < math.inf)} is larger "
        f"than the run, which has {steps} step{'s' * (steps != 1)}. Set it to {steps} or less."
    ]


def _evaluated(entry: Iterable[str]) -> list[str]:
    return [key for key in entry if key.startswith("eval_")]


def _series(state: Mapping[str, Any]) -> Log:
    points: Log = {"train": {}, "eval": {}}
    for entry in state["log_history"]:
        split = "train"
        if evaluated := _evaluated(entry):
            name = _set_name([key.removeprefix("eval_") for key in evaluated])
            split = f"eval_{name}" if name else "eval"
        logged = points.setdefault(split, {})
        # TRL logs its own metrics of a named set without the name: keys with the name win.
        for key in sorted(entry, key=lambda key: key.startswith(f"{split}_")):
            if isinstance(entry[key], int | float) and "step" in entry:
                short = key
                if split != "train":
                    short = key.removeprefix(f"{split}_").removeprefix("eval_")
                logged.setdefault(short, {})[entry["step"]] = float(entry[key])
    return quantities(points)


def _set_name(keys: Sequence[str]) -> str:
    """The name of the evaluation set that logged ``keys``; empty if it has none.

    transformers logs a set's loss as ``NAME_loss``, or ``loss``; a trainer may log other losses
    (``aux_loss``) beside it, but no other run time.
    """
    if "loss" in keys:
        return ""
    names = [key.removesuffix("_loss") for key in keys if key.endswith("_loss")]
    timed = [name for name in names if f"{name}_runtime" in keys]
    return next(iter([*timed, *names]), "")
