"""The files that a command writes: each whole or not at all, and never in a user's file's place."""

from __future__ import annotations

import csv
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

from ..guards.folders import write_whole
from . import CommandError
from .plots import HOW_TO_DRAW, MARK, pyplot, rendered

_DEFAULT_FORMATS = ("png", "csv")


class Output:
    """The folder of ``--out``, which is created, and the formats of ``--format``.

    Without ``--format``, a missing matplotlib only costs the pictures.

    Args:
        args: the command line.
        folder: the folder if the command line names none.
        tables: the names of the command's tables and pictures, each with what its CSV begins with.
        others: the command's other files, each with what it begins with.

    Raises:
        CommandError: a file of such a name is there and is not this command's, there can be no
            folder, or ``--format`` asks for a picture and matplotlib is missing.
    """

    def __init__(
        self,
        args: Namespace,
        folder: str,
        tables: Mapping[str, str],
        others: Mapping[str, str] | None = None,
    ) -> None:
        formats: Sequence[str] = args.format or _DEFAULT_FORMATS
        pictures = not {"png", "svg"}.isdisjoint(formats)
        self._plt = pyplot() if pictures else None
        self._left_out = pictures and self._plt is None
        if self._left_out and args.format:
            raise CommandError(f"--format {' '.join(formats)}: {HOW_TO_DRAW}, or give csv only.")
        self._formats = ["csv"] if self._left_out else formats
        self.folder = Path(args.out or folder)
        starts = {f"{name}.{kind}": start for name, start in tables.items() for kind in formats}
        for file, start in {**(others or {}), **starts}.items():
            if not _is_ours(self.folder / file, start.encode()):
                raise CommandError(
                    f"--out {str(self.folder)!r} holds a {file} that this command did not write; "
                    "nothing was changed. Move that file, or give another --out."
                )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CommandError(
                f"--out must be a folder, got {str(self.folder)!r}: {error.strerror}."
            ) from None

    def save(
        self, name: str, table: Sequence[Sequence[object]], draw: Callable[[Any], Any]
    ) -> list[Path]:
        """Write a table, whose first row is its header, and its picture, in the formats asked for.

        Args:
            draw: returns the figure; it is given matplotlib's pyplot.
        """
        written = []
        if "csv" in self._formats:
            text = StringIO()
            csv.writer(text).writerows(table)
            written.append(write(self.folder / f"{name}.csv", text.getvalue()))
        if self._plt is not None:
            figure = draw(self._plt)
            for kind in self._formats:
                if kind != "csv":
                    written.append(write(self.folder / f"{name}.{kind}", rendered(figure, kind)))
            self._plt.close(figure)
        return written

    def say(self, written: Iterable[Path]) -> None:
        """Print which files were written, and how to get the pictures if they were left out."""
        print("wrote " + ", ".join(map(str, written)))
        if self._left_out:
            print(f"no picture: {HOW_TO_DRAW}")


def _is_ours(path: Path, start: bytes) -> bool:
    """Whether nothing is lost if we write the file again."""
    if not path.is_file():
        return True
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError:
        return False
    if path.suffix in (".png", ".svg"):
        return not head or MARK.encode() in head
    return head.startswith(start[: len(head)])


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise :class:`CommandError` if one of our files can't be written inside."""
    try:
        yield
    except OSError as error:
        raise CommandError(
            f"--out must be a folder with room that can be written to, got {str(path.parent)!r}: "
            f"{path.name}: {error.strerror}. Make room, or name another."
        ) from None


def write(path: Path, content: str | bytes) -> Path:
    """Write one of our files, whole or not at all, and return ``path``."""
    with writing(path):
        write_whole(path, content)
    return path
