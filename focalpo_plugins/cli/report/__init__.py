"""``focalpo report``: compare runs side by side, from the hosts' own logs."""

from __future__ import annotations

import math
import re
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from typing import Any

from ..output import Output
from .picture import draw
from .runs import Run, read_runs

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
_NAMED = 4  # runs in the name of a folder


def run(args: Namespace) -> int:
    runs = read_runs(args.runs)
    output = Output(args, _folder_of(runs), {"report": ",".join(_COLUMNS[:4])})
    for each in runs:
        print(f"{each.name}: {each.source}")
        for note in each.notes:
            print(f"  {note}")
    rows = [row for each in runs for row in _rows(each)]
    print()
    _print_table(rows)
    print(
        "\ntrain: mean of the last tenth of the logged steps; eval: the last evaluation. First "
        "loss: of the\nfirst logged step, and of an evaluation before it. Losses of different "
        "kinds can't be compared\nwith each other; margins and accuracies can. OpenRLHF logs the "
        "rewards of each step's last\nmicro-batch, and none in evaluation."
    )
    cells = [["" if row[c] != row[c] else row[c] for c in _COLUMNS] for row in rows]  # NaN
    output.say(output.save("report", [_COLUMNS, *cells], partial(draw, runs=runs)))
    return 0


def _folder_of(runs: Sequence[Run]) -> str:
    """A folder that is named by its runs, so that reports of different runs don't replace each
    other."""
    names = [re.sub(r"[^\w.]+", "_", run.name) for run in runs[:_NAMED]]
    more = [f"{len(runs) - _NAMED}-more"] if len(runs) > _NAMED else []
    return "-".join(["report", *names, *more])


def _rows(run: Run) -> list[dict[str, Any]]:
    """The table's rows: the mean of the last tenth of the steps, and the last evaluation."""
    found = []
    for split, quantities in run.series.items():
        losses = quantities.get("loss") or next(iter(quantities.values()))
        steps = sorted(losses)
        tail = steps[-max(1, len(steps) // 10) :] if split == "train" else steps[-1:]
        row: dict[str, Any] = {"run": run.name, "split": split, "step": steps[-1]}
        # Only an evaluation at step 0 has the first loss.
        first = steps[0] if split == "train" else 0
        row["first_loss"] = quantities.get("loss", {}).get(first, math.nan)
        for column in _COLUMNS[4:]:
            series = quantities.get(column, {})
            values = [series[step] for step in tail if step in series]
            row[column] = sum(values) / len(values) if values else math.nan
        found.append(row)
    return found


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
