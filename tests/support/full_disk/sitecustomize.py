"""Faults of this process's disk, when a file comes up whose name holds a word.

``FULL_AT``: once the file is opened to be written, no file may grow beyond 64 bytes.
``KILLED_AT_NAMING``: this process ends without a word where it would give the file its name.
"""

import os
import resource
import signal
import sys

FULL_AT, KILLED_AT = (os.environ.get(name) for name in ("FULL_AT", "KILLED_AT_NAMING"))


def spoil(event, arguments):
    if event == "open" and FULL_AT and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        if FULL_AT in os.path.basename(str(arguments[0])):
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
    elif event == "os.rename" and KILLED_AT and KILLED_AT in os.path.basename(str(arguments[1])):
        os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(spoil)
