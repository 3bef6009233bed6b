"""OpenRLHF's command with our flags, whose ranks that ``KILLED_RANKS`` names end without a word once
the step ``KILLED_AT`` is done."""

import os
import signal

from focalpo_plugins.openrlhf import cpu
from focalpo_plugins.openrlhf.train_dpo import main

cpu.stand_in()
from openrlhf.trainer.dpo_trainer import DPOTrainer  # noqa: E402

log_and_save = DPOTrainer.save_logs_and_checkpoints


def killed(self, args, global_step, *more, **kwargs):
    log_and_save(self, args, global_step, *more, **kwargs)
    to_be_killed = os.environ["RANK"] in os.environ["KILLED_RANKS"].split(",")
    if to_be_killed and global_step == int(os.environ["KILLED_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)


DPOTrainer.save_logs_and_checkpoints = killed
main()
