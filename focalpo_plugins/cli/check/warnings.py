"""Warnings about a run: what is likely to go wrong, although the host would start it."""

from __future__ import annotations

import math

from ...plan import Plan
from .counts import Counts, share, template_start
from .memory import GIB, Estimate, Room

# A pair is pushed the wrong way once its log-ratios differ by z*/beta nats.  In an ordinary run the
# log-probability of an answer of a few hundred tokens moves by tens of nats from its reference, and
# the margins of pairs ranked wrong reach -1 to -3.
_FEW_NATS = 50.0
_NEAR_MARGIN = 3.0
_MUCH_CUT = 0.1  # share of pairs


def warnings(
    plan: Plan, counts: Counts | None, memory: Estimate | None, room: Room | None
) -> list[str]:
    """The warnings, a sentence each, the host's own last; about data only if it was read."""
    found = []
    if memory is not None and room is not None and memory.least > room.size:
        found.append(
            f"the run doesn't fit into {room.said}: a rank needs more than "
            f"{memory.least / GIB:.1f} GiB. Use more GPUs with ZeRO-3, LoRA or QLoRA, a smaller "
            "micro-batch, or a precomputed reference."
        )
    if plan.loss is None:
        found.append(
            f"the loss is the host's own, {plan.host_loss}: no loss of focalpo_plugins is asked "
            "for (rl: focalpo in Axolotl, --loss focalpo in OpenRLHF, pref_loss: focalpo in "
            "LLaMA-Factory, --loss_type focalpo in ms-swift)."
        )
    if plan.precision == "fp16":
        found.append(
            "fp16: summed log-probabilities and their gradients leave its range easily. Use bf16."
        )
    star = plan.reversal()
    nats = plan.margin == "dpo"  # only then is z*/beta in nats
    if nats and star > -math.inf and (-star / plan.beta < _FEW_NATS or -star < _NEAR_MARGIN):
        found.append(
            f"beta {plan.beta:g} is large for this gamma: z* = {star:.2f} is reached if the "
            f"log-ratios differ by {-star / plan.beta:.3g} nats, which many pairs could pass; from "
            "there on they are pushed the wrong way. Lower gamma or beta, and watch the log's "
            "share `reversed`."
        )
    of_data = [] if counts is None else _of_data(plan, counts)
    return [*found, *of_data, *plan.warnings]


def _of_data(plan: Plan, counts: Counts) -> list[str]:
    found = [*_of_bos(plan, counts), *_of_template(plan, counts)]
    for what, why in (
        ("empty", "there is nothing in one answer to train on"),
        ("identical", "their margin stays 0, and they only dilute the batch"),
    ):
        number = getattr(counts, what)
        if number:
            found.append(f"{share(number, counts.pairs)} of the pairs are {what}: {why}.")
    if counts.truncated > _MUCH_CUT * counts.pairs:
        found.append(
            f"{share(counts.truncated, counts.pairs)} of the pairs are truncated to "
            f"{plan.max_length} tokens."
        )
    dropped = plan.rows - plan.kept
    if dropped > _MUCH_CUT * plan.rows:
        found.append(
            f"{share(dropped, plan.rows)} of the pairs are dropped by the host: they are too long, "
            "or it can't read them."
        )
    return found


def _of_bos(plan: Plan, counts: Counts) -> list[str]:
    found = []
    if counts.doubled_bos:
        found.append(
            f"BOS doubled at the start of {share(counts.doubled_bos, 2 * counts.pairs)} of the "
            "sequences: template and tokenizer both write it. Take it out of the template."
        )
    if counts.bos_in_answer:
        found.append(
            f"BOS in {share(counts.bos_in_answer, 2 * counts.pairs)} of the answers: the host "
            "took more than the answer for it, as Axolotl does if an answer is empty. Remove those "
            "pairs."
        )
    bos = plan.tokenizer.bos_token_id
    adds_bos = bos is not None and plan.tokenizer("a")["input_ids"][:1] == [bos]
    without_bos = 2 * counts.pairs - counts.starts_with_bos
    if adds_bos and without_bos:
        found.append(
            f"no BOS at the start of {share(without_bos, 2 * counts.pairs)} of the sequences, "
            "though this tokenizer puts one before a text."
        )
    return found


def _of_template(plan: Plan, counts: Counts) -> list[str]:
    found = []
    start = template_start(plan.tokenizer)
    if start is not None and not counts.starts_as_template:
        found.append(
            "none of the sequences begins as the tokenizer's chat template does, with "
            f"{plan.tokenizer.decode([start])!r}. Take a type: chat_template.* in Axolotl, "
            "--data.apply_chat_template in OpenRLHF, or the model's template in LLaMA-Factory and "
            "ms-swift, unless the model is meant to see plain text."
        )
    if counts.uncut_without_eos:
        found.append(
            f"no EOS ({plan.tokenizer.eos_token}) in "
            f"{share(counts.uncut_without_eos, 2 * counts.pairs)} of the answers, uncut ones: the "
            "model is not taught to stop. The template has to end an answer with the tokenizer's "
            "EOS."
        )
    return found
