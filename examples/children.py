"""Commands that end with the script that started them, for eval/pipeline.py and study/study.py."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

PATIENCE = 60.0  # seconds that a command gets to end by itself
# A killed script can't end its commands. This process notices that its parent is gone, and does.
WATCH = """
import os, signal, sys, time
parent, group = int(sys.argv[1]), int(sys.argv[2])
while os.getppid() == parent:
    time.sleep(0.2)
os.killpg(group, signal.SIGTERM)
time.sleep(float(sys.argv[3]))
os.killpg(group, signal.SIGKILL)
"""


@contextlib.contextmanager
def child(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A command in its own process group, which ends with the block or with this process.

    Args:
        command: the words.
        options: of :class:`subprocess.Popen`.
    """
    nothing = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    with contextlib.ExitStack() as ends:
        process = subprocess.Popen(command, start_new_session=True, **options)
        ends.callback(end, process)
        words = [WATCH, str(os.getpid()), str(process.pid), str(PATIENCE)]
        watcher = subprocess.Popen(
            [sys.executable, "-IS", "-c", *words], start_new_session=True, **nothing
        )
        ends.callback(watcher.wait)
        ends.callback(watcher.kill)
        yield process


def end(process: subprocess.Popen[bytes]) -> None:
    """End a command's whole group: its children may outlive it."""
    with contextlib.suppress(ProcessLookupError):
        try:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
        finally:  # after a second Ctrl-C too
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
