"""Run OpenRLHF's command as asked on stdin, a JSON line each, and answer with how it ended.

Every rank of a run is a process of its own, forked off this one once OpenRLHF is imported.
"""

import json
import os
import signal
import sys
import tempfile
from importlib import import_module

from forks import fork, wait
from harness import free_port

from focalpo_plugins.openrlhf import cpu
from focalpo_plugins.openrlhf.train_dpo import main

LONGEST = 600  # seconds, after which a run that hangs is ended


def end_of(argv, cwd, ranks):
    """Exit code, stdout and stderr; the variables of the ranks are set as torchrun sets them."""
    world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}

    def run(rank):
        signal.alarm(LONGEST)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(cwd)
        os.environ.update(world | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        sys.argv = ["train_dpo.py", *argv]
        main()

    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        children = [fork(lambda rank=rank: run(rank), stdout, stderr) for rank in range(ranks)]
        code = max((wait(child) for child in children), key=abs)
        for output in (stdout, stderr):
            output.seek(0)
        return [code, stdout.read(), stderr.read()]


answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # nothing else may be mistaken for an answer
cpu.stand_in()
for module in ("datasets", "trainer.dpo_trainer", "utils.deepspeed"):
    import_module(f"openrlhf.{module}")
for line in sys.stdin:
    print(json.dumps(end_of(**json.loads(line))), file=answers, flush=True)
