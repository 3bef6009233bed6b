"""OpenRLHF in float32, which it has no flag for: what two runs round differently is then small."""

import torch
from openrlhf.utils import utils
from openrlhf.utils.deepspeed import deepspeed

utils.convert_to_torch_dtype = lambda name: torch.float32


def in_float32(make):
    return lambda *args, **kwargs: {**make(*args, **kwargs), "bf16": {"enabled": False}}


for name in ("get_train_ds_config", "get_eval_ds_config"):
    setattr(deepspeed, name, in_float32(getattr(deepspeed, name)))
