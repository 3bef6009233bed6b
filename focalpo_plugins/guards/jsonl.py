"""Refuses data files that a host can't read, and names file and line."""

from __future__ import annotations

import csv
import glob
import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..errors import InvalidValue
from .messages import meant, one_line

#: The suffixes of the files whose content is checked.
SUFFIXES = (".json", ".jsonl")

_DECODER = json.JSONDecoder()
_INK = re.compile(r"[^ \t\n\r]")  # characters that are not space in JSON
_NAMED = 3  # paths in a message
_READERS = "datasets.packaged_modules."  # of datasets, one for each format


def check_file(path: Path, name: str, columns: Sequence[str] = ()) -> None:
    """Refuse a local JSON file that is empty, that hosts can't read, or that lacks a column.

    The hosts' own errors name neither file nor line.  Hosts read either objects, each on one line
    or over several lines, or one array of objects.  Any other file is only refused if its path
    is a pattern by which hosts would read other files.

    Args:
        name: name of the key or flag for the file.
        columns: columns that every entry must have.

    Raises:
        ValueError: the message names the line.
    """
    _check_path(path, name)
    if path.suffix not in SUFFIXES or not path.is_file():
        return
    got = f"got {str(path)!r}"
    try:
        wrong = _wrong(path, columns)
    except UnicodeDecodeError as error:
        raise InvalidValue(f"{name} must be in UTF-8, {got} ({error}). Save it as UTF-8.") from None
    if wrong == "":
        raise InvalidValue(f"{name} must hold a pair, {got}: the file is empty.")
    if wrong is not None:
        end = "" if wrong.endswith("?") else "."
        raise InvalidValue(
            f"{name} must be JSON lines, {got}: {wrong}{end} Fix that line, or remove it."
        )


def _wrong(path: Path, columns: Sequence[str]) -> str | None:
    """The first entry that can't be used, and why; empty if there is none, None if all can be."""
    refused, place = _refused_by_hosts(path), ""
    try:
        for place, row in _entries(path):
            missing = next((column for column in columns if column not in row), None)
            if missing is not None:
                has = (", ".join(row) or "nothing") + meant(missing, row)
                return f"{place} can't be used: it has no {missing!r}, got {has}"
    except json.JSONDecodeError as error:
        # The hosts' reader accepts a little more.
        return None if refused is None else f"line {error.lineno} can't be used: {error.msg}"
    if not place or refused is None:
        return None if place else ""
    text = path.read_text(encoding="utf-8")
    if text[0] != "[" and text.lstrip("\ufeff \t\n\r")[0] == "[":  # not in all releases of datasets
        return "line 1 can't be used: it must begin with the [ of its array"
    line = f"line {_first_refused(path)}" if place.startswith("line") else "an entry"
    return f"{line} can't be used: {refused}"


def _check_path(path: Path, name: str) -> None:
    """Refuse the path of a file or folder that hosts would read as a pattern of other paths.

    The path is a part of the pattern, and so is the current folder before a relative one.
    """
    whole = Path.cwd() / path
    if not (glob.has_magic(str(whole)) and whole.exists()):
        return
    saved = ("state.json", "dataset_dict.json")  # by datasets, which then takes the path as it is
    read = sorted(glob.glob(str(whole)))
    if read != [str(whole)] and not any((whole / name).exists() for name in saved):
        found = ", ".join(read[:_NAMED]) + ", ..." * (len(read) > _NAMED) or "nothing"
        raise InvalidValue(
            f"{name} must have a path without [ * ?, got {str(path)!r}: hosts read {str(whole)!r} "
            f"as a pattern, which matches {found}. Rename the file or its folder."
        )


def broken_file(error: BaseException) -> str | None:
    """Which file of any format ``datasets`` could not read, and why; None for other errors."""
    cause: BaseException | None = error
    while cause is not None:
        trace = cause.__traceback__
        while trace is not None:
            frame: Any = trace.tb_frame
            module = str(frame.f_globals.get("__name__"))
            file = frame.f_locals.get("file") if module.startswith(_READERS) else None
            if isinstance(file, str) and Path(file).is_file():
                why = one_line(cause).rstrip(".")
                line = _cut_record(file) if "EOF inside string" in why else None
                place = "" if line is None else f", in the row that begins in line {line}"
                return f"{file!r} can't be read{place}: {why}. Fix that file."
            trace = trace.tb_next
        cause = cause.__cause__
    return None


def _cut_record(file: str) -> int | None:
    """The line where a CSV's row begins that has no closing quote."""
    start = 1
    try:
        with open(file, encoding="utf-8", errors="replace", newline="") as lines:
            rows = csv.reader(lines, strict=True)
            for _ in rows:
                start = rows.line_num + 1
    except csv.Error:
        return start
    except OSError:
        return None
    return None


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON file, in order.

    Raises:
        ValueError: a line is broken; the message begins with its number.
    """
    return (row for _, row in _entries(path))


def _entries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and value of each object: on its own line, in an array, or over several lines.

    Raises:
        json.JSONDecodeError: a line is broken.
    """
    start, why = 0, ""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            try:
                found = _objects(line.rstrip("\n"))
            except json.JSONDecodeError as error:
                why = error.msg
                break
            yield from ((f"line {number}", row) for row in found)
            start += len(line)
        else:
            return
    text = path.read_text(encoding="utf-8-sig")
    try:
        found = _objects(text)
    except json.JSONDecodeError:
        if line.lstrip().startswith("[") or not any(map(_is_object, text.split("\n"))):
            raise
        # JSON lines: a line that is cut may go on in the next one, and fail further down.
        raise json.JSONDecodeError(why, text, start) from None
    yield from ((f"entry {number}", row) for number, row in enumerate(found, 1))


def _objects(text: str) -> list[dict[str, Any]]:
    """The objects in ``text``, one after the other or in arrays.

    Raises:
        json.JSONDecodeError: there is something else.
    """
    objects: list[dict[str, Any]] = []
    end = 0
    while (ink := _INK.search(text, end)) is not None:
        start = ink.start()
        try:
            value, end = _DECODER.raw_decode(text, start)
        except RecursionError:
            message = "its brackets are nested too deeply"
            raise json.JSONDecodeError(message, text, start) from None
        found = value if isinstance(value, list) else [value]
        if not all(isinstance(row, dict | None) for row in found):
            raise json.JSONDecodeError("it is not one JSON object", text, start)
        objects += (row or {} for row in found)  # hosts read null as an entry without columns
    return objects


def _is_object(line: str) -> bool:
    with suppress(json.JSONDecodeError):
        return line.startswith("{") and bool(_objects(line))
    return False


def _refused_by_hosts(path: Path) -> str | None:
    """Why ``datasets``, which the hosts use, can't read a JSON file; None if it can."""
    from datasets import Features, load_dataset, logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # it logs what is refused, without the line
    try:
        whole = glob.escape(str(Path.cwd() / path))  # data_files are patterns
        data = load_dataset("json", data_files=whole, split="train", streaming=True)
        for table in data.with_format("arrow").iter(batch_size=1000):
            _ = Features.from_arrow_schema(table.schema).arrow_schema  # as the hosts do
    except Exception as error:  # of pyarrow, pandas or datasets
        # The number of its row is counted from somewhere in the file.
        return re.sub(r" in row \d+$", "", one_line(error)).rstrip(".") or type(error).__name__
    finally:
        logging.set_verbosity(verbosity)
    return None


def _first_refused(path: Path) -> int:
    """The first line up to which the hosts can't read JSON lines, as a number from 1."""
    with path.open("rb") as file:
        lines = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
    with TemporaryDirectory() as folder:
        part = Path(folder, "part.jsonl")

        def refused(count: int) -> bool:
            part.write_bytes(b"".join(line for _, line in lines[:count]))
            return _refused_by_hosts(part) is not None

        last = bisect_left(range(1, len(lines)), True, key=refused)
    return lines[last][0]
