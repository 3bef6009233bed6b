"""``focalpo curves``: the paper's Fig. 2, 3 and 4, from the loss that is trained."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidValue
from ..loss import check_gamma, gamma_at
from . import CommandError
from .curve import Curve
from .output import Output
from .plots import line_looks

# What the CSV of a figure begins with.
_STARTS = {"fig2": "p,dpo", "fig3": "z,dpo,factor_term", "fig4": "z,dpo"}
_START_OF_GAMMA = {"gamma": "progress,linear"}
# If no gamma is asked for, Fig. 2 also shows what these larger ones would do.
_LADDER = (0.5, 1.0)
_DPO = Curve("correct", 0.0)

# A table with its header, and what draws it with matplotlib's pyplot.
_Figure = tuple[list[list[Any]], Callable[[Any], Any]]


def run(args: Namespace) -> int:
    # Without these options the paper's own figures are drawn, with the paper's comparisons.
    of_paper = (args.gamma, args.gamma_end, args.variant) == (None, None, None)
    gammas, variant = args.gamma or [0.05], args.variant or "correct"
    ends = [] if args.gamma_end is None else [args.gamma_end]
    try:
        for gamma in gammas:
            check_gamma(gamma, variant, allow_reversed=True)
        for gamma in ends:
            check_gamma(gamma, variant, allow_reversed=True, name="gamma-end")
    except InvalidValue as error:
        raise CommandError(f"--{error}") from None
    of_both = dict.fromkeys([*gammas[:1], *ends, *gammas[1:]])
    asked = [Curve(variant, gamma) for gamma in of_both if gamma > 0] or [_DPO]
    beside = [Curve("incorrect", 1.0)] if of_paper else []
    curves = list(dict.fromkeys([_DPO, *asked, *beside]))
    folder = "-".join(
        ["curves", *([] if of_paper else [variant, *(f"{gamma:g}" for gamma in of_both)])]
    )
    output = Output(args, folder, {**_STARTS, **(_START_OF_GAMMA if ends else {})})
    figures = {"fig2": _fig2(asked, beside), "fig3": _fig3(asked[0]), "fig4": _fig4(curves)}
    if ends:
        figures["gamma"] = _gamma(gammas[0], ends[0])
    output.say(
        file for name, (table, draw) in figures.items() for file in output.save(name, table, draw)
    )

    print(f"\n{'loss':<28} {'L(0)':>8} {'push at 0':>10} {'peak at z':>10} {'height':>8} {'z*':>9}")
    for curve in curves:
        print(curve.summary())
    print(
        "push is -dL/dz; below z* a pair is pushed the wrong way. A run starts with z = 0, so its "
        "first\nloss is L(0)."
    )
    for why in filter(None, (curve.refused() for curve in curves)):
        print(f"refused in training: {why}")
    return 0


def _table(header: list[str], columns: Sequence[Tensor]) -> list[list[Any]]:
    rows = torch.stack(list(columns)).T.tolist()
    return [header, *([f"{value:.9g}" for value in row] for row in rows)]


def _fig2(asked: Sequence[Curve], beside: Sequence[Curve]) -> _Figure:
    """Loss over the preference probability; the paper's figure adds the original focal loss."""
    p = torch.linspace(0.002, 0.998, 499, dtype=torch.float64)
    z = torch.logit(p)
    panels = [list(dict.fromkeys([_DPO, *asked]))]
    if beside:
        gammas = sorted({*(curve.gamma for curve in asked), *_LADDER})
        variants = (beside[0].variant, asked[0].variant)
        panels = [[_DPO, *(Curve(variant, gamma) for gamma in gammas)] for variant in variants]
    curves = list(dict.fromkeys(curve for panel in panels for curve in panel))

    def draw(plt: Any) -> Any:
        size = (5 * len(panels), 4.2)
        figure, axes = plt.subplots(
            1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained"
        )
        for axis, panel in zip(axes.flat, panels, strict=True):
            for curve, look in zip(panel, line_looks(), strict=False):
                axis.plot(p, curve.loss(z), label=curve.label, **look)
            axis.set_xlabel("preference probability p (no unit)")
            axis.legend(title=f"factor on $-\\log p$: {panel[-1].variant}")
            axis.set_xlim(0, 1)
            axis.set_ylim(0, 5)
        axes[0, 0].set_ylabel("loss of a pair (nats)")
        figure.suptitle("Fig. 2: DPO's loss, and what a modulating factor makes of it")
        return figure

    header = ["p", *(curve.column for curve in curves)]
    return _table(header, [p, *(curve.loss(z) for curve in curves)]), draw


def _fig3(curve: Curve) -> _Figure:
    """The gradient's two terms (Eq. 6) beside DPO's gradient."""
    z = _margins([curve])
    total, of_dpo = curve.push(z), _DPO.push(z)
    # The loss is a factor times DPO's loss.  The first term is that factor times DPO's gradient.
    # The second term comes from the factor's own derivative.
    first = curve.loss(z) / _DPO.loss(z) * of_dpo

    def draw(plt: Any) -> Any:
        lines = [
            ("this loss: sum of both terms", total),
            (r"DPO: $1-p$", of_dpo),
            (r"term 1: factor $\times (1-p)$", first),
            ("term 2: from the factor's derivative", total - first),
        ]
        title = f"Fig. 3: the gradient and its terms (Eq. 6), {curve.label}"
        return _draw_pushes(plt, title, z, lines, [curve])

    header = ["z", "dpo", "factor_term", "derivative_term", "total"]
    return _table(header, [z, of_dpo, first, total - first, total]), draw


def _fig4(curves: Sequence[Curve]) -> _Figure:
    """Gradients; the paper's figure has a focus on pairs ranked right, and one on the others."""
    z = _margins(curves)
    pushes = [curve.push(z) for curve in curves]

    def draw(plt: Any) -> Any:
        lines = [(curve.label, push) for curve, push in zip(curves, pushes, strict=True)]
        title = "Fig. 4: gradients by what they focus on"
        return _draw_pushes(plt, title, z, lines, curves)

    return _table(["z", *(curve.column for curve in curves)], [z, *pushes]), draw


def _gamma(start: float, end: float) -> _Figure:
    """Gamma over a run, for each schedule."""
    progress = torch.linspace(0, 1, 101, dtype=torch.float64)
    columns = {
        schedule: progress.clone().apply_(lambda t, of=schedule: gamma_at(t, start, end, of))
        for schedule in ("linear", "cosine")
    }

    def draw(plt: Any) -> Any:
        figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
        for (schedule, values), look in zip(columns.items(), line_looks(), strict=False):
            axis.plot(progress, values, label=schedule, **look)
        axis.set_xlabel("progress: 0 at the first step, 1 at the last")
        axis.set_ylabel(r"focusing parameter $\gamma$ (no unit)")
        axis.set_title(rf"$\gamma$ over a run, from {start:g} to {end:g}")
        axis.set_xlim(0, 1)
        axis.legend(title="focalpo_gamma_schedule")
        return figure

    return _table(["progress", *columns], [progress, *columns.values()]), draw


def _margins(curves: Sequence[Curve]) -> Tensor:
    """Margins from below the lowest z* that is worth showing, up to where every push is small."""
    ends = [c.reversal() for c in curves if -40 < c.reversal() < math.inf]
    low = min([-10.0, *(math.floor(end) - 4.0 for end in ends)])
    high = 8.0
    return torch.linspace(low, high, round((high - low) * 20) + 1, dtype=torch.float64)


def _draw_pushes(
    plt: Any, title: str, z: Tensor, lines: Sequence[tuple[str, Tensor]], curves: Sequence[Curve]
) -> Any:
    """Lines over the margin; the first ones are those of ``curves``, and get their marks."""
    figure, axis = plt.subplots(figsize=(8, 4.6), layout="constrained")
    drawn = [
        axis.plot(z, values, label=label, **look)[0]
        for (label, values), look in zip(lines, line_looks(), strict=False)
    ]
    axis.set_title(title)
    axis.axhline(0, color="#888888", linewidth=0.8)
    _mark(axis, curves, drawn[: len(curves)])
    axis.set_xlim(float(z[0]), float(z[-1]))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("reward margin z (nats)")
    axis.set_ylabel("push to the right order, $-dL/dz$ (no unit)")
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0, labelspacing=0.7)
    return figure


def _mark(axis: Any, curves: Sequence[Curve], lines: Sequence[Any]) -> None:
    """Mark the peak and z* of each curve in the colour of its line, and name them in the legend."""
    low, high = lines[0].get_xdata()[[0, -1]]
    marks = {"markersize": 9, "markeredgecolor": "white", "linestyle": "", "zorder": 4}
    used: dict[str, str] = {}
    for curve, line in zip(curves, lines, strict=True):
        peak, reversal = curve.peak(), curve.reversal()
        found = []
        if peak is not None:
            found.append(f"peak at z = {peak[0]:.2f}")
            if low < peak[0] < high:
                used["o"] = "peak of the push"
                axis.plot(*peak, "o", color=line.get_color(), **marks)
        if reversal > -math.inf:
            found.append(f"z* = {reversal:.2f}")
            if low < reversal < high:
                used["X"] = "z*, where the push changes sign"
                axis.plot(reversal, 0, "X", color=line.get_color(), **marks)
            else:
                found[-1] += " (off the axis)"
        if found:
            line.set_label(line.get_label() + "\n" + ", ".join(found))
    for mark, label in used.items():
        axis.plot([], [], mark, color="#666666", label=label, **marks)
