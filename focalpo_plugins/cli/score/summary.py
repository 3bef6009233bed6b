"""Rewards and margins from log-probabilities; their means, and their histogram."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

_BINS = 40
_GROUPS = {"all pairs": None, "reference ranks right": True, "reference ranks wrong": False}


def with_rewards(found: dict[str, Any], beta: float) -> dict[str, Any]:
    """Add rewards ``beta * (log p - log p_ref)``, the margin, and if the reference ranks right."""
    chosen = beta * (found["chosen_logp"] - found["ref_chosen_logp"])
    rejected = beta * (found["rejected_logp"] - found["ref_rejected_logp"])
    return {
        **found,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "margin": chosen - rejected,
        "ref_right": found["ref_chosen_logp"] > found["ref_rejected_logp"],
    }


def groups_of(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Means over all pairs, and over those that the reference ranks right and wrong."""
    return {name: _means(records, right) for name, right in _GROUPS.items()}


def _means(records: Sequence[dict[str, Any]], ref_right: bool | None) -> dict[str, Any]:
    group = [r for r in records if ref_right is None or r["ref_right"] is ref_right]
    n = len(group)
    if n == 0:
        return {"pairs": 0}
    margins = [r["margin"] for r in group]
    return {
        "pairs": n,
        "accuracy": sum(m > 0 for m in margins) / n,
        "margin": statistics.fmean(margins),
        "margin_standard_error": statistics.stdev(margins) / math.sqrt(n) if n > 1 else None,
        "chosen_reward": sum(r["chosen_reward"] for r in group) / n,
        "rejected_reward": sum(r["rejected_reward"] for r in group) / n,
    }


def print_summary(summary: dict[str, Any]) -> None:
    print(f"\n{'':<22} {'pairs':>6} {'accuracy':>9} {'margin':>9} {'+- s.e.':>8} "
          f"{'chosen':>9} {'rejected':>9}")  # fmt: skip
    for name, group in summary["groups"].items():
        line = f"{name:<22} {group['pairs']:>6}"
        if group["pairs"]:
            error = group["margin_standard_error"]
            line += f" {group['accuracy']:>9.4f} {group['margin']:>9.4f} "
            line += f"{'-' if error is None else f'{error:.4f}':>8} "
            line += f"{group['chosen_reward']:>9.4f} {group['rejected_reward']:>9.4f}"
        print(line)
    print(
        "\nRewards and margins in nats, at beta "
        f"{summary['beta']:g}. The reference ranks a pair right if the summed\nlog-probability "
        "of the chosen answer is above that of the rejected one; accuracy is the share\nof margins "
        "above 0."
    )
    if summary["dropped"]:
        print(
            f"{summary['dropped']} of {summary['rows']} rows were dropped: the prompt by "
            "itself fills --max-length."
        )


def histogram(records: Sequence[dict[str, Any]]) -> tuple[list[float], list[list[int]]]:
    """Edges of the bins, and each bin's numbers of pairs that the reference ranks right, wrong."""
    margins = [record["margin"] for record in records]
    reach = max(map(abs, margins), default=0) or 1.0
    # Symmetric around 0, so that 0 is an edge: no bin holds margins of both signs.
    edges = [reach * (2 * i / _BINS - 1) for i in range(_BINS + 1)]
    counts = [[0] * _BINS, [0] * _BINS]
    for record in records:
        place = min(int((record["margin"] / reach + 1) / 2 * _BINS), _BINS - 1)
        counts[not record["ref_right"]][place] += 1
    return edges, counts


def draw(plt: Any, edges: list[float], counts: list[list[int]]) -> Any:
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    names = [
        f"{name} ({sum(group)})" for name, group in zip(list(_GROUPS)[1:], counts, strict=True)
    ]
    axis.stairs(counts[0], edges, fill=True, color="#a6cbe3", edgecolor="#0072B2", label=names[0])
    axis.stairs(counts[1], edges, color="#D55E00", linewidth=1.8, label=names[1])
    axis.axvline(0, color="#888888", linewidth=1)
    axis.set_xlabel("reward margin z (nats); right of 0 the model ranks the pair right")
    axis.set_ylabel("pairs")
    axis.legend(loc="upper left", bbox_to_anchor=(0, 1.14), ncols=2)
    return figure
