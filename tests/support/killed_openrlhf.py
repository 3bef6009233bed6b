"""Silently ends the ranks that ``KILLED_RANKS`` names, once the step ``KILLED_AT`` is done."""

import os
import signal

from openrlhf.trainer.dpo_trainer import DPOTrainer

log_and_save = DPOTrainer.save_logs_and_checkpoints


def killed(self, args, global_step, *more, **kwargs):
    log_and_save(self, args, global_step, *more, **kwargs)
    to_be_killed = os.environ["RANK"] in os.environ["KILLED_RANKS"].split(",")
    if to_be_killed and global_step == int(os.environ["KILLED_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)


DPOTrainer.save_logs_and_checkpoints = killed
