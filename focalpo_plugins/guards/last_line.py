"""The reason why a run ended, as the last line that its user reads.

A launcher prints its own traceback after the traceback of the process that it started.  So the
process that fails writes the reason to a file, and the outermost process of the run prints it when
it ends.  The autoload of this package prepares the outermost process, and names the file in the
environment.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from tempfile import gettempdir
from types import TracebackType
from typing import Any

from ..errors import FocalPOError
from .messages import say

#: The variable that names the file; ``_focalpo_plugins_autoload`` sets it.
VARIABLE = "FOCALPO_LAST_LINE"
# A name that the autoload gives: with any other, nothing is written.
_NAME = re.compile("focalpo_plugins-[0-9a-f]+-[0-9a-f]+")
_explain: Callable[[BaseException], str | None] | None = None


def install(explain: Callable[[BaseException], str | None]) -> None:
    """Print the reason after the traceback of an exception that ends this process.

    The reason is the message of an error that this package raised, or else what ``explain`` returns
    for the exception.  If that is None, nothing is added.  A later call replaces ``explain``: a
    sweep loads one config after the other.
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
            name = os.environ.get(VARIABLE)
            if reason is not None and (name is None or not _leave(name, reason)):
                say(reason)

    sys.excepthook = hook


def modules_of(error: BaseException) -> Iterator[tuple[str, str]]:
    """Module and function of each call that the error came through, the outermost first."""
    trace = error.__traceback__
    while trace is not None:
        frame: Any = trace.tb_frame
        yield str(frame.f_globals.get("__name__")), frame.f_code.co_name
        trace = trace.tb_next


def repeat(reason: str) -> None:
    """Make this process's launcher print the reason at its end; without a launcher, do nothing."""
    name = os.environ.get(VARIABLE)
    if name is not None and f"-{os.getpid()}-" not in name:
        _leave(name, reason)


def _leave(name: str, reason: str) -> bool:
    """Write the reason to the file that the outermost process reads; False if it can't be written.

    If several ranks fail, the first reason is kept.
    """
    if _NAME.fullmatch(name) is None:
        return False
    path = None
    try:
        path = os.path.join(gettempdir(), name)
        # A path may hold bytes that are no text, which Python reads as lone surrogates.
        with open(path, "x", encoding="utf-8", errors="backslashreplace") as file:
            file.write(" ".join(reason.split()))
    except FileExistsError:
        return True
    except OSError:
        if path is not None:
            with suppress(OSError):
                os.remove(path)  # a part of it would mislead
        return False
    return True
