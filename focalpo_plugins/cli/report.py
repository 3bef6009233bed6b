"""``focalpo report``: what runs did, side by side, from the hosts' own logs."""

from __future__ import annotations

import csv
import json
import math
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from io import StringIO
from itertools import cycle
from pathlib import Path
from typing import Any

from . import CommandError, output_folder, write
from .plots import line_looks, pyplot, save

# Our name of a quantity, and what hosts log it under after the split's prefix, best first.
# OpenRLHF's `loss` and `acc` are the last micro-batch's, its means those of the whole step.
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
# Where a panel has a level that means something.
_LEVELS = {"accuracy": (0.5, "chance"), "weight": (1.0, "DPO: 1 by definition")}

Series = dict[int, float]  # value by training step


@dataclass
class Run:
    """One run's log: for ``train`` and ``eval`` each quantity by step."""

    name: str
    source: Path
    series: dict[str, dict[str, Series]]

    def rows(self) -> list[dict[str, Any]]:
        """The table's rows: the mean of the last tenth of the steps, and the last evaluation."""
        found = []
        for split, quantities in self.series.items():
            losses = quantities.get("loss") or next(iter(quantities.values()))
            steps = sorted(losses)
            tail = steps[-max(1, len(steps) // 10) :] if split == "train" else steps[-1:]
            row: dict[str, Any] = {"run": self.name, "split": split, "step": steps[-1]}
            row["first_loss"] = quantities.get("loss", {}).get(steps[0], math.nan)
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
        name, separator, path = word.partition("=")
        runs.append(_read(Path(path), name) if separator else _read(Path(word), None))
    _tell_apart(runs)
    folder = output_folder(args.out)

    for each in runs:
        print(f"{each.name}: {each.source}")
    rows = [row for each in runs for row in each.rows()]
    print()
    _print_table(rows)
    print(
        "\ntrain: mean of the last tenth of the logged steps; eval: the last evaluation. Losses "
        "of\ndifferent kinds can't be compared with each other; margins and accuracies can. "
        "OpenRLHF logs\nthe rewards of each step's last micro-batch, and none in evaluation."
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


def _read(path: Path, name: str | None) -> Run:
    """The log at ``path``, which is a log file, a checkpoint, or a folder that holds them."""
    if not path.exists():
        raise CommandError(f"RUN must be a run's folder or log, got {str(path)!r}: nothing there.")
    states: list[Path] = []
    events: list[Path] = []
    if path.is_file():
        (events if ".tfevents." in path.name else states).append(path)
    else:
        states = [p for p in (path / "trainer_state.json",) if p.is_file()]
        states += sorted(path.glob("checkpoint-*/trainer_state.json"))
        events = sorted(path.rglob("*.tfevents.*"))
    if states:
        # The newest is the one that got farthest; each holds the whole log up to its step.
        state, source = max(((_state(p), p) for p in states), key=lambda s: s[0]["global_step"])
        series = _from_trainer_state(state)
    elif events:
        source = max(events, key=lambda p: p.stat().st_mtime).parent
        series = _from_tensorboard(source)
    else:
        raise CommandError(
            f"RUN must hold trainer_state.json, checkpoint-*/trainer_state.json or TensorBoard "
            f"event files, got {str(path)!r}: none of them is in it. Axolotl and TRL write the "
            "first with every checkpoint, OpenRLHF the last with --logger.tensorboard_dir."
        )
    if not any("margin" in quantities or "loss" in quantities for quantities in series.values()):
        raise CommandError(
            f"RUN must be the log of a training run, got {str(source)!r}: it holds no loss."
        )
    return Run(name or _name(path), source, series)


def _state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if not (isinstance(state["log_history"], list) and isinstance(state["global_step"], int)):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise CommandError(
            f"{path} must be a trainer_state.json with log_history and global_step, and is not. "
            "Give the run's folder."
        ) from None
    return dict(state)


def _from_trainer_state(state: Mapping[str, Any]) -> dict[str, dict[str, Series]]:
    points: dict[str, dict[str, Series]] = {"train": {}, "eval": {}}
    for entry in state["log_history"]:
        split = "eval" if any(key.startswith("eval_") for key in entry) else "train"
        for key, value in entry.items():
            if isinstance(value, (int, float)) and "step" in entry:
                key = key.removeprefix("eval_")
                points[split].setdefault(key, {})[entry["step"]] = float(value)
    return _quantities(points)


def _from_tensorboard(folder: Path) -> dict[str, dict[str, Series]]:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        raise CommandError(
            f"reading {folder} needs tensorboard, which is not installed: "
            "pip install 'focalpo_plugins[tensorboard]'."
        ) from None
    log = EventAccumulator(str(folder), size_guidance={"scalars": 0})  # all, not a sample
    log.Reload()
    points: dict[str, dict[str, Series]] = {"train": {}, "eval": {}}
    for tag in log.Tags()["scalars"]:
        split, _, key = tag.partition("/")
        if split in points:
            points[split][key] = {event.step: event.value for event in log.Scalars(tag)}
    return _quantities(points)


def _quantities(points: Mapping[str, Mapping[str, Series]]) -> dict[str, dict[str, Series]]:
    """From a host's names to ours; splits and quantities that were not logged are left out."""
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
    """The run's own name: not that of its log, its checkpoint or its TensorBoard folder."""
    path = path.resolve()
    if path.is_file():
        path = path.parent
    while path.name.startswith("checkpoint-") or path.name in ("tensorboard", "runs"):
        path = path.parent
    return path.name


def _tell_apart(runs: list[Run]) -> None:
    """Number the runs that have one name, which folders of one name would otherwise share."""
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


def _draw(plt: Any, runs: list[Run]) -> Any:
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.6), sharex=True, layout="constrained")
    looks = [look for look, _ in zip(line_looks(), runs, strict=False)]
    marks = [mark for mark, _ in zip(cycle("osD^vP"), runs, strict=False)]
    splits = {split for each in runs for split in each.series}
    faint = {"linewidth": 0.9, "alpha": 0.45} if "eval" in splits else {}
    for axis, (quantity, title) in zip(axes.flat, _PANELS.items(), strict=True):
        axis.set_title(title, loc="left", fontsize=10)
        for each, look, mark in zip(runs, looks, marks, strict=True):
            train = sorted(each.series.get("train", {}).get(quantity, {}).items())
            held_out = sorted(each.series.get("eval", {}).get(quantity, {}).items())
            if train:
                axis.plot(*zip(*train, strict=True), **look, **faint)
            if held_out:
                axis.plot(*zip(*held_out, strict=True), marker=mark, markersize=5, **look)
        if quantity == "weight":
            axis.margins(y=0.15)
        elif quantity == "accuracy":
            axis.set_ylim(-0.02, 1.02)
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
        Line2D([], [], label=each.name, marker=mark if "eval" in splits else "", **look)
        for each, look, mark in zip(runs, looks, marks, strict=True)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4)
    if "eval" in splits:
        figure.supxlabel("marked lines: held-out pairs; faint lines: training batches", fontsize=9)
    return figure
