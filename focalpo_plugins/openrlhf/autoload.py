"""Makes ``--loss`` a flag of OpenRLHF's command; called once, before OpenRLHF is imported.

OpenRLHF has no plug-in mechanism, and it builds its parser under ``if __name__ == "__main__"``,
where no other code can reach it.  So argparse's methods are wrapped until that parser parses.
"""

from __future__ import annotations

import functools
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from . import COMMAND, cpu


def patch(module: ModuleType | None = None) -> None:
    """Prepare this process, which runs OpenRLHF's command, for ``--loss``."""
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

        return parse_watched

    for name, parse in originals.items():
        setattr(ArgumentParser, name, watched(parse))


def _is_openrlhf(caller: Mapping[str, Any]) -> bool:
    name = str(caller.get("__name__"))
    if name == "__main__":
        file = Path(str(caller.get("__file__")))  # a script run by its path has no spec
        spec = caller.get("__spec__")
        name = ".".join(file.with_suffix("").parts[-3:]) if spec is None else spec.name
    return name == COMMAND or name.startswith("openrlhf.")
