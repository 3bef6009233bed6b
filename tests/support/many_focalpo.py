"""Run ``focalpo`` with each of the argument lists asked for, forked off this process.

The modules named on the command line are imported first.
"""

import sys
import tempfile

from forks import fork, serve, wait

from focalpo_plugins.cli import main


def end_of(argv):
    """Exit code, stdout and stderr."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        code = wait(fork(lambda: main(argv), stdout, stderr))
        for output in (stdout, stderr):
            output.seek(0)
        return [code, stdout.read(), stderr.read()]


serve(sys.argv[1:], end_of)
