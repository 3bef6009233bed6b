"""Faults of this process's disk.

``FULL_AT``: once a file is opened to be written whose name holds this, no file may grow beyond 64
bytes.
``KILLED_AT_NAMING``: this process ends without a word where it would give such a file its name.
``PERMISSIONS_HOLD``: a file's and a folder's permissions hold, also for root.
"""

import ctypes
import os
import resource
import signal
import sys

FULL_AT, KILLED_AT, PERMISSIONS_HOLD = (
    os.environ.get(name) for name in ("FULL_AT", "KILLED_AT_NAMING", "PERMISSIONS_HOLD")
)


def spoil(event, arguments):
    if event == "open" and FULL_AT and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        if FULL_AT in os.path.basename(str(arguments[0])):
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
    elif event == "os.rename" and KILLED_AT and KILLED_AT in os.path.basename(str(arguments[1])):
        os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(spoil)

if PERMISSIONS_HOLD:
    # capset(2): version 3, this process, and three times 64 bits of no capability at all.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")
