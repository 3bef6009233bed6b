"""Run OpenRLHF's command as asked, with every rank forked off this process, which has it imported.

The modules named on the command line are imported after it.
"""

import functools
import sys

from forks import captured, on_ranks, serve, world

from focalpo_plugins.openrlhf import cpu
from focalpo_plugins.openrlhf.train_dpo import main


def end_of(asked):
    """Exit code, stdout and stderr."""

    def command():
        sys.argv = ["train_dpo.py", *asked["argv"]]
        main()

    return captured(
        lambda *outputs: on_ranks(command, asked["cwd"], world(asked["ranks"]), *outputs)
    )


cpu.stand_in()
from openrlhf.datasets import RewardDataset  # noqa: E402

# It would fork eight processes off each rank, for a handful of rows.
RewardDataset.__init__ = functools.partialmethod(RewardDataset.__init__, num_processors=None)

host = ("openrlhf.datasets", "openrlhf.trainer.dpo_trainer", "openrlhf.utils.deepspeed")
operators = ("FusedAdamBuilder", "ShareMemCommBuilder")
serve((*host, *sys.argv[1:]), end_of, operators)
