"""Run Python scripts as asked, with every rank forked off this process.

The modules named on the command line are imported before.  A script imports all others itself, from
the folders that are asked for before any other.
"""

import runpy
import sys

from forks import captured, on_ranks, serve, world


def end_of(asked):
    """Exit code, stdout and stderr."""

    def command():
        sys.path[:0] = asked["path"]
        sys.argv = asked["argv"]
        runpy.run_path(sys.argv[0], run_name="__main__")

    ranks = world(asked["ranks"]) if asked["ranks"] > 1 else [{}]
    return captured(lambda *outputs: on_ranks(command, asked["cwd"], ranks, *outputs))


if __name__ == "__main__":
    serve(sys.argv[1:], end_of)
