"""The quantities of a report, and what the hosts call them."""

from __future__ import annotations

from collections.abc import Mapping

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

Series = dict[int, float]  # value by training step
#: By split (``train``, ``eval``, or ``eval_NAME`` for an evaluation set of that name) and quantity.
Log = dict[str, dict[str, Series]]


def quantities(points: Mapping[str, Mapping[str, Series]]) -> Log:
    """Change a host's names to this package's; what was not logged is left out."""
    series: Log = {}
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
