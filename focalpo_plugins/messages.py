"""What this package says while a host runs."""

from __future__ import annotations

import sys


def say(what: str) -> None:
    """Write one line to stderr, in one write.

    ``print`` writes a line and its end separately where a launcher unbuffers its ranks, and another
    rank's line can then begin where ours should have ended.
    """
    sys.stderr.write(f"focalpo_plugins: {' '.join(what.splitlines())}\n")
    sys.stderr.flush()
