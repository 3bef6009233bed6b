"""Adds the flag ``--loss`` to OpenRLHF's command; called once, before OpenRLHF is imported.

OpenRLHF has no plug-in mechanism, and it builds its parser under ``if __name__ == "__main__"``,
where no other code can reach it.  So argparse's methods are wrapped until that parser parses.
"""

from __future__ import annotations

import functools
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Callable
from types import ModuleType
from typing import Any

from _focalpo_plugins_autoload import command_of

from . import COMMAND, cpu

_MARK = "_of_focalpo_plugins"


def patch(module: ModuleType | None = None) -> None:
    """Prepare this process, which runs OpenRLHF's command, for ``--loss``; once."""
    if hasattr(ArgumentParser.parse_args, _MARK):
        return
    cpu.stand_in()
    originals = {name: getattr(ArgumentParser, name) for name in ("parse_args", "parse_known_args")}

    def watched(parse: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(parse)
        def parse_watched(self: ArgumentParser, args: Any = None, *more: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1).f_globals
            if not _is_openrlhf(caller):
                return parse(self, args, *more, **kwargs)
            for name, original in originals.items():
                setattr(ArgumentParser, name, original)
            try:
                from . import flags
            except Exception as error:  # a run that doesn't use --loss must continue
                warnings.warn(
                    f"focalpo_plugins: no --loss ({type(error).__name__}: {error})", stacklevel=2
                )
                return parse(self, args, *more, **kwargs)
            return flags.parse(functools.partial(parse, self), self, args, *more, **kwargs)

        setattr(parse_watched, _MARK, True)
        return parse_watched

    for name, parse in originals.items():
        setattr(ArgumentParser, name, watched(parse))


def _is_openrlhf(caller: dict[str, Any]) -> bool:
    return command_of(caller) == COMMAND or str(caller.get("__name__")).startswith("openrlhf.")
