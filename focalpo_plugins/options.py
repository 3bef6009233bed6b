"""What each of our options does, for Axolotl's schema, TRL's config and the hosts' ``--help``."""

from __future__ import annotations

from collections.abc import Iterable

from .loss import SCHEDULES, VARIANTS

#: FocalPO's own options.
OF_FOCALPO = {
    "gamma": "Focusing parameter; 0 is DPO",
    "gamma_end": "Focusing parameter at the last step, which gamma moves to over the run",
    "gamma_schedule": f"How it moves: {', '.join(SCHEDULES)}; linear unless given",
    "variant": f"Modulating factor: {', '.join(VARIANTS)}",
    "allow_reversed": "Accept a gamma with which training runs backwards",
}
#: The options of every loss; each exists only in the hosts where it does something.
OF_ANY_LOSS = {
    "margin": "Margin of the loss",
    "fused": "Compute the loss without ever holding the logits of the batch",
    "shared_prompts": "Compute each pair's common start once, and no padding",
    "balanced_batches": "Deal each optimizer step's pairs to ranks and micro-batches by length",
    "precompute_ref": "Compute the reference's log-probabilities once, keep them in a file, and "
    "free the reference before the first step",
    "precompute_dir": "Folder of precompute_ref's file",
    "allow_changed": "Resume a checkpoint that another loss has trained",
    "allow_data": "Train on data that mostly can't be learnt from",
}


def of_margins(names: Iterable[str]) -> str:
    """What the option ``margin`` does in a host that has these, ``dpo`` among them."""
    *others, last = (name for name in names if name != "dpo")
    words = f"{', '.join(others)} or {last}"
    return f"{OF_ANY_LOSS['margin']}: dpo, or without a reference {words}"
