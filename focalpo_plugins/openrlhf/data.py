"""What the rows of a command line's data look like to OpenRLHF, and why it could not read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..guards import jsonl
from ..guards.last_line import modules_of
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


def explain(args: Any, error: BaseException) -> str | None:
    """Explain an error that was raised while OpenRLHF read the data.

    None if the error came from elsewhere, or if the rows fit the flags.

    Args:
        args: the parsed command line.
    """
    if not any(module.startswith("openrlhf.datasets") for module, _ in modules_of(error)):
        return None
    return "; ".join(filter(None, (_mismatch(args, path) for path in _paths(args)))) or None


def described(args: Any) -> list[str]:
    """A line for each dataset: its rows, their format, and the flags that read it."""
    looks = ((path, _look(args, path, 1)) for path in _paths(args))
    return [
        seen.line(path, f"{seen.format}, {_advice(args, seen)}") for path, seen in looks if seen
    ]


def hub_names(args: Any) -> dict[str, str]:
    """The names in the command line that may come from a hub, by flag."""
    of_host = dotted(args)
    names = {"model.model_name_or_path": of_host.model.model_name_or_path}
    names["ref.model_name_or_path"] = of_host.ref.model_name_or_path
    names["data.dataset"] = of_host.data.dataset
    return {f"--{spelled(flag, vars(args))}": str(name) for flag, name in names.items() if name}


def _paths(args: Any) -> list[str]:
    return [path.strip() for path in str(dotted(args).data.dataset).split(",")]


def _look(args: Any, path: str, rows: int | None = None) -> Look | None:
    data = dotted(args).data
    try:
        found = islice(_rows(args, path), rows)
        return look(found, data.chosen_key, data.rejected_key, data.prompt_key)
    except Exception:  # the rows can't be read: the host reports it
        return None


def _rows(args: Any, path: str) -> Iterator[Mapping[str, Any]]:
    if Path(path).suffix in jsonl.SUFFIXES and Path(path).is_file():
        return jsonl.rows(Path(path))
    from openrlhf.datasets.utils import blending_datasets

    silent = SimpleNamespace(print=lambda *words: None)
    split = dotted(args).data.dataset_split
    return iter(blending_datasets(path, None, silent, dataset_split=split))


def _mismatch(args: Any, path: str) -> str | None:
    seen = _look(args, path)
    if seen is None:
        return None
    data = dotted(args).data
    key = f"--{spelled('data.prompt_key', vars(args))}"
    template = _template(args)
    given = [template] * bool(data.apply_chat_template)
    given += [f"{key} {data.prompt_key}"] * bool(data.prompt_key)
    start = (
        f"--{spelled('data.dataset', vars(args))} {path!r}: its first row has {seen.words}, and "
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
