"""Run Axolotl's command as asked on stdin, a JSON line each, and answer with how it ended.

Every process of a run is forked off this one once Axolotl is imported: importing it takes longer
than all the rest of a short run.
"""

import json
import os
import signal
import socket
import sys
import tempfile
import traceback
from importlib import import_module

MODULES = (
    "axolotl.cli.main", "axolotl.cli.train", "axolotl.cli.config", "axolotl.train",
    "axolotl.core.builders", "axolotl.loaders", "axolotl.common.datasets", "trl", "deepspeed",
    "peft", "bitsandbytes",
)  # fmt: skip
LONGEST = 600  # seconds, after which a run that hangs is ended


def fork(argv, cwd, env, output):
    child = os.fork()
    if child:
        return child
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    signal.alarm(LONGEST)
    os.chdir(cwd)
    os.environ.update(env)
    sys.argv = ["axolotl", *argv]
    code = 1
    try:
        import_module("axolotl.cli.main").main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else error.code is not None
        if code and not isinstance(error.code, int):
            print(error.code)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end_of(argv, cwd, env, ranks):
    """Exit code and output; with several ranks their variables are set as torchrun sets them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with tempfile.TemporaryFile("w+") as output:
        children = [
            fork(
                argv,
                cwd,
                {**env, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else env,
                output,
            )
            for rank in range(ranks)
        ]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        output.seek(0)
        return [max(codes, key=abs), output.read()]


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
