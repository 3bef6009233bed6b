"""Counts what OpenRLHF's training computes, and leaves it in the folder of a run, one file a rank:

how many times a whole model was gone through, with and without gradients, and how many bytes of
weights the process held when the first step of training began.  As a program it is OpenRLHF's
command with our flags.
"""

import gc
import json
import os
from pathlib import Path

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from focalpo_plugins.openrlhf import cpu
from focalpo_plugins.openrlhf.train_dpo import main

cpu.stand_in()
from openrlhf.trainer.dpo_trainer import DPOTrainer  # noqa: E402

found = {"with gradients": 0, "without": 0, "held": 0}
fit = DPOTrainer.fit


def held():
    """Each storage once; under ZeRO-3 a parameter's share is beside it."""
    tensors = [thing for thing in gc.get_objects() if type(thing) is torch.nn.Parameter]
    tensors += [thing.ds_tensor for thing in tensors if hasattr(thing, "ds_tensor")]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def count(module, inputs):
    if type(module).__name__ == "LlamaForCausalLM":
        trains = torch.is_grad_enabled()
        if trains and not found["with gradients"]:
            found["held"] = held()
        found["with gradients" if trains else "without"] += 1


def counted_fit(self, *arguments, **more):
    fit(self, *arguments, **more)
    Path(f"counted{os.environ['RANK']}.json").write_text(json.dumps(found))


register_module_forward_pre_hook(count)
DPOTrainer.fit = counted_fit
if __name__ == "__main__":
    main()
