"""The data sets that arguments name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..guards.jsonl import check_file


def check_files(args: Any) -> None:
    """Refuse local files of pairs that can't be read.

    Raises:
        ValueError: the message names key and file, and the line of a broken one.
    """
    for key in ("dataset", "val_dataset"):
        for name in getattr(args, key, None) or ():
            path = _path(str(name))
            if path is not None:
                check_file(path, key)


def _path(name: str) -> Path | None:
    """The file that an entry of ``dataset`` names, which may end with ``#`` and a number of rows."""
    for written in (name, name.rpartition("#")[0]):
        if written and Path(written).is_file():
            return Path(written)
    return None
