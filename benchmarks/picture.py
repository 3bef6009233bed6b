"""Draw what shared prompts and balanced batches save: `python benchmarks/picture.py [FILE ...]`.

A file is one that run.py writes; without one, outputs/bench_axolotl.json of `nox -s bench` is read.
Of the benchmark `shared` it writes docs/pictures/shared.svg: each case has a bar for the time of a
step and one for its peak memory, as shares of TRL's own DPOTrainer, with the 95 % interval. Of the
benchmark `ranks` it writes docs/pictures/ranks.svg: the tokens on the critical path, as shares of
random padded batches.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from focalpo_plugins.cli.plots import COLOURS, pyplot, rendered

ROOT = Path(__file__).resolve().parents[1]
# What a bar is of, in the benchmark's words, with its colour and filling.
SHARED = {"step time": (COLOURS[1], ""), "peak memory": (COLOURS[5], "//")}
RANKS = {
    "balanced": (COLOURS[1], ""),
    "shared": (COLOURS[5], "//"),
    "both": (COLOURS[3], "xx"),
    "ideal": (COLOURS[0], ""),
}
Cases = dict[str, dict[str, dict[str, Any]]]


def read(files: list[Path], benchmark: str, quantities: Iterable[str]) -> tuple[Any, Cases]:
    """The machine, and by case and quantity what was measured; a later file replaces an earlier."""
    machine: dict[str, Any] = {}
    cases: Cases = {}
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            found = [row for row in content["results"] if row["benchmark"] == benchmark]
            for row in found:
                cases.setdefault(row["case"], {})[row["quantity"]] = row
            if found:
                machine = content["machine"]
        except (ValueError, LookupError, TypeError):
            raise SystemExit(
                f"FILE must be what run.py writes, got {str(file)!r}, which isn't whole: measure "
                "again"
            ) from None
    for case, rows in cases.items():
        for name in quantities:
            if name not in rows:
                raise SystemExit(f"FILE must have the {name} of each case, got none of {case!r}")
    return machine, cases


def draw_shared(machine: dict[str, Any], cases: Cases) -> Any:
    figure, axis = pyplot().subplots(figsize=(8, 1.2 + 0.62 * len(cases)), layout="constrained")
    drawn: dict[str, Any] = {}
    for at, rows in enumerate(cases.values()):
        for (name, (colour, hatch)), offset in zip(SHARED.items(), (-0.2, 0.2), strict=True):
            row = rows[name]
            ratio, ends = row["ratio"], (row["low"], row["high"])
            drawn[name] = axis.barh(
                at + offset, ratio, 0.36, color=colour, hatch=hatch, edgecolor="white", label=name
            )
            axis.plot(ends, [at + offset] * 2, color="#333333", linewidth=1.2)
            text = f"{ratio:.2f}  ({row['ours']:,.0f} of {row['theirs']:,.0f} {row['unit']})"
            axis.annotate(
                text, (max(ratio, *ends), at + offset), (5, 0), textcoords="offset points",
                va="center", fontsize=8, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )  # fmt: skip
    axis.axvline(1, color="#333333", linestyle=(0, (4, 2)), linewidth=1.2)
    axis.set_yticks(range(len(cases)), [case.replace(", ", "\n", 1) for case in cases], fontsize=8)
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    axis.set_xlim(0, max(1.0, *(r["high"] for rows in cases.values() for r in rows.values())) + 0.4)
    axis.set_xlabel("share of TRL's DPOTrainer, the dashed line (no unit)")
    on = [machine.get("gpu") or f"{machine['threads']} of {machine['cores']} CPU cores"]
    on += [f"{name} {machine[name]}" for name in ("torch", "trl") if name in machine]
    axis.set_title("Loss and gradients of a batch with shared prompts\n" + ", ".join(on))
    axis.legend(handles=[*drawn.values()], loc="lower right")
    return figure


def draw_ranks(machine: dict[str, Any], cases: Cases) -> Any:
    """A panel for each set of lengths; nothing of it depends on the machine."""
    sets = {case.split(", ", 1)[1]: None for case in cases}
    figure, panels = pyplot().subplots(
        len(sets), figsize=(8, 0.6 + 2.9 * len(sets)), layout="constrained", squeeze=False
    )
    for name, axis in zip(sets, panels.flat, strict=True):
        of_set = {c.split(", ")[0]: rows for c, rows in cases.items() if c.endswith(f", {name}")}
        for place, (what, (colour, hatch)) in enumerate(RANKS.items()):
            ratios = [rows[what]["ratio"] for rows in of_set.values()]
            left = [at + 0.27 * (place - 1) for at in range(len(of_set))]
            if what == "ideal":
                ends = [[at + side for at in range(len(of_set))] for side in (-0.42, 0.42)]
                axis.hlines(ratios, *ends, color=colour, label=what)
                continue
            axis.bar(left, ratios, 0.26, color=colour, hatch=hatch, edgecolor="white", label=what)
            for at, ratio in zip(left, ratios, strict=True):
                text = f"{ratio:.2f}".removeprefix("0")
                axis.annotate(text, (at, ratio), (0, 2), textcoords="offset points",
                              ha="center", fontsize=7)  # fmt: skip
        axis.set_xticks(range(len(of_set)), of_set)
        axis.grid(visible=False, axis="x")
        axis.set_ylim(0, 1.12)
        axis.set_ylabel("share of plain (no unit)")
        axis.set_title(name, fontsize=9)
    panels.flat[-1].set_xlabel("ranks x pairs of a micro-batch; a step has 128 pairs, the last 256")
    panels.flat[0].legend(loc="upper left", ncols=len(RANKS), fontsize=8)
    figure.suptitle("Tokens on the critical path, simulated")
    return figure


PICTURES = {"shared": (SHARED, draw_shared), "ranks": (RANKS, draw_ranks)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = ROOT / "outputs" / "bench_axolotl.json"
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", default=[default])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures", metavar="DIR")
    args = parser.parse_args()
    for file in args.files:
        if not file.is_file():
            parser.error(
                f"FILE must be what run.py writes, got {str(file)!r}, which isn't there: run "
                "python benchmarks/run.py shared --out FILE first"
            )
    found = {name: read(args.files, name, quantities) for name, (quantities, _) in PICTURES.items()}
    if not any(cases for _, cases in found.values()):
        parser.error("FILE must have results of the benchmark shared or ranks, got none")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out must be a folder, got {args.out}: {error}")
    for name, (machine, cases) in found.items():
        if cases:
            picture = args.out / f"{name}.svg"
            picture.write_bytes(rendered(PICTURES[name][1](machine, cases), "svg"))
            print(f"wrote {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
