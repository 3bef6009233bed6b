"""Run OpenRLHF's command with each of the command lines on stdin, and report how each ended."""

import json
import sys
import tempfile
from importlib import import_module

from forks import fork, wait

from focalpo_plugins.openrlhf import cpu
from focalpo_plugins.openrlhf.train_dpo import main

cpu.stand_in()
for module in ("datasets", "trainer.dpo_trainer", "utils.deepspeed"):
    import_module(f"openrlhf.{module}")


def end_of(argv):
    def run():
        sys.argv = ["train_dpo.py", *argv]
        main()

    with tempfile.TemporaryFile("w+") as output:
        code = wait(fork(run, output, output))
        output.seek(0)
        return [code, output.read()]


json.dump([end_of(argv) for argv in json.load(sys.stdin)], sys.__stdout__)
