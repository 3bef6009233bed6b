"""Run OpenRLHF's command with each of the command lines on stdin, and report how each ended.

Every one runs in a process of its own, forked off this one once OpenRLHF is imported: importing
it takes longer than all the rest.
"""

import json
import os
import sys
import tempfile
import traceback
from importlib import import_module

from focalpo_plugins.openrlhf import cpu
from focalpo_plugins.openrlhf.train_dpo import main

cpu.stand_in()
for module in ("datasets", "trainer.dpo_trainer", "utils.deepspeed"):
    import_module(f"openrlhf.{module}")


def end_of(argv):
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            sys.argv = ["train_dpo.py", *argv]
            code = 1
            try:
                main()
                code = 0
            except SystemExit as error:
                code = error.code
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        return [code, output.read()]


json.dump([end_of(argv) for argv in json.load(sys.stdin)], sys.__stdout__)
