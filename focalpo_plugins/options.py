"""What each option of this package does, for the hosts' schemas and ``--help``."""

from __future__ import annotations

from collections.abc import Iterable

from .loss import VARIANTS

#: FocalPO's own options.
OF_FOCALPO = {
    "gamma": "Focusing parameter; 0 is DPO",
    "gamma_end": "Focusing parameter at the last step; gamma moves to it over the run",
    "gamma_schedule": "How gamma moves to gamma_end: linear or cosine; linear if it isn't given",
    "variant": f"Modulating factor: {', '.join(VARIANTS)}",
    "allow_reversed": "Accept a gamma that makes training run backwards",
}
#: The options of every loss; each exists only in the hosts where it does something.
OF_ANY_LOSS = {
    "margin": "Margin of the loss",
    "fused": "Compute the loss without holding all logits of the batch in memory",
    "shared_prompts": "Compute each pair's common start once instead of twice, and no padding",
    "balanced_batches": "Deal each optimizer step's pairs to ranks and micro-batches by length",
    "precompute_ref": "Compute the reference's log-probabilities once, keep them in a file, and "
    "free the reference before the first step",
    "precompute_dir": "Folder for the file of precompute_ref",
    "allow_changed": "Resume a checkpoint that was trained with another loss",
    "allow_data": "Train even if more than half of the data has a fault",
}


def of_margins(names: Iterable[str]) -> str:
    """What the option ``margin`` does in a host that has these, ``dpo`` among them."""
    *others, last = (name for name in names if name != "dpo")
    words = f"{', '.join(others)} or {last}"
    return f"{OF_ANY_LOSS['margin']}: dpo, or without a reference {words}"
