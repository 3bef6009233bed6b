"""``axolotl focalpo ...``: our command among Axolotl's, through its entry point group."""

from __future__ import annotations

import sys

import click

from . import main


def _run(arguments: tuple[str, ...]) -> None:
    sys.exit(main(arguments, prog="axolotl focalpo"))


# It has no options of its own, not even --help: every word is for `focalpo`.
focalpo = click.Command(
    "focalpo",
    callback=_run,
    params=[click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)],
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    short_help="check a FocalPO run before it starts; curves, scores and reports",
)
