"""The reason why a run ended, as the last line that its user reads.

A launcher prints its own traceback after the traceback of the process that it started.  So the
process that fails writes the reason to a file, and the outermost process of the run prints it when
it ends.  The autoload of this package prepares the outermost process, and names the file in the
environment.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any

from .messages import say

#: The variable that names the file; ``_focalpo_plugins_autoload`` sets it.
VARIABLE = "FOCALPO_LAST_LINE"
_installed = False


def install(explain: Callable[[BaseException], str | None]) -> None:
    """Print the reason after the traceback of an exception that ends this process.

    The reason is the message of an error that this package raised, or else what ``explain`` returns
    for the exception.  If that is None, nothing is added.
    """
    global _installed
    if _installed:
        return
    _installed = True
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        before(kind, error, trace)
        with suppress(Exception):  # an error while explaining a failure must not hide it
            reason = str(error) if _is_ours(error) else explain(error)
            if reason is not None:
                _leave(reason)

    sys.excepthook = hook


def modules_of(error: BaseException) -> Iterator[tuple[str, str]]:
    """Module and function of each call that the error came through, the outermost first."""
    trace = error.__traceback__
    while trace is not None:
        frame: Any = trace.tb_frame
        yield str(frame.f_globals.get("__name__")), frame.f_code.co_name
        trace = trace.tb_next


def _is_ours(error: BaseException) -> bool:
    """Whether this package raised the error as a message for the user."""
    if not isinstance(error, ValueError | RuntimeError):
        return False
    *_, (module, _) = [("", ""), *modules_of(error)]
    return module.split(".")[0] == "focalpo_plugins"


def repeat(reason: str) -> None:
    """Make this process's launcher print the reason at its end; without one, do nothing."""
    path = os.environ.get(VARIABLE)
    if path is not None and f"-{os.getpid()}-" not in os.path.basename(path):
        _leave(reason)


def _leave(reason: str) -> None:
    """Write the reason to the file that the outermost process reads; print it if there is none.

    If several ranks fail, the first reason is kept.
    """
    reason = " ".join(reason.split())
    path = os.environ.get(VARIABLE)
    if path is None:
        say(reason)
        return
    with suppress(OSError), open(path, "x", encoding="utf-8") as file:
        file.write(reason)
