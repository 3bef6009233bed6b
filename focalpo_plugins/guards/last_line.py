"""The reason why a run ended, as the last line that its user reads.

A launcher prints its own traceback after the traceback of the process that it started.  So the
process that fails writes the reason to a file, whose name it finds in the environment, and the
launcher prints it when it ends.
"""

from __future__ import annotations

import atexit
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from tempfile import gettempdir
from types import ModuleType, TracebackType

from ..errors import FocalPOError
from .messages import say

#: The variable that names the file, in the system's folder for temporary files.
VARIABLE = "FOCALPO_LAST_LINE"
# A name that `patch` gives, with the launcher's process.  With any other, no file is touched.
_NAME = re.compile("focalpo_plugins-([0-9]+)-[0-9a-f]{16}")
_explain: Callable[[BaseException], str | None] | None = None


def patch(module: ModuleType | None = None) -> None:
    """Have this process, a launcher, print the reason when it ends.

    The autoload calls this in every launcher.  The outermost launcher of a run prints, also after
    another command has taken its place, as ``accelerate launch`` does in ``axolotl train``.
    """
    process = os.getpid()
    given = _NAME.fullmatch(os.environ.get(VARIABLE, ""))
    if given is None:
        os.environ[VARIABLE] = f"focalpo_plugins-{process}-{os.urandom(8).hex()}"
    elif given[1] != str(process):
        return
    atexit.register(_show, process)


def install(explain: Callable[[BaseException], str | None]) -> None:
    """Make the reason the last line if an exception ends this process.

    The reason is the message of an error that this package raised, or else what ``explain`` returns
    for the exception.  If that is None, nothing is added.  A later call replaces ``explain``: a
    notebook loads one config after the other.
    """
    global _explain
    installed, _explain = _explain is not None, explain
    if installed:
        return
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        before(kind, error, trace)
        with suppress(Exception):  # an error while explaining a failure must not hide it
            ours = isinstance(error, FocalPOError) or _explain is None
            reason = str(error) if ours else _explain(error)
            if reason is not None and not repeat(reason):
                say(reason)

    sys.excepthook = hook


def repeat(reason: str) -> bool:
    """Make the launcher print the reason when it ends, and return whether a launcher can.

    If several ranks fail, the first reason is kept.
    """
    given = _NAME.fullmatch(os.environ.get(VARIABLE, ""))
    if given is None:
        return False
    try:
        path = os.path.join(gettempdir(), given[0])
        # A path may hold bytes that aren't text, which Python reads as lone surrogates.
        with open(path, "x", encoding="utf-8", errors="backslashreplace") as file:
            file.write(" ".join(reason.split()))
    except FileExistsError:
        return True
    except OSError:  # a full disk, which may leave the file empty
        return False
    return True


def _show(process: int) -> None:
    if os.getpid() != process:  # a fork of the launcher
        return
    with suppress(Exception):  # nobody catches an error at the end of a process
        path = os.path.join(gettempdir(), os.environ[VARIABLE])
        with open(path, encoding="utf-8", errors="replace") as file:
            reason = file.read()
        if reason:
            say(reason)
        os.remove(path)
