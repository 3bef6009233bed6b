"""Run Axolotl's command as asked, with every rank forked off this process, which has it imported."""

import sys
import tempfile
from importlib import import_module

from forks import on_ranks, serve, world

MODULES = (
    "axolotl.cli.main", "axolotl.cli.train", "axolotl.cli.config", "axolotl.train",
    "axolotl.core.builders", "axolotl.loaders", "axolotl.common.datasets", "trl", "deepspeed",
    "peft", "bitsandbytes",
)  # fmt: skip


def end_of(asked):
    """Exit code and output."""

    def command():
        sys.argv = ["axolotl", *asked["argv"]]
        import_module("axolotl.cli.main").main()

    # Alone, Axolotl runs without the variables of a rank.
    ranks = world(asked["ranks"]) if asked["ranks"] > 1 else [{}]
    with tempfile.TemporaryFile("w+") as output:
        variables = [asked["env"] | of_rank for of_rank in ranks]
        code = on_ranks(command, asked["cwd"], variables, output, output)
        output.seek(0)
        return [code, output.read()]


if __name__ == "__main__":  # processes that data sets are written with import this file
    sys.argv = ["axolotl"]  # as the console script has it: a process that our autoload is meant for
    serve(MODULES, end_of, operators=("ShareMemCommBuilder",))
