"""``python -m focalpo_plugins`` is ``focalpo``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m focalpo_plugins"))
