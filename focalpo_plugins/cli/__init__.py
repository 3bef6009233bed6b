"""``focalpo``: check a run before it is paid for, and look at its results.

Each command is a module of its own, imported when it is used: ``focalpo --help`` imports neither
torch nor a host.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from ..errors import FocalPOError
from .arguments import parser_of


class CommandError(FocalPOError):
    """An error in the command line or in a file that it names, in one line for the user."""


def main(argv: Sequence[str] | None = None, prog: str = "focalpo") -> int:
    """Run one command; ``argv`` is without the program's name.

    Returns:
        0, or 1 for the warnings of ``check --strict``, or 2 for an error, which is on stderr.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    # Everything after `check --` is another program's command line.
    host_argv = None
    if argv[:1] == ["check"] and "--" in argv:
        at = argv.index("--")
        argv, host_argv = argv[:at], argv[at + 1 :]
    parser = parser_of(prog)
    args = parser.parse_args(argv)
    if args.version:
        print(f"focalpo_plugins {version('focalpo_plugins')}")
        return 0
    if args.command is None:
        parser.print_help()
        return 0
    args.host_argv = host_argv
    if hasattr(sys.stdout, "reconfigure"):  # a path may hold bytes that are no text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return int(import_module(f".{args.command}", __name__).run(args))
    except FocalPOError as error:
        print(f"{prog} {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog} {args.command}: interrupted", file=sys.stderr)
        return 130
