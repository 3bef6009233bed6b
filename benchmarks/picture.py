"""Draw what shared prompts save: `python benchmarks/picture.py [FILE ...]`.

A file is one that run.py writes; without one, outputs/bench_axolotl.json of `nox -s bench` is read.
Each case of the benchmark `shared` has a bar for the time of a step and one for its peak memory, as
shares of TRL's own DPOTrainer, with the 95 % interval. Writes docs/pictures/shared.svg.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from focalpo_plugins.cli.plots import COLOURS, pyplot, rendered

ROOT = Path(__file__).resolve().parents[1]
# What a bar is of, in the words of shared_prompts.py, and its colour and filling.
QUANTITIES = {"step time": (COLOURS[1], ""), "peak memory": (COLOURS[5], "//")}


def read(files: list[Path]) -> tuple[dict[str, Any], dict[str, dict[str, dict[str, Any]]]]:
    """The machine, and by case and quantity what was measured; a later file replaces an earlier."""
    machine: dict[str, Any] = {}
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            of_shared = [row for row in content["results"] if row["benchmark"] == "shared"]
            for row in of_shared:
                cases.setdefault(row["case"], {})[row["quantity"]] = row
            if of_shared:
                machine = content["machine"]
        except (ValueError, LookupError, TypeError):
            raise SystemExit(
                f"FILE must be what run.py writes, got {str(file)!r}, which isn't whole: measure "
                "again"
            ) from None
    for case, rows in cases.items():
        for name in QUANTITIES:
            if name not in rows:
                raise SystemExit(f"FILE must have the {name} of each case, got none of {case!r}")
    return machine, cases


def draw(machine: dict[str, Any], cases: dict[str, dict[str, dict[str, Any]]]) -> Any:
    figure, axis = pyplot().subplots(figsize=(8, 1.2 + 0.62 * len(cases)), layout="constrained")
    drawn: dict[str, Any] = {}
    for at, rows in enumerate(cases.values()):
        for (name, (colour, hatch)), offset in zip(QUANTITIES.items(), (-0.2, 0.2), strict=True):
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
    machine, cases = read(args.files)
    if not cases:
        parser.error("FILE must have results of the benchmark shared, got none")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out must be a folder, got {args.out}: {error}")
    picture = args.out / "shared.svg"
    picture.write_bytes(rendered(draw(machine, cases), "svg"))
    print(f"wrote {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
