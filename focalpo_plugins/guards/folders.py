"""Checks of folders, and files that are written completely or not at all."""

from __future__ import annotations

import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

from ..errors import InvalidValue


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a whole file, or leave the old one unchanged if anything fails.

    Raises:
        OSError: it can't be written.
    """
    if isinstance(content, str):
        # A path may hold bytes that aren't text, which Python reads as lone surrogates.
        content = content.encode(errors="backslashreplace")
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(OSError):  # it has been moved, or was never created
            temporary.unlink()


def check_folder(path: Path, name: str) -> None:
    """Create a folder if it doesn't exist, and check that a file can be written there.

    A run then fails now, and not when it saves.

    Args:
        name: name of the key or flag for the folder.

    Raises:
        ValueError: no file can be written there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InvalidValue(
            f"{name} must be a writable folder, got {str(path)!r}: {error.strerror}. Choose "
            "another, or change its permissions."
        ) from None
