"""Run ``focalpo`` with each of the argument lists asked for, forked off this process.

The modules named on the command line are imported first.
"""

import sys

from forks import captured, fork, serve, wait

from focalpo_plugins.cli import main


def end_of(argv):
    """Exit code, stdout and stderr."""
    return captured(lambda *outputs: wait(fork(lambda: main(argv), *outputs)))


serve(sys.argv[1:], end_of)
