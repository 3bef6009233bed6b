"""Run ``focalpo`` with each of the argument lists on stdin, a line each, and report how it ended.

The modules named on the command line are imported first.
"""

import json
import os
import sys
import tempfile
from importlib import import_module

from forks import fork, wait

from focalpo_plugins.cli import main


def end_of(argv):
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        code = wait(fork(lambda: main(argv), stdout, stderr))
        for output in (stdout, stderr):
            output.seek(0)
        return [code, stdout.read(), stderr.read()]


reports = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what a host prints while it is imported is no report
for module in sys.argv[1:]:
    import_module(module)
for line in sys.stdin:
    print(json.dumps(end_of(json.loads(line))), file=reports, flush=True)
