"""``focalpo report``: compare runs side by side, from the hosts' own logs."""

from __future__ import annotations

import csv
import json
import math
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import cycle
from pathlib import Path
from typing import Any

from ..guards.resume import RECORD_FILE
from . import CommandError, named, output_folder, write
from .plots import line_looks, pyplot, save

# Our name of a quantity, and the hosts' names of it after the split's prefix, best first.
# OpenRLHF's `loss` and `acc` are of the last micro-batch, its means are of the whole step.
_LOGGED = {
    "loss": ("loss_mean", "loss", "eval_loss"),
    "margin": ("rewards/margins",),
    "accuracy": ("rewards/accuracies", "acc_mean"),
    "chosen_reward": ("rewards/chosen", "chosen_reward"),
    "rejected_reward": ("rewards/rejected", "reject_reward"),
}
# Logged by this package as NAME/..., with the loss's name.
_OURS = ("weight", "p", "margin_correct", "margin_incorrect", "reversed")
_COLUMNS = (
    "run",
    "split",
    "step",
    "first_loss",
    "loss",
    "margin",
    "accuracy",
    "weight",
    "margin_correct",
    "margin_incorrect",
    "reversed",
)
_PANELS = {
    "margin": "reward margin z (nats)",
    "accuracy": "pairs ranked right (share)",
    "weight": "weight on DPO's gradient (no unit)",
    "loss": "loss of a pair (nats)",
}
# A level that means something, for the panels that have one.
_LEVELS = {"accuracy": (0.5, "chance"), "weight": (1.0, "DPO: 1 by definition")}

_FAINT = {"linewidth": 0.9, "alpha": 0.45}

Series = dict[int, float]  # value by training step


@dataclass
class Run:
    """One run's log.

    Attributes:
        series: for ``train``, ``eval``, and ``eval_NAME`` for an evaluation set of that name, each
            quantity by step.
        notes: remarks on the log for the user.
    """

    name: str
    source: Path
    series: dict[str, dict[str, Series]]
    notes: list[str]

    @property
    def evaluations(self) -> list[str]:
        return [split for split in self.series if split != "train"]

    def rows(self) -> list[dict[str, Any]]:
        """The table's rows: the mean of the last tenth of the steps, and the last evaluation."""
        found = []
        for split, quantities in self.series.items():
            losses = quantities.get("loss") or next(iter(quantities.values()))
            steps = sorted(losses)
            tail = steps[-max(1, len(steps) // 10) :] if split == "train" else steps[-1:]
            row: dict[str, Any] = {"run": self.name, "split": split, "step": steps[-1]}
            # Only an evaluation at step 0 has the first loss.
            first = steps[0] if split == "train" else 0
            row["first_loss"] = quantities.get("loss", {}).get(first, math.nan)
            for column in _COLUMNS[4:]:
                series = quantities.get(column, {})
                values = [series[step] for step in tail if step in series]
                row[column] = sum(values) / len(values) if values else math.nan
            found.append(row)
        return found


def run(args: Namespace) -> int:
    draws = {"png", "svg"} & set(args.format)
    plt = pyplot() if draws else None
    runs: list[Run] = []
    for word in args.runs:
        name, path = _named(word)
        runs.append(_read(path, name))
    _tell_apart(runs)
    start = ",".join(_COLUMNS[:4])
    folder = output_folder(args.out, named({"report": start}, args.format))

    for each in runs:
        print(f"{each.name}: {each.source}")
        for note in each.notes:
            print(f"  {note}")
    rows = [row for each in runs for row in each.rows()]
    print()
    _print_table(rows)
    print(
        "\ntrain: mean of the last tenth of the logged steps; eval: the last evaluation. First "
        "loss: of the\nfirst logged step, and of an evaluation before it. Losses of different "
        "kinds can't be compared\nwith each other; margins and accuracies can. OpenRLHF logs the "
        "rewards of each step's last\nmicro-batch, and none in evaluation."
    )
    written = []
    if "csv" in args.format:
        table = StringIO()
        writer = csv.DictWriter(table, _COLUMNS)
        writer.writeheader()
        writer.writerows(
            {k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
            for row in rows
        )
        written.append(write(folder / "report.csv", table.getvalue()))
    if plt is not None:
        written += save(_draw(plt, runs), folder, "report", args.format)
    print("wrote " + ", ".join(map(str, written)))
    return 0


def _named(word: str) -> tuple[str | None, Path]:
    """Name and path of ``NAME=RUN``; an existing path has no name, and a name may contain ``=``."""
    splits = [at for at, letter in enumerate(word) if letter == "="]
    if not splits or Path(word).exists():
        return None, Path(word)
    at = next((at for at in splits if word[at + 1 :] and Path(word[at + 1 :]).exists()), splits[0])
    return word[:at], Path(word[at + 1 :])


def _read(path: Path, name: str | None) -> Run:
    """The log at ``path``, which is a log file, a checkpoint, or a folder that holds them."""
    if not path.exists():
        raise CommandError(f"RUN must be a run's folder or log, got {str(path)!r}: nothing there.")
    files: list[Path] = []
    events: list[Path] = []
    if path.is_file():
        (events if ".tfevents." in path.name else files).append(path)
    else:
        files = [p for p in (path / "trainer_state.json",) if p.is_file()]
        checkpoints = [p for p in sorted(path.glob("checkpoint-*")) if p.is_dir()]
        files += [p / "trainer_state.json" for p in checkpoints]
        events = sorted(path.rglob("*.tfevents.*"))
    states: list[tuple[dict[str, Any], Path]] = []
    notes: list[str] = []
    for file in files:
        try:
            states.append((_state(file), file))
        except (OSError, ValueError, LookupError, TypeError):
            if path.is_file():
                raise CommandError(
                    f"{path} must be a trainer_state.json with log_history and global_step, and is "
                    "not. Give the run's folder."
                ) from None
            notes.append(f"{file} is skipped: incomplete, as when a run is killed while it saves")
    if states:
        state, source = _newest(states)
        notes += _of_other_runs(states, state, source)
        series = _from_trainer_state(state)
        notes += _silence(state, series)
    elif events:
        newest = max(events, key=lambda p: p.stat().st_mtime)
        source = newest if path.is_file() else newest.parent
        series, found = _from_tensorboard(source)
        notes += found
    elif notes:
        raise CommandError(
            f"RUN must hold a trainer_state.json that is whole, got {str(path)!r}: "
            f"{'; '.join(notes)}."
        )
    else:
        raise CommandError(
            f"RUN must hold trainer_state.json, checkpoint-*/trainer_state.json or TensorBoard "
            f"event files, got {str(path)!r}: none of them is in it. Axolotl and TRL write the "
            "first with every checkpoint, OpenRLHF the last with --logger.tensorboard_dir."
        )
    if not any("margin" in quantities or "loss" in quantities for quantities in series.values()):
        raise CommandError(
            f"RUN must be the log of a training run, got {str(source)!r}: it holds no loss."
            + "".join(f" {note[0].upper()}{note[1:]}" for note in notes)
        )
    return Run(name or _name(path), source, series, notes)


def _state(path: Path) -> dict[str, Any]:
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
    """Whether a log goes on from another one, so that both are of one run."""
    # As text, because NaN is not equal to itself.
    texts = [[json.dumps(entry) for entry in each["log_history"]] for each in (state, part)]
    return texts[0][: len(texts[1])] == texts[1]


def _of_other_runs(
    states: Sequence[tuple[dict[str, Any], Path]], state: Mapping[str, Any], source: Path
) -> list[str]:
    """What to know of logs that are not of the run that is shown."""
    others = [str(file) for each, file in states if not _begins_with(state, each)]
    if not others:
        return []
    return [f"not of the same run, older than {source.parent.name}, left out: {', '.join(others)}"]


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


def _from_trainer_state(state: Mapping[str, Any]) -> dict[str, dict[str, Series]]:
    points: dict[str, dict[str, Series]] = {"train": {}, "eval": {}}
    for entry in state["log_history"]:
        split = "train"
        if evaluated := _evaluated(entry):
            name = _set_name([key.removeprefix("eval_") for key in evaluated])
            split = f"eval_{name}" if name else "eval"
        # TRL logs its own metrics of a named set without the name: keys with the name win.
        for key in sorted(entry, key=lambda key: key.startswith(f"{split}_")):
            if isinstance(entry[key], (int, float)) and "step" in entry:
                short = key
                if split != "train":
                    own = key.startswith(f"{split}_")
                    short = key.removeprefix(f"{split}_" if own else "eval_")
                points.setdefault(split, {}).setdefault(short, {})[entry["step"]] = float(
                    entry[key]
                )
    return _quantities(points)


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


def _from_tensorboard(path: Path) -> tuple[dict[str, dict[str, Series]], list[str]]:
    """The series, and remarks on them for the user."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        raise CommandError(
            f"reading {path} needs tensorboard, which is not installed: "
            "pip install 'focalpo_plugins[tensorboard]'."
        ) from None
    points: dict[str, dict[str, Series]] = {"train": {}, "eval": {}}
    notes = []
    parts = _parts(path)
    for part, until in reversed(parts):  # the oldest first
        files = [part] if part.is_file() else part.glob("*.tfevents.*")
        logs = [EventAccumulator(str(file), size_guidance={"scalars": 0}) for file in files]  # all
        logs = [log.Reload() for log in logs]
        logs = [log for log in logs if log.Tags()["scalars"]]
        for log in sorted(logs, key=lambda log: log.FirstEventTimestamp()):
            found: dict[str, dict[str, Series]] = {"train": {}, "eval": {}}
            for tag in log.Tags()["scalars"]:
                split, _, key = tag.partition("/")
                if split in found:
                    found[split][key] = {
                        event.step: event.value for event in log.Scalars(tag) if event.step <= until
                    }
            notes += _go_on(points, found)
    shared = points["eval"]
    timed = [key.removesuffix("_runtime") for key in shared if key.endswith("_runtime")]
    names = [name for name in timed if f"{name}_loss" in shared]
    points |= {f"eval_{name}": {} for name in names}
    for name in sorted(names, key=len, reverse=True):  # `a_b` before `a`
        for key in [key for key in shared if key.startswith(f"{name}_")]:
            points[f"eval_{name}"][key.removeprefix(f"{name}_")] = shared.pop(key)
    notes += [f"its steps up to {last:g} are from the log {part.name}" for part, last in parts[1:]]
    if len(names) == 1:
        points[f"eval_{names[0]}"] = {**points.pop("eval"), **points[f"eval_{names[0]}"]}
    elif names:
        del points["eval"]
        notes.append(
            f"TRL's metrics of the evaluation sets {', '.join(names)} have one name in "
            "TensorBoard, and are left out: give a checkpoint's trainer_state.json for them."
        )
    return _quantities(points), notes


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
    for split, quantities in points.items():
        for key, series in quantities.items():
            last = max(last, *series, 0)
            quantities[key] = {step: value for step, value in series.items() if step < first}
        for key, series in newer[split].items():
            quantities[key] = {**quantities.get(key, {}), **series}
        for key in [key for key, series in quantities.items() if not series]:
            del quantities[key]
    if last < first:
        return []
    return [f"an older log in the folder has steps up to {last}: left out from step {first} on"]


def _quantities(points: Mapping[str, Mapping[str, Series]]) -> dict[str, dict[str, Series]]:
    """Change a host's names to ours; splits and quantities that were not logged are left out."""
    series: dict[str, dict[str, Series]] = {}
    for split, logged in points.items():
        found: dict[str, Series] = {}
        for quantity, names in _LOGGED.items():
            for name in names:
                if name in logged and quantity not in found:
                    found[quantity] = logged[name]
        chosen, rejected = found.pop("chosen_reward", {}), found.pop("rejected_reward", {})
        if "margin" not in found and chosen.keys() & rejected.keys():
            found["margin"] = {s: chosen[s] - rejected[s] for s in chosen if s in rejected}
        for key, values in logged.items():
            loss_name, _, quantity = key.rpartition("/")
            if loss_name not in ("", "rewards") and quantity in _OURS:
                found[quantity] = values
        if found:
            series[split] = found
    return series


def _name(path: Path) -> str:
    """The name of the run's folder, not of its log, its checkpoint or its TensorBoard folder."""
    path = path.resolve()
    if path.is_file():
        path = path.parent
    while path.name.startswith("checkpoint-") or path.name in ("tensorboard", "runs"):
        path = path.parent
    return path.name


def _tell_apart(runs: list[Run]) -> None:
    """Number the runs that have the same name, because their folders have the same name."""
    for name in {each.name for each in runs}:
        same = [each for each in runs if each.name == name]
        if len(same) > 1:
            for number, each in enumerate(same, 1):
                each.name = f"{name} ({number})"


def _print_table(rows: list[dict[str, Any]]) -> None:
    def text(value: Any) -> str:
        if isinstance(value, float):
            return "-" if math.isnan(value) else f"{value:.4f}"
        return str(value)

    table = [list(_COLUMNS), *([text(row[column]) for column in _COLUMNS] for row in rows)]
    table[0] = [column.replace("margin_", "m_") for column in table[0]]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        cells = [
            cell.ljust(w) if i < 2 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _starts_level(series: Mapping[str, Series]) -> bool:
    """Whether policy and reference were equal in an evaluation before the first step.

    Then no pair counts as ranked right in that evaluation.
    """
    first = [series.get(quantity, {}).get(0) for quantity in ("accuracy", "margin")]
    return first == [0, 0]


def _draw(plt: Any, runs: list[Run]) -> Any:
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.6), sharex=True, layout="constrained")
    # One line for each evaluation set, and one for a run without any.
    lines = [(each, split) for each in runs for split in each.evaluations or ["train"]]
    looks = [look for look, _ in zip(line_looks(), lines, strict=False)]
    marks = [mark for mark, _ in zip(cycle("osD^vP"), lines, strict=False)]
    for axis, (quantity, title) in zip(axes.flat, _PANELS.items(), strict=True):
        axis.set_title(title, loc="left", fontsize=10)
        begun = set()
        for (each, split), look, mark in zip(lines, looks, marks, strict=True):
            for part in ("train", split):
                points = sorted(each.series.get(part, {}).get(quantity, {}).items())
                if not points or (id(each), part) in begun:
                    continue
                begun.add((id(each), part))
                style: dict[str, Any] = {"marker": mark, "markersize": 5}
                if part == "train":
                    style = _FAINT if each.evaluations else {}
                axis.plot(*zip(*points, strict=True), **look, **style)
        if quantity == "weight":
            axis.margins(y=0.15)
        elif quantity == "accuracy":
            axis.set_ylim(-0.02, 1.02)
            if any(_starts_level(each.series.get(split, {})) for each, split in lines):
                axis.annotate(
                    "0 at step 0: every margin is 0, none is above it",
                    (0.99, 0.1),
                    xycoords=("axes fraction", "data"),
                    ha="right",
                    va="center",
                    fontsize=9,
                    color="#555555",
                )
        if quantity in _LEVELS:
            level, meaning = _LEVELS[quantity]
            axis.axhline(level, color="#888888", linewidth=1)
            axis.annotate(
                meaning,
                (0.99, level),
                xycoords=("axes fraction", "data"),
                xytext=(0, -4),
                textcoords="offset points",
                ha="right",
                va="top",
                fontsize=9,
                color="#555555",
            )
    for axis in axes[-1]:
        axis.set_xlabel("training step")
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], label=_label(each, split), marker="" if split == "train" else mark, **look)
        for (each, split), look, mark in zip(lines, looks, marks, strict=True)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4)
    if any(each.evaluations for each in runs):
        caption = "marked lines: held-out pairs; faint lines: training batches"
        if not all(each.evaluations for each in runs):
            caption += "; plain lines: training batches of runs without evaluation"
        figure.supxlabel(caption, fontsize=9)
    return figure


def _label(run: Run, split: str) -> str:
    named = split not in ("train", "eval")
    return f"{run.name}, {split.removeprefix('eval_')}" if named else run.name
