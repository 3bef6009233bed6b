"""Writes down what OpenRLHF does with every pair, and spoils log-probabilities where it is asked to.

In the folder of a run, one file for each rank, a line for each of these, in their order:

``["train", pairs, margins]`` or ``["eval", pairs, margins]``: a batch, once its margins are known; a
pair is a digest of its token ids, a margin what follows from OpenRLHF's log-probabilities.
``["weights", digest]``: this rank's weights at the start, after each of OpenRLHF's optimizer steps,
with which most of them change nothing while it accumulates, and when training ended, by a fault
too.

``faults.json`` there may name one place, ``{"rank", "mode", "batch", "row", "value", "side"}``, whose
log-probability is made ``value``: of the policy's chosen, the policy's rejected, the reference's chosen
or the reference's rejected answer, by ``side`` from 0 to 3.  ``{"rank", "edited": true}`` edits all
training pairs of that rank when training begins.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from openrlhf.trainer.dpo_trainer import DPOTrainer
from openrlhf.utils.deepspeed import DeepspeedStrategy

forward, fit, step = (
    DPOTrainer.concatenated_forward,
    DPOTrainer.fit,
    DeepspeedStrategy.optimizer_step,
)
batches = {"train": 0, "eval": 0}
of_policy = []


def note(*what):
    with open(f"rank{os.environ['RANK']}.jsonl", "a") as file:
        print(json.dumps(what), file=file)


def fault():
    found = json.loads(Path("faults.json").read_text()) if Path("faults.json").exists() else {}
    return found if found.get("rank") == int(os.environ["RANK"]) else {}


def weights(engine):
    digest = hashlib.sha256()
    for parameter in engine.parameters():
        # Under ZeRO-3 a parameter is empty, and this rank's share is beside it.
        share = getattr(parameter, "ds_tensor", parameter).detach()
        digest.update(share.contiguous().flatten().view(torch.uint8).numpy().data)
    note("weights", digest.hexdigest())


def spoilt(logps, side, mode):
    wanted = fault()
    here = {"side": side, "mode": mode, "batch": batches[mode]}
    if wanted.items() >= here.items():
        change = torch.zeros_like(logps)
        change[wanted["row"]] = float(wanted["value"])
        return logps + change
    return logps


def watched_forward(self, model, chosen, chosen_mask, rejected, rejected_mask, lengths):
    found = forward(self, model, chosen, chosen_mask, rejected, rejected_mask, lengths)
    mode = "train" if self.model.training else "eval"
    first_side = 2 if model is self.ref_model else 0
    sides = [spoilt(found[side], first_side + side, mode) for side in (0, 1)]
    if first_side == 0:
        of_policy[:] = [side.detach() for side in sides]
    elif of_policy:  # not earlier, when the reference is precomputed
        policy = of_policy[0] - of_policy[1]
        margins = self.beta * (policy - (sides[0] - sides[1]))
        pairs = [
            hashlib.sha256(str([ids[mask.bool()].tolist() for ids, mask in pair]).encode())
            for pair in zip(
                zip(chosen, chosen_mask, strict=True),
                zip(rejected, rejected_mask, strict=True),
                strict=True,
            )
        ]
        note(mode, [pair.hexdigest()[:16] for pair in pairs], margins.tolist())
        batches[mode] += 1
    return *sides, *found[2:]


def watched_fit(self, *arguments, **more):
    if fault().get("edited"):
        data = self.train_dataloader.dataset
        data.chosens = ["No. " + chosen for chosen in data.chosens]
    weights(self.model.model)
    try:
        fit(self, *arguments, **more)
    finally:
        weights(self.model.model)


def watched_step(self, optimizer, model, *arguments, **more):
    step(self, optimizer, model, *arguments, **more)
    weights(model.model)


DPOTrainer.concatenated_forward = watched_forward
DPOTrainer.fit = watched_fit
DeepspeedStrategy.optimizer_step = watched_step
