"""``python -m focalpo_plugins.openrlhf.train_dpo``: OpenRLHF's command with ``--loss``.

It is needed only if the autoload is off.  It takes the same flags and launchers.
"""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec

from ..guards.messages import say
from ..releases import install
from . import COMMAND


def main() -> None:
    """Run OpenRLHF's command in this process."""
    if find_spec("openrlhf") is None:
        say(f"OpenRLHF is not installed here. {install('openrlhf')}")
        sys.exit(1)
    from .autoload import patch

    patch()
    runpy.run_module(COMMAND, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
