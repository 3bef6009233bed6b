"""Run Axolotl's command as asked on stdin, a JSON line each, and answer with how it ended.

Every rank of a run is a process of its own, forked off this one once Axolotl is imported.
"""

import json
import os
import signal
import sys
import tempfile
from importlib import import_module

from forks import fork, wait
from harness import free_port

MODULES = (
    "axolotl.cli.main", "axolotl.cli.train", "axolotl.cli.config", "axolotl.train",
    "axolotl.core.builders", "axolotl.loaders", "axolotl.common.datasets", "trl", "deepspeed",
    "peft", "bitsandbytes",
)  # fmt: skip
LONGEST = 600  # seconds, after which a run that hangs is ended


def end_of(argv, cwd, env, ranks):
    """Exit code and output; with several ranks their variables are set as torchrun sets them."""
    world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}

    def run(rank):
        signal.alarm(LONGEST)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(cwd)
        os.environ.update(env)
        if ranks > 1:
            os.environ.update(world | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        sys.argv = ["axolotl", *argv]
        import_module("axolotl.cli.main").main()

    with tempfile.TemporaryFile("w+") as output:
        children = [fork(lambda rank=rank: run(rank), output, output) for rank in range(ranks)]
        code = max((wait(child) for child in children), key=abs)
        output.seek(0)
        return [code, output.read()]


def main():
    sys.argv = ["axolotl"]  # as the console script has it: a process that our autoload is meant for
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing else may be mistaken for an answer
    for module in MODULES:
        import_module(module)
    for line in sys.stdin:
        print(json.dumps(end_of(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":  # processes that data sets are written with import this file
    main()
