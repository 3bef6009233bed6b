"""Run ``focalpo`` with each of the argument lists on stdin, a line each, and report how it ended.

Every one runs in a process of its own, forked off this one once the modules named on the command
line are imported: importing a host takes longer than all the rest.
"""

import json
import os
import sys
import tempfile
import traceback
from importlib import import_module

from focalpo_plugins.cli import main


def end_of(argv):
    outputs = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
    child = os.fork()
    if child == 0:
        for number, output in enumerate(outputs, 1):
            os.dup2(output.fileno(), number)
        code = 1
        try:
            code = main(argv)
        except SystemExit as error:
            code = error.code
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for output in outputs:
        output.seek(0)
    return [code, *(output.read() for output in outputs)]


reports = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what a host prints while it is imported is no report
for module in sys.argv[1:]:
    import_module(module)
for line in sys.stdin:
    print(json.dumps(end_of(json.loads(line))), file=reports, flush=True)
