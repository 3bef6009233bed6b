"""Compile what DeepSpeed compiles when it is first used on a CPU, or find it compiled."""

import sys

from deepspeed.accelerator import get_accelerator


def load(*builders):
    for builder in builders:
        get_accelerator().create_op_builder(builder).load()


if __name__ == "__main__":
    load(*sys.argv[1:])
