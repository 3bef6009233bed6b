"""Refuses files of preference pairs that a host can't read, and names file and line."""

from __future__ import annotations

import csv
import glob
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..errors import InvalidValue
from .messages import one_line

#: The suffixes of the files that are checked.
SUFFIXES = (".json", ".jsonl")

_DECODER = json.JSONDecoder()
_INK = re.compile(r"[^ \t\n\r]")  # characters that are not space in JSON
_TOO_DEEP = "its brackets are nested too deeply"
_NAMED = 3  # paths in a message
_READERS = "datasets.packaged_modules."  # of datasets, one for each format


def check_file(path: Path, name: str, columns: Sequence[str] = ()) -> None:
    """Refuse a local JSON file that is empty, that hosts can't read, or that lacks a column.

    The hosts' own errors name neither file nor line.  Hosts read either objects, each on one line
    or over several lines, or one array of objects.  A file of any other kind is only refused if its
    path is a pattern, by which hosts would read other files.

    Args:
        name: name of the key or flag for the file.
        columns: columns that every entry must have.

    Raises:
        ValueError: the message names the line.
    """
    _check_name(path, name)
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
    why = _refused_by_hosts(path)
    if why:
        line = _first_refused(path)
        place = "an entry" if line is None else f"line {line}"
        raise InvalidValue(
            f"{name} must be JSON lines, got {str(path)!r}, of which {place} can't be used: {why}. "
            "Fix that line, or remove it."
        )


def _check_name(path: Path, name: str) -> None:
    """Refuse the path of a file or folder that hosts take for a pattern of other paths.

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
            f"{name} must have a path without [ * ?, got {str(path)!r}: hosts take {str(whole)!r} "
            f"for a pattern, which matches {found}. Rename the file or its folder."
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
    return (row for _, row in _entries(path) if isinstance(row, dict))


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Place and value of each entry; the value is None if only the hosts can read it.

    Raises:
        ValueError: a line is broken; the message begins with its number.
    """
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            try:
                row = _object(line)
            except RecursionError:
                raise ValueError(f"line {number} can't be used: {_TOO_DEEP}") from None
            if row is not None:
                yield f"line {number}", row
            elif line.strip():
                break  # an array, an object over several lines, or broken
        else:
            return
    text = path.read_text(encoding="utf-8")
    try:
        values = _values(text.removeprefix("\ufeff"))
    except RecursionError:  # the hosts' reader may end the process
        raise ValueError(f"an entry can't be used: {_TOO_DEEP}") from None
    except ValueError:
        if _refused_by_hosts(path) != "":
            raise
        values = [None]
    # Some releases of datasets can't read an array after a byte order mark or a space.
    if text[0] not in "[{" and _refused_by_hosts(path):
        raise ValueError("line 1 can't be used: it must begin with the [ of an array, or a {")
    yield from ((f"entry {number}", value) for number, value in enumerate(values, 1))


def _refused_by_hosts(path: Path) -> str | None:
    """Why ``datasets``, which the hosts use, can't read the file; empty if it can.

    None if it is not installed.
    """
    try:
        from datasets import Features, load_dataset, logging
    except ImportError:
        return None
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # it logs what is refused, without the line
    try:
        whole = glob.escape(str(Path.cwd() / path))  # data_files are patterns
        data = load_dataset("json", data_files=whole, split="train", streaming=True)
        rows = 0
        for table in data.with_format("arrow").iter(batch_size=1000):
            rows += len(table)
            _ = Features.from_arrow_schema(table.schema).arrow_schema  # as where it is written
    except Exception as error:  # of pyarrow, pandas or datasets
        # The number of its row is counted from somewhere in the file.
        return re.sub(r" in row \d+$", "", one_line(error)).rstrip(".") or type(error).__name__
    finally:
        logging.set_verbosity(verbosity)
    return "" if rows else "no row is found in it"


def _first_refused(path: Path) -> int | None:
    """The first line up to which the hosts can't read a file, as a number from 1.

    None if the file is not JSON lines: an array, or objects over several lines.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = list(file)
    if any(line.strip() and _object(line) is None for line in lines):
        return None
    good, bad = 0, len(lines)
    with TemporaryDirectory() as folder:
        part = Path(folder, "part.jsonl")
        while bad - good > 1:
            middle = (good + bad) // 2
            part.write_text("".join(lines[:middle]), encoding="utf-8", newline="")
            # Nothing but blank lines is not refused.
            if any(map(str.strip, lines[:middle])) and _refused_by_hosts(part):
                bad = middle
            else:
                good = middle
    return bad


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
