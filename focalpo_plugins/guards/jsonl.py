"""Refuses files of preference pairs that a host can't read, and names the line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import InvalidValue

#: The suffixes of the files that are checked.
SUFFIXES = (".json", ".jsonl")

_DECODER = json.JSONDecoder()
_INK = re.compile(r"[^ \t\n\r]")  # characters that are not space in JSON


def check_file(path: Path, name: str, columns: Sequence[str] = ()) -> None:
    """Refuse a local JSON file that is empty, that hosts can't read, or that lacks a column.

    The hosts' own errors name neither file nor line.  Hosts read either objects, each on one line
    or over several lines, or one array of objects.

    Args:
        name: name of the key or flag for the file.
        columns: columns that every entry must have.

    Raises:
        ValueError: the message names the line.
    """
    if path.suffix not in SUFFIXES or not path.is_file():
        return
    entries = 0
    try:
        for place, row in _entries(path):
            entries += 1
            for column in columns:
                if isinstance(row, dict) and column not in row:
                    got = ", ".join(row) or "nothing"
                    raise ValueError(f"{place} can't be used: it has no {column!r}, got {got}")
    except UnicodeDecodeError as error:
        raise InvalidValue(
            f"{name} must be in UTF-8, got {str(path)!r} ({error}). Write it again in UTF-8."
        ) from None
    except ValueError as error:
        raise InvalidValue(
            f"{name} must be JSON lines, got {str(path)!r}, of which {error}. Fix that line, or "
            "remove it."
        ) from None
    if not entries:
        raise InvalidValue(f"{name} must hold a pair, got {str(path)!r}, which is empty.")


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON file, in order.

    Raises:
        ValueError: a line is broken; the message begins with its number.
    """
    return (row for _, row in _entries(path) if isinstance(row, dict))


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Place and value of each entry; the value is None if only the hosts can read it.

    Raises:
        ValueError: a line is broken; the message begins with its number.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            row = _object(line)
            if row is not None:
                yield f"line {number}", row
            elif line.strip():
                break  # an array, an object over several lines, or broken
        else:
            return
    text = path.read_text(encoding="utf-8")
    try:
        values = _values(text.removeprefix("\ufeff"))
    except ValueError:
        if not _read_by_hosts(path):
            raise
        values = [None]
    # Some releases of datasets can't read an array after a byte order mark or a space.
    if text[0] not in "[{" and _read_by_hosts(path) is False:
        raise ValueError("line 1 can't be used: it must begin with the [ of an array, or a {")
    yield from ((f"entry {number}", value) for number, value in enumerate(values, 1))


def _read_by_hosts(path: Path) -> bool | None:
    """Whether ``datasets``, which the hosts use, can read the file; None if not installed."""
    try:
        from datasets import load_dataset
    except ImportError:
        return None
    try:
        read = load_dataset("json", data_files=str(path), split="train", streaming=True)
        for _ in read.with_format("arrow").iter(batch_size=1000):
            pass
    except Exception:  # of pyarrow, pandas or datasets
        return False
    return True


def _object(text: str) -> dict[str, Any] | None:
    """``text`` as a JSON object; None if it is not one that the hosts can read."""
    try:
        value = json.loads(text)
        _check_surrogates(text, value)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _values(text: str) -> list[Any]:
    """The objects in ``text``, one after the other or in one array.

    Raises:
        ValueError: the text is broken; the message begins with the number of the line.
    """
    try:
        return _parsed(text)
    except json.JSONDecodeError as error:
        whole = error
    lines = text.split("\n")
    opening = next((line for line in lines if line.strip()), "")
    is_array = opening.lstrip().startswith("[") and _why_broken(opening) is not None
    if not is_array and any(line.startswith("{") and _object(line) is not None for line in lines):
        # JSON lines: a line that is cut may continue into the next one, and fail further down.
        for number, line in enumerate(lines, 1):
            if line.strip() and _object(line) is None:
                why = _why_broken(line) or "it is not one JSON object"
                raise ValueError(f"line {number} can't be used: {why}")
    raise ValueError(f"line {whole.lineno} can't be used: {whole.msg}")


def _parsed(text: str) -> list[Any]:
    if text.lstrip().startswith("["):
        value = json.loads(text)
        _check_surrogates(text, value)
        return list(value)
    values: list[Any] = []
    end = 0
    while (start := _INK.search(text, end)) is not None:
        value, end = _DECODER.raw_decode(text, start.start())
        if not isinstance(value, dict | None):
            raise json.JSONDecodeError("it is not one JSON object", text, start.start())
        _check_surrogates(text[start.start() : end], value)
        values.append(value or {})  # hosts read null as an entry without columns
    return values


def _why_broken(text: str) -> str | None:
    try:
        _parsed(text)
    except json.JSONDecodeError as error:
        return error.msg
    return None


def _check_surrogates(text: str, value: Any) -> None:
    """Refuse half of a surrogate pair, which Python reads and the hosts don't."""
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise json.JSONDecodeError("it has half of a surrogate pair", text, 0) from None
