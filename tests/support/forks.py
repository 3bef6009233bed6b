"""A function in a process forked off this one, as a command of its own: importing a host takes
longer than all the rest of a short run."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import IO


def fork(function: Callable[[], int | None], stdout: IO, stderr: IO) -> int:
    """The child's process id; it ends with what ``function`` returns, exits with or raises."""
    child = os.fork()
    if child:
        return child
    os.dup2(stdout.fileno(), 1)
    os.dup2(stderr.fileno(), 2)
    code: object = 1
    try:
        code = function()
    except SystemExit as error:
        code = error.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def wait(child: int) -> int:
    """Its exit code; of one that a signal ended, less than 0."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
