"""What the autoload costs a process that isn't a host, and what importing the package costs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

from measure import Result, compare, in_turns

# The autoload as torch calls it, timed in a process of its own: torch looks the entry points up
# whether or not we are there.
AUTOLOAD = """
import os, time
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
import torch
clock = time.perf_counter()
import _focalpo_plugins_autoload
_focalpo_plugins_autoload.autoload()
print(time.perf_counter() - clock)
"""
IMPORT = """
import os, time
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "{autoload}"
clock = time.perf_counter()
import {module}
print(time.perf_counter() - clock)
"""


def of_a_process(program: str) -> float:
    """Milliseconds that a fresh interpreter prints as seconds."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return 1e3 * float(done.stdout)


def measure(rounds: int) -> Iterator[Result]:
    def torch_with(autoload: int) -> float:
        return of_a_process(IMPORT.format(autoload=autoload, module="torch"))

    torch_with(1)
    ours, theirs = in_turns(lambda: torch_with(1), lambda: torch_with(0), rounds)
    yield compare("start", "import torch", "time", "ms", ours, theirs, "no backend autoload at all")
    cost = [of_a_process(AUTOLOAD) for _ in range(rounds)]
    yield compare("start", "our autoload alone", "time", "ms", cost, theirs, "import torch")
    package = [
        of_a_process(IMPORT.format(autoload=0, module="focalpo_plugins")) for _ in range(rounds)
    ]
    yield compare("start", "import focalpo_plugins", "time", "ms", package, theirs, "import torch")
