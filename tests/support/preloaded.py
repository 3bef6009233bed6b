"""What the processes of ``forked`` have imported: this environment's host, and what it needs on a CPU.

As a program it leaves the bytecode behind, and what DeepSpeed compiles when it is first used; with
names of DeepSpeed's builders, only that.
"""

import functools
import gc
import sys
from importlib import import_module
from importlib.util import find_spec

HOSTS = {
    "openrlhf": (
        "openrlhf.datasets", "openrlhf.trainer.dpo_trainer", "openrlhf.utils.deepspeed",
    ),
    "axolotl": (
        "axolotl.cli.main", "axolotl.cli.train", "axolotl.cli.config", "axolotl.train",
        "axolotl.core.builders", "axolotl.loaders", "axolotl.common.datasets", "axolotl.utils.trainer",
        "deepspeed", "bitsandbytes", "trl.trainer.dpo_trainer", "trackio",
    ),
    "llamafactory": ("llamafactory.launcher", "llamafactory.train.tuner", "transformers.models.llama.modeling_llama"),
    "swift": (
        "swift.pipelines.train.rlhf", "swift.rlhf_trainers.dpo_trainer", "swift.dataset",
        "transformers.models.llama.modeling_llama", "deepspeed", "focalpo_plugins.swift.trainer",
    ),
    "trl": ("trl.trainer.dpo_trainer", "transformers.models.llama.modeling_llama"),
}  # fmt: skip
OPERATORS = {"openrlhf": ("FusedAdamBuilder", "ShareMemCommBuilder"), "axolotl": ("ShareMemCommBuilder",), "swift": ("ShareMemCommBuilder",)}  # fmt: skip
TOOLS = ("torch", "peft", "tqdm", "matplotlib.pyplot")


def load() -> None:
    host = next((name for name in HOSTS if find_spec(name)), None)
    if host == "openrlhf":
        on_a_cpu()
    for name in (*HOSTS.get(host, ()), *TOOLS):
        if find_spec(name.partition(".")[0]):
            import_module(name)
    compiled(*OPERATORS.get(host, ()))
    gc.freeze()  # no process has to scan everything that was imported


def compiled(*builders: str) -> None:
    if builders:
        from deepspeed.accelerator import get_accelerator

        for builder in builders:
            get_accelerator().create_op_builder(builder).load()


def on_a_cpu() -> None:
    from focalpo_plugins.openrlhf import cpu

    cpu.stand_in()
    from openrlhf.datasets import RewardDataset

    # It would fork eight processes off each rank, for a handful of rows.
    RewardDataset.__init__ = functools.partialmethod(RewardDataset.__init__, num_processors=None)


if __name__ == "__main__" and sys.argv[1:]:
    compiled(*sys.argv[1:])
else:
    load()
