"""What the rows of a command line's data look like to OpenRLHF, and why it could not read them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..errors import InvalidValue
from ..guards import jsonl
from ..guards.last_line import modules_of
from ..guards.messages import one_line
from ..guards.rows import (
    CONVERSATIONS,
    MESSAGES,
    PROMPT_BESIDE,
    STRINGS,
    TEXTS,
    Look,
    look,
)
from .names import dotted, spelled

# Whether --data.apply_chat_template reads the format, and whether --data.prompt_key does.
_FLAGS = {
    CONVERSATIONS: (True, False),
    PROMPT_BESIDE: (True, False),
    MESSAGES: (True, True),
    STRINGS: (False, True),
    TEXTS: (False, False),
}


# The files that OpenRLHF reads by their suffix; such a file has one split.
_FILES = (".json", ".jsonl", ".csv", ".parquet", ".arrow")
_ONE_SPLIT = ["train"]


@dataclass(frozen=True)
class Source:
    """A file, a folder or a hub's data set that the command line names.

    Attributes:
        flag: the flag that names it, with its dashes.
        path: the name as it was given, without the spaces around it.
        split_flag: the flag of its split, with its dashes.
        split: the split that is read.
        most: the number of rows that are read at most; None for all.
        evaluation: whether it is evaluated.
    """

    flag: str
    path: str
    split_flag: str
    split: str
    most: int | None
    evaluation: bool

    @property
    def file(self) -> Path:
        """The path without what OpenRLHF takes for a folder inside a data set, after ``@``."""
        return Path(self.path.partition("@")[0].strip())


def sources(args: Any) -> list[Source]:
    """What is read for training and for evaluation, in order."""
    data, held_out, spell = dotted(args).data, dotted(args).eval, vars(args)
    kinds = (
        ("data.dataset", data.dataset, "data.dataset_split", data.dataset_split, data.max_samples),
        ("eval.dataset", held_out.dataset, "eval.split", held_out.split, None),
    )
    return [
        Source(
            f"--{spelled(flag, spell)}",
            path.strip(),
            f"--{spelled(of, spell)}",
            split,
            most,
            evaluation=flag == "eval.dataset",
        )
        for flag, paths, of, split, most in kinds
        if paths
        for path in str(paths).split(",")
    ]


def check_local(args: Any, columns: Sequence[str]) -> None:
    """Refuse local files that OpenRLHF can't read, and a split that a file doesn't have.

    Args:
        columns: columns that every row must have.

    Raises:
        ValueError: the message names flag and file, and the line of a broken one.
    """
    for source in sources(args):
        if source.file.suffix in _FILES and source.file.is_file():
            wrong = _no_split(source)
            if wrong is not None:
                raise InvalidValue(wrong)
        jsonl.check_file(source.file, source.flag, columns)


def check_cells(args: Any) -> None:
    """Refuse a row without a prompt or an answer.

    OpenRLHF stops when it meets the row, maybe in the middle of training, or puts the word None
    into an input template.  Call it after OpenRLHF has read the data.

    Raises:
        ValueError: the message names flag, file, row and column.
    """
    for source in sources(args):
        found = None
        with suppress(Exception):  # what can't be read again here, OpenRLHF has read already
            found = _empty_cell(args, source)
        if found is not None:
            raise InvalidValue(found)


def explain(args: Any, error: BaseException) -> str | None:
    """Explain an error that was raised while OpenRLHF read the data.

    None if the error came from elsewhere, or if the rows fit the flags.

    Args:
        args: the parsed command line.
    """
    if not any(module.startswith("openrlhf.datasets") for module, _ in modules_of(error)):
        return None
    return "; ".join(filter(None, (_wrong(args, source) for source in sources(args)))) or None


def described(args: Any) -> list[str]:
    """A line for each dataset: its rows, their format, and the flags that read it."""
    looks = ((source.path, _look(args, source, 1)) for source in sources(args))
    return [
        seen.line(path, f"{seen.format}, {_advice(args, seen)}") for path, seen in looks if seen
    ]


def hub_names(args: Any) -> dict[str, str]:
    """The names in the command line that may come from a hub, by flag."""
    of_host = dotted(args)
    names = {"model.model_name_or_path": of_host.model.model_name_or_path}
    names["ref.model_name_or_path"] = of_host.ref.model_name_or_path
    found = {f"--{spelled(flag, vars(args))}": str(name) for flag, name in names.items() if name}
    for source in sources(args):
        if not source.file.exists():  # of a list, what isn't here
            found[source.flag] = ", ".join(filter(None, (found.get(source.flag), source.path)))
    return found


def _wrong(args: Any, source: Source) -> str | None:
    """Why OpenRLHF can't read a source; None if nothing was found."""
    unreadable = None
    try:
        found = _no_split(source) or _empty_cell(args, source)
    except Exception as error:
        found = None
        if source.file.is_file():
            unreadable = (
                f"{source.flag} must be files that can be read, got {source.path!r}: "
                f"{one_line(_first(error)).rstrip('.')}. Fix that file, or remove it."
            )
    return found or _mismatch(args, source) or unreadable


def _first(error: BaseException) -> BaseException:
    """The error that began a chain of errors."""
    before = error.__cause__ or error.__context__
    return error if before is None else _first(before)


def _no_split(source: Source) -> str | None:
    """Why a source has no such split; OpenRLHF would take all splits for one data set."""
    if source.file.suffix in _FILES:
        splits, what = _ONE_SPLIT, "a file"
    elif (source.file / "dataset_dict.json").is_file():
        written = json.loads((source.file / "dataset_dict.json").read_text(encoding="utf-8"))
        splits, what = written["splits"], "this folder"
    elif (source.file / "state.json").is_file():  # one data set, saved without a split
        return None
    else:
        from datasets import get_dataset_split_names

        splits, what = get_dataset_split_names(str(source.file)), "this data set"
    if source.split in splits:
        return None
    return (
        f"{source.split_flag} must be a split of {source.flag} {source.path!r}, got "
        f"{source.split!r}: {what} has only {', '.join(splits)}. Give {source.split_flag} "
        f"{splits[0]}."
    )


def _empty_cell(args: Any, source: Source) -> str | None:
    """The first row without a prompt or an answer, in words; None if there is none."""
    rows, data = read(args, source), dotted(args).data
    first: dict[str, int] = {}
    for column in filter(None, (data.prompt_key, data.chosen_key, data.rejected_key)):
        if column in rows.column_names:
            row = rows.data.column(column).is_null().index(True).as_py()
            if row >= 0:
                first[column] = row
    if not first:
        return None
    column, row = min(first.items(), key=lambda found: found[1])
    fix = "Fill it, or remove the row."
    if source.file.suffix == ".csv":
        fix += " In a CSV words such as None, NA and null are read as an empty cell."
    return (
        f"{source.flag} must have prompt and answers in every row, got {source.path!r}, of which "
        f"row {row} (the first is 0) has an empty cell in the column {column!r}. {fix}"
    )


def _look(args: Any, source: Source, rows: int | None = None) -> Look | None:
    data = dotted(args).data
    try:
        found = islice(_rows(args, source), rows)
        return look(found, data.chosen_key, data.rejected_key, data.prompt_key)
    except Exception:  # the rows can't be read: the host reports it
        return None


def _rows(args: Any, source: Source) -> Iterator[Mapping[str, Any]]:
    if source.file.suffix in jsonl.SUFFIXES and source.file.is_file():
        return jsonl.rows(source.file)
    return iter(read(args, source))


def read(args: Any, source: Source) -> Any:
    """The rows of a source as OpenRLHF reads them, without a word."""
    from openrlhf.datasets.utils import blending_datasets

    silent = SimpleNamespace(print=lambda *words: None, is_rank_0=lambda: False, args=args)
    most = {} if source.most is None else {"max_count": source.most}
    return blending_datasets(source.path, None, silent, dataset_split=source.split, **most)


def _mismatch(args: Any, source: Source) -> str | None:
    seen = _look(args, source)
    if seen is None:
        return None
    data = dotted(args).data
    key = f"--{spelled('data.prompt_key', vars(args))}"
    template = _template(args)
    given = [template] * bool(data.apply_chat_template)
    given += [f"{key} {data.prompt_key}"] * bool(data.prompt_key)
    start = (
        f"{source.flag} {source.path!r}: its first row has {seen.words}, and "
        f"the flags are {' '.join(given) or 'neither ' + template + ' nor ' + key}"
    )
    as_given = bool(data.apply_chat_template), bool(data.prompt_key)
    fits = _FLAGS.get(str(seen.format)) == as_given and data.prompt_key in (None, "", seen.prompt)
    return seen.mismatch(start, fits, _advice(args, seen), "fit")


def _template(args: Any) -> str:
    return f"--{spelled('data.apply_chat_template', vars(args))}"


def _advice(args: Any, seen: Look) -> str:
    """The flags that read rows of this format."""
    key = f"--{spelled('data.prompt_key', vars(args))}"
    if seen.format not in _FLAGS:  # one message an answer, or none that a host reads
        return f"put each answer into a list, and give {_template(args)} {key} {seen.prompt}"
    template, prompt = _FLAGS[seen.format]
    flags = [_template(args)] * template + [f"{key} {seen.prompt}"] * prompt
    without = " and ".join([_template(args)] * (not template) + [key] * (not prompt))
    said = f"give {' '.join(flags)}" if flags else ""
    if without:
        said = f"{said} without {without}" if said else f"leave out {without}"
    if seen.format == STRINGS:
        said += ", or, for a chat model, make message lists of them"
    return said
