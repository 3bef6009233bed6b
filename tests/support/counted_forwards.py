"""OpenRLHF's command with our flags, which leaves in the folder $COUNTED, one file for each rank:

how many times a whole model was gone through, with and without gradients, and how many bytes of
weights the process held when the first step of training began.
"""

import gc
import json
import os
from pathlib import Path

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from focalpo_plugins.openrlhf.train_dpo import main

found = {"with gradients": 0, "without": 0, "held": 0}


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


register_module_forward_pre_hook(count)
main()
Path(os.environ["COUNTED"], f"{os.environ['RANK']}.json").write_text(json.dumps(found))
