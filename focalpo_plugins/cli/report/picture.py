"""The picture of a report: margins, accuracies, weights and losses of all runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from ..plots import line_looks
from .quantities import Series
from .runs import Run

_PANELS = {
    "margin": "reward margin z (nats)",
    "accuracy": "pairs ranked right (share)",
    "weight": "weight on DPO's gradient (no unit)",
    "loss": "loss of a pair (nats)",
}
# A level that means something, for the panels that have one.
_LEVELS = {"accuracy": (0.5, "chance"), "weight": (1.0, "DPO: 1 by definition")}

_FAINT = {"linewidth": 0.9, "alpha": 0.45}


def draw(plt: Any, runs: list[Run]) -> Any:
    from matplotlib.lines import Line2D

    figure, axes = plt.subplots(2, 2, figsize=(10, 6.6), sharex=True, layout="constrained")
    # One line for each evaluation set, and one for a run without any.
    splits = [(each, split) for each in runs for split in each.evaluations or ["train"]]
    lines = [
        (each, split, look, mark)
        for (each, split), look, mark in zip(splits, line_looks(), cycle("osD^vP"), strict=False)
    ]
    for axis, (quantity, title) in zip(axes.flat, _PANELS.items(), strict=True):
        axis.set_title(title, loc="left", fontsize=10)
        _draw_panel(axis, quantity, lines)
    for axis in axes[-1]:
        axis.set_xlabel("training step")
    handles = [
        Line2D([], [], label=_label(each, split), marker="" if split == "train" else mark, **look)
        for each, split, look, mark in lines
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4)
    if any(each.evaluations for each in runs):
        caption = "marked lines: held-out pairs; faint lines: training batches"
        if not all(each.evaluations for each in runs):
            caption += "; plain lines: training batches of runs without evaluation"
        figure.supxlabel(caption, fontsize=9)
    return figure


def _draw_panel(axis: Any, quantity: str, lines: Sequence[tuple[Run, str, Any, str]]) -> None:
    begun = set()
    for each, split, look, mark in lines:
        for part in ("train", split):
            points = sorted(each.series.get(part, {}).get(quantity, {}).items())
            if not points or (id(each), part) in begun:
                continue
            begun.add((id(each), part))
            style: dict[str, Any] = {"marker": mark, "markersize": 5}
            if part == "train":
                style = _FAINT if each.evaluations else {}
            axis.plot(*zip(*points, strict=True), **look, **style)
    note = {"ha": "right", "xycoords": ("axes fraction", "data"), "size": 9, "color": "#555555"}
    if quantity == "weight":
        axis.margins(y=0.15)
    elif quantity == "accuracy":
        axis.set_ylim(-0.02, 1.02)
        if any(_starts_level(each.series.get(split, {})) for each, split, *_ in lines):
            why = "0 at step 0: every margin is 0, none is above it"
            axis.annotate(why, (0.99, 0.1), va="center", **note)
    if quantity in _LEVELS:
        level, meaning = _LEVELS[quantity]
        axis.axhline(level, color="#888888", linewidth=1)
        below = {"xytext": (0, -4), "textcoords": "offset points", "va": "top"}
        axis.annotate(meaning, (0.99, level), **below, **note)


def _starts_level(series: Mapping[str, Series]) -> bool:
    """Whether policy and reference were equal in an evaluation before the first step.

    Then no pair counts as ranked right in that evaluation.
    """
    first = [series.get(quantity, {}).get(0) for quantity in ("accuracy", "margin")]
    return first == [0, 0]


def _label(run: Run, split: str) -> str:
    named = split not in ("train", "eval")
    return f"{run.name}, {split.removeprefix('eval_')}" if named else run.name
