"""The rows of a preference file as TRL's DPO takes them."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from datasets import Dataset, concatenate_datasets, load_dataset

from ..errors import InvalidValue
from ..guards.messages import meant

_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_UNDERSTOOD = (
    "chosen and rejected as texts or as lists of messages (role and content), and prompt, a text "
    "or messages, unless it is the start of both"
)
# Columns that Axolotl's strategies put into a prompt with their own templates.
_OTHER_PROMPTS = ("instruction", "input", "question", "system", "conversations")
# Columns of TRL's other data forms: TRL's test for conversations may read them, not the pair's.
_OTHER_FORMS = ("messages", "completion")


class _Pair(NamedTuple):
    """A pair; ``prompt`` is None if TRL has to find it in the two texts."""

    prompt: Any
    chosen: Any
    rejected: Any
    note: str = ""


def read_pairs(data: Path) -> tuple[Dataset, str]:
    """The file's pairs, and how they were read, for the user.

    All other columns are kept, because TRL puts some of them into the prompt too (``tools``).

    Raises:
        ValueError: the file's format, its columns or a row can't be used.
    """
    loaded = _read(data)
    _check_columns(loaded, data)
    columns = loaded.column_names
    asked = next((column for column in ("prompt", "messages") if column in columns), None)
    named = ["chosen", "rejected", *([asked] if asked else [])]
    pairs: list[_Pair] = []
    for number, row in enumerate(loaded.select_columns(named)):
        try:
            pairs.append(_pair(row, asked))
            if type(pairs[-1].chosen) is not type(pairs[0].chosen):
                raise InvalidValue(
                    "has texts where row 0 has messages, or messages where it has texts"
                )
        except InvalidValue as error:
            raise InvalidValue(
                f"DATA must hold a pair in each row, got {str(data)!r}: row {number} (the first is "
                f"0) {error}. Fix that row, or remove it."
            ) from None
    names = ["prompt", "chosen", "rejected"][pairs[0].prompt is None :]
    read = Dataset.from_dict({name: [getattr(pair, name) for pair in pairs] for name in names})
    replaced = {"prompt", "chosen", "rejected", *_OTHER_FORMS}
    rest = loaded.remove_columns([column for column in columns if column in replaced])
    if rest.column_names:
        read = concatenate_datasets([read, rest], axis=1)
    texts = isinstance(pairs[0].chosen, str)
    form = "texts as they are" if texts else "conversations by the chat template"
    return read, "; ".join([form, *sorted({pair.note for pair in pairs if pair.note})])


def _read(data: Path) -> Dataset:
    if data.suffix not in _FORMATS:
        raise InvalidValue(
            f"DATA must end in {', '.join(_FORMATS)}, got {str(data)!r}: convert it to one of them."
        )
    try:
        if data.suffix == ".csv":
            import pandas

            # As str, because an answer may be digits only.
            return Dataset.from_pandas(pandas.read_csv(data, dtype=str), preserve_index=False)
        with TemporaryDirectory() as cache:
            named = Path(cache, f"data{data.suffix}")  # `data_files` is a pattern, and a path isn't
            named.symlink_to(data.absolute())
            return load_dataset(
                _FORMATS[data.suffix], data_files=glob.escape(str(named)), split="train",
                cache_dir=cache, keep_in_memory=True,
            )  # fmt: skip
    except Exception as error:  # the readers raise errors of many kinds
        if isinstance(error.__cause__ or error, OSError):  # of the machine, not of what is in it
            raise
        why = " ".join(str(error.__cause__ or error).split())
        raise InvalidValue(f"DATA must be a preference file, got {str(data)!r}: {why}") from None


def _check_columns(loaded: Dataset, data: Path) -> None:
    columns = loaded.column_names
    missing = [column for column in ("chosen", "rejected") if column not in columns]
    if missing or len(loaded) == 0:
        near = "".join(meant(column, columns) for column in missing[:1]) or "."
        raise InvalidValue(
            f"DATA must have rows with chosen and rejected, got {str(data)!r} with {len(loaded)} "
            f"rows of {', '.join(columns) or 'nothing'}{near} Rename its columns. Accepted are "
            f"{_UNDERSTOOD}."
        )
    for column in ("image", "images"):
        if column in columns:
            raise InvalidValue(
                f"DATA must be pairs of texts, got {str(data)!r} with the column {column}: pairs "
                "with images can't be scored."
            )
    other = [column for column in _OTHER_PROMPTS if column in columns]
    if other and not {"prompt", "messages"} & {*columns} and isinstance(loaded[0]["chosen"], str):
        raise InvalidValue(
            f"DATA must have a prompt, got {str(data)!r} with {other[0]} instead, which Axolotl "
            "puts into its own template. Write the result of that template into prompt, chosen and "
            f"rejected. Accepted are {_UNDERSTOOD}."
        )


def _pair(row: Mapping[str, Any], asked: str | None) -> _Pair:
    """The pair of a row, in the form in which one of the hosts trains on it.

    Args:
        asked: the column beside ``chosen`` and ``rejected`` that may hold the prompt.

    Raises:
        InvalidValue: the row holds no pair; the message continues a text such as "row 3".
    """
    chosen, rejected = (_content(side, row[side]) for side in ("chosen", "rejected"))
    texts = isinstance(chosen, str)
    if texts != isinstance(rejected, str):
        raise InvalidValue("has a text as one answer and messages as the other")
    start = 0 if texts else _common_start(chosen, rejected)
    if start and not (asked == "prompt" and isinstance(row[asked], list)):
        note = "the prompt is their common start, and the column prompt is not used"
        whole = chosen[:start], chosen[start:], rejected[start:]
        return _Pair(*whole, note if asked == "prompt" else "")
    if asked is None:
        if not texts:
            raise InvalidValue("has no prompt: its two conversations begin with different messages")
        if not (chosen and rejected):
            raise InvalidValue("has an empty text as an answer, and no prompt")
        return _Pair(None, chosen, rejected)
    prompt = _content(asked, row[asked])
    if texts and asked == "prompt" and isinstance(prompt, str):
        return _Pair(prompt, chosen, rejected)
    note = "the prompt is messages" if asked == "messages" else ""
    if isinstance(prompt, str):
        prompt, note = [{"role": "user", "content": prompt}], f"{asked} is the user's message"
    if texts:
        chosen, rejected = ([{"role": "assistant", "content": it}] for it in (chosen, rejected))
    return _Pair(prompt, chosen, rejected, note)


def _content(column: str, value: Any) -> Any:
    """A cell's text or messages; a single message becomes a list."""
    if isinstance(value, str):
        return value
    if value is None:
        raise InvalidValue(
            f"has nothing in {column} (in a CSV, an empty cell, None and NA are read as nothing)"
        )
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list):
        raise InvalidValue(
            f"has {value!r} in {column}, which is neither a text nor a list of messages"
        )
    if not messages:
        raise InvalidValue(f"has no message in {column}")
    for message in messages:
        held = _held(message) if isinstance(message, dict) else {}
        if "role" not in held or len(held) < 2:
            raise InvalidValue(
                f"has {message!r} in {column}, which isn't a message with a role and a content"
            )
    return messages


def _common_start(chosen: list[Any], rejected: list[Any]) -> int:
    """Number of messages that both conversations begin with, without the last one of each."""
    both = zip(map(_held, chosen[:-1]), map(_held, rejected[:-1]), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))


def _held(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message's keys with values; a table adds the keys of other messages, with None."""
    return {key: value for key, value in message.items() if value is not None}
