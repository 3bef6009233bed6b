"""``focalpo curves``: the paper's Fig. 2, 3 and 4, from the loss that is trained."""

from __future__ import annotations

import csv
import functools
import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

from ..errors import InvalidValue
from . import CommandError, named, output_folder, write
from .plots import line_looks, pyplot, save

if TYPE_CHECKING:
    from torch import Tensor

# What the CSV of a figure begins with.
_STARTS = {
    "fig2": "p,dpo",
    "fig3": "z,dpo,factor_term",
    "fig4": "z,dpo",
    "gamma": "progress,linear",
}
# If no gamma is asked for, Fig. 2 also shows what these larger ones would do.
_LADDER = (0.5, 1.0)


@dataclass(frozen=True)
class Curve:
    """One loss as a function of the margin; ``gamma`` 0 is DPO."""

    variant: str
    gamma: float

    @property
    def label(self) -> str:
        if self.gamma == 0:
            return "DPO"
        factor = {
            "correct": r"$p^{\gamma}$",
            "correct_exact": r"$(1-p)^{-\gamma}$",
            "incorrect": r"$(1-p)^{\gamma}$",
        }[self.variant]
        return rf"{factor}, $\gamma$ = {self.gamma:g}"

    @property
    def column(self) -> str:
        """For the header of a CSV."""
        return "dpo" if self.gamma == 0 else f"{self.variant}_gamma_{self.gamma:g}"

    def loss(self, z: Tensor) -> Tensor:
        from ..loss import focalpo_loss

        return focalpo_loss(z, self.gamma, self.variant, allow_reversed=True)

    def push(self, z: Tensor) -> Tensor:
        """``-dL/dz``: how strongly a pair at margin ``z`` is pushed to the right order."""
        import torch

        z = z.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.loss(z).sum(), z)
        return -slope

    def peak(self) -> tuple[float, float] | None:
        """Margin and height of the largest push; None if it grows without a peak, as DPO's."""
        import torch

        low, high = -80.0, 80.0
        for _ in range(4):  # each round searches closer around the last result
            z = torch.linspace(low, high, 4001, dtype=torch.float64)
            push = self.push(z)
            top = int(push.argmax())
            if top in (0, len(z) - 1) or push[top] - max(push[0], push[-1]) < 1e-12:
                return None
            low, high = float(z[top - 1]), float(z[top + 1])
            if high - low < 1e-6:
                break
        return float(z[top]), float(push[top])

    def reversal(self) -> float:
        from ..loss import reversal_margin

        return reversal_margin(self.gamma, self.variant)

    def refused(self) -> str:
        """Why training refuses this gamma; empty if it doesn't."""
        from ..loss import check_gamma

        try:
            check_gamma(self.gamma, self.variant)
        except ValueError as error:
            return str(error)
        return ""


def run(args: Namespace) -> int:
    from ..loss import check_gamma

    # Without these options the paper's own figures are drawn, with the paper's comparisons.
    asked_for = (args.gamma, args.gamma_end, args.variant)
    of_paper = asked_for == (None, None, None)
    gammas, variant = args.gamma or [0.05], args.variant or "correct"
    for gamma in gammas:
        try:
            check_gamma(gamma, variant, allow_reversed=True)
        except InvalidValue as error:
            raise CommandError(f"--{error}") from None
    ends = [] if args.gamma_end is None else [args.gamma_end]
    for gamma in ends:
        try:
            check_gamma(gamma, variant, allow_reversed=True, name="gamma-end")
        except InvalidValue as error:
            raise CommandError(f"--{error}") from None
    draws = {"png", "svg"} & set(args.format)
    plt = pyplot() if draws else None
    dpo = Curve("correct", 0.0)
    of_both = dict.fromkeys([*gammas[:1], *ends, *gammas[1:]])
    asked = [Curve(variant, gamma) for gamma in of_both]
    asked = [curve for curve in asked if curve.gamma > 0] or [dpo]
    beside = [Curve("incorrect", 1.0)] if of_paper else []
    figures: list[tuple[str, Callable[..., Figure]]]
    figures = [("fig2", _fig2), ("fig3", _fig3), ("fig4", _fig4)]
    if ends:
        figures.append(("gamma", functools.partial(_gamma, gammas[0], ends[0])))
    starts = {name: _STARTS[name] for name, _ in figures}
    folder = output_folder(args.out, named(starts, args.format))
    for name, figure in figures:
        header, rows, drawn = figure(plt, dpo, asked, beside)
        written = []
        if "csv" in args.format:
            table = StringIO()
            writer = csv.writer(table)
            writer.writerow(header)
            writer.writerows([f"{value:.9g}" for value in row] for row in rows)
            written.append(write(folder / f"{name}.csv", table.getvalue()))
        if plt is not None:
            written += save(drawn, folder, name, args.format)
            plt.close(drawn)
        print("wrote " + ", ".join(map(str, written)))

    print(f"\n{'loss':<28} {'L(0)':>8} {'push at 0':>10} {'peak at z':>10} {'height':>8} {'z*':>9}")
    curves = list(dict.fromkeys([dpo, *asked, *beside]))
    for curve in curves:
        print(_summary(curve))
    print(
        "push is -dL/dz; below z* a pair is pushed the wrong way. A run starts with z = 0, so its "
        "first\nloss is L(0)."
    )
    for why in filter(None, (curve.refused() for curve in curves)):
        print(f"refused in training: {why}")
    return 0


Figure = tuple[list[str], list[list[float]], Any]


def _fig2(plt: Any, dpo: Curve, asked: Sequence[Curve], beside: Sequence[Curve]) -> Figure:
    """Loss over the preference probability; the paper's figure adds the original focal loss."""
    import torch

    p = torch.linspace(0.002, 0.998, 499, dtype=torch.float64)
    z = torch.logit(p)
    panels = [list(dict.fromkeys([dpo, *asked]))]
    if beside:
        gammas = sorted({*(curve.gamma for curve in asked), *_LADDER})
        variants = (beside[0].variant, asked[0].variant)
        panels = [[dpo, *(Curve(variant, gamma) for gamma in gammas)] for variant in variants]
    curves = list(dict.fromkeys(curve for panel in panels for curve in panel))
    header = ["p", *(curve.column for curve in curves)]
    rows = torch.stack([p, *(curve.loss(z) for curve in curves)]).T.tolist()
    if plt is None:
        return header, rows, None
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
    return header, rows, figure


def _fig3(plt: Any, dpo: Curve, asked: Sequence[Curve], beside: Sequence[Curve]) -> Figure:
    """The gradient's two terms (Eq. 6) beside DPO's gradient."""
    import torch

    curve = asked[0]
    z = _margins([curve])
    total = curve.push(z)
    # The loss is a factor times DPO's loss.  The first term is that factor times DPO's gradient.
    # The second term comes from the factor's own derivative.
    first = curve.loss(z) / dpo.loss(z) * dpo.push(z)
    header = ["z", "dpo", "factor_term", "derivative_term", "total"]
    rows = torch.stack([z, dpo.push(z), first, total - first, total]).T.tolist()
    if plt is None:
        return header, rows, None
    figure, axis = plt.subplots(figsize=(8, 4.6), layout="constrained")
    looks = line_looks()
    lines = (
        (total, "this loss: sum of both terms"),
        (dpo.push(z), r"DPO: $1-p$"),
        (first, r"term 1: factor $\times (1-p)$"),
        (total - first, "term 2: from the factor's derivative"),
    )
    drawn = [axis.plot(z, values, label=label, **next(looks))[0] for values, label in lines]
    axis.set_title(f"Fig. 3: the gradient and its terms (Eq. 6), {curve.label}")
    _finish(axis, [curve], drawn[:1])
    return header, rows, figure


def _fig4(plt: Any, dpo: Curve, asked: Sequence[Curve], beside: Sequence[Curve]) -> Figure:
    """Gradients; the paper's figure has a focus on pairs ranked right, and one on the others."""
    import torch

    curves = list(dict.fromkeys([dpo, *asked, *beside]))
    z = _margins(curves)
    pushes = [curve.push(z) for curve in curves]
    header = ["z", *(curve.column for curve in curves)]
    rows = torch.stack([z, *pushes]).T.tolist()
    if plt is None:
        return header, rows, None
    figure, axis = plt.subplots(figsize=(8, 4.6), layout="constrained")
    drawn = [
        axis.plot(z, push, label=curve.label, **look)[0]
        for curve, push, look in zip(curves, pushes, line_looks(), strict=False)
    ]
    axis.set_title("Fig. 4: gradients by what they focus on")
    _finish(axis, curves, drawn)
    return header, rows, figure


def _gamma(start: float, end: float, plt: Any, *_: Any) -> Figure:
    """Gamma over a run, for each schedule."""
    from ..loss import gamma_at

    schedules = ("linear", "cosine")
    progress = [step / 100 for step in range(101)]
    columns = [[gamma_at(t, start, end, schedule) for t in progress] for schedule in schedules]
    rows = [list(row) for row in zip(progress, *columns, strict=True)]
    header = ["progress", *schedules]
    if plt is None:
        return header, rows, None
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for values, schedule, look in zip(columns, schedules, line_looks(), strict=False):
        axis.plot(progress, values, label=schedule, **look)
    axis.set_xlabel("progress: 0 at the first step, 1 at the last")
    axis.set_ylabel(r"focusing parameter $\gamma$ (no unit)")
    axis.set_title(rf"$\gamma$ over a run, from {start:g} to {end:g}")
    axis.set_xlim(0, 1)
    axis.legend(title="focalpo_gamma_schedule")
    return header, rows, figure


def _margins(curves: Sequence[Curve]) -> Tensor:
    """Margins from below the lowest z* that is worth showing, up to where every push is small."""
    import torch

    ends = [c.reversal() for c in curves if -40 < c.reversal() < math.inf]
    low = min([-10.0, *(math.floor(end) - 4.0 for end in ends)])
    high = 8.0
    return torch.linspace(low, high, round((high - low) * 20) + 1, dtype=torch.float64)


def _finish(axis: Any, curves: Sequence[Curve], lines: Sequence[Any]) -> None:
    """Name the axes, and mark the peak and z* of each curve in the colour of its line."""
    axis.axhline(0, color="#888888", linewidth=0.8)
    low, high = axis.get_lines()[0].get_xdata()[[0, -1]]
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
    axis.set_xlim(low, high)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("reward margin z (nats)")
    axis.set_ylabel("push to the right order, $-dL/dz$ (no unit)")
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0, labelspacing=0.7)


def _summary(curve: Curve) -> str:
    import torch

    zero = torch.zeros(1, dtype=torch.float64)
    peak, reversal = curve.peak(), curve.reversal()
    name = "dpo" if curve.gamma == 0 else f"{curve.variant} gamma={curve.gamma:g}"
    at, height = (f"{peak[0]:.2f}", f"{peak[1]:.4f}") if peak else ("none", "")
    star = f"{reversal:.2f}" if reversal > -math.inf else "none"
    return (
        f"{name:<28} {curve.loss(zero).item():>8.4f} {curve.push(zero).item():>10.4f} {at:>10} "
        f"{height:>8} {star:>9}{'  refused in training' * bool(curve.refused())}"
    )
