"""The data sets that a command line names, and why OpenRLHF could not read them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..errors import InvalidValue
from ..guards import jsonl, pairs, sources
from ..guards.messages import modules_of
from ..guards.rows import (
    CONVERSATIONS,
    MESSAGES,
    PROMPT_BESIDE,
    STRINGS,
    TEXTS,
    Description,
)
from ..guards.sources import Advice
from .names import installed_flag, nested_args

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


@dataclass(frozen=True)
class Source(sources.Source):
    """A name in ``--data.dataset`` or ``--eval.dataset``.

    Attributes:
        split_flag: the flag of its split, with its dashes.
        split: the split that is read.
        most: the number of rows that are read at most; None for all.
        args: the parsed command line.
    """

    split_flag: str
    split: str
    most: int | None
    args: Any

    @property
    def file(self) -> Path:
        """The path without what follows ``@``, which OpenRLHF takes for a folder in a data set."""
        return Path(self.path.partition("@")[0].strip())

    def load(self) -> Any:
        from openrlhf.datasets.utils import blending_datasets

        silent = SimpleNamespace(print=lambda *words: None, is_rank_0=lambda: False, args=self.args)
        most = {} if self.most is None else {"max_count": self.most}
        return blending_datasets(self.path, None, silent, dataset_split=self.split, **most)

    def in_use(self) -> str:
        template, key = self._flags()
        data = nested_args(self.args).data
        given = [template] * bool(data.apply_chat_template)
        given += [f"{key} {data.prompt_key}"] * bool(data.prompt_key)
        return f"the flags are {' '.join(given) or f'neither {template} nor {key}'}"

    def advice(self, rows: Description) -> Advice:
        template, key = self._flags()
        prompt = f"{key} {rows.prompt}"
        if rows.format not in _FLAGS:  # one message an answer
            return Advice(f"put each answer into a list, and give {template} {prompt}", False)
        needed, data = _FLAGS[rows.format], nested_args(self.args).data
        taken = needed == (bool(data.apply_chat_template), bool(data.prompt_key))
        given = [flag for flag, gives in zip((template, prompt), needed, strict=True) if gives]
        without = [flag for flag, gives in zip((template, key), needed, strict=True) if not gives]
        words = f"give {' '.join(given)} without" if given else "leave out"
        words = f"{words} {' and '.join(without)}".removesuffix(" without ")
        if rows.format == STRINGS:
            words += ", or, for a chat model, make message lists of them"
        return Advice(words, taken and data.prompt_key in (None, "", rows.prompt))

    def wrong(self) -> str | None:
        with suppress(Exception):  # the hub can't be asked for the splits
            return self.no_split() or super().wrong()
        return super().wrong()

    def no_split(self) -> str | None:
        """Why there is no such split; OpenRLHF would use all splits as one data set."""
        if self.file.suffix in _FILES:
            splits, what = ["train"], "a file"
        elif (self.file / "dataset_dict.json").is_file():
            written = (self.file / "dataset_dict.json").read_text(encoding="utf-8")
            splits, what = json.loads(written)["splits"], "this folder"
        elif (self.file / "state.json").is_file():  # one data set, saved without a split
            return None
        else:
            from datasets import get_dataset_split_names

            splits, what = get_dataset_split_names(str(self.file)), "this data set"
        if self.split in splits:
            return None
        return (
            f"{self.split_flag} must be a split of {self.key} {self.path!r}, got {self.split!r}: "
            f"{what} has only {', '.join(splits)}. Give {self.split_flag} {splits[0]}."
        )

    def _flags(self) -> list[str]:
        """``--data.apply_chat_template`` and ``--data.prompt_key``, as OpenRLHF spells them."""
        names = ("data.apply_chat_template", "data.prompt_key")
        return [f"--{installed_flag(name, vars(self.args))}" for name in names]


def listed(args: Any) -> list[Source]:
    """What is read for training and for evaluation, in order."""
    data, held_out, spell = nested_args(args).data, nested_args(args).eval, vars(args)
    columns = {"chosen": data.chosen_key, "rejected": data.rejected_key}
    if data.prompt_key:
        columns["prompt"] = data.prompt_key
    kinds = (
        ("data.dataset", data.dataset, "data.dataset_split", data.dataset_split, data.max_samples),
        ("eval.dataset", held_out.dataset, "eval.split", held_out.split, None),
    )
    return [
        Source(
            f"--{installed_flag(flag, spell)}",
            path.strip(),
            flag == "eval.dataset",
            columns,
            f"--{installed_flag(of_split, spell)}",
            split,
            most,
            args,
        )
        for flag, paths, of_split, split, most in kinds
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
    for source in listed(args):
        if source.file.suffix in _FILES and source.file.is_file():
            wrong = source.no_split()
            if wrong is not None:
                raise InvalidValue(wrong)
        jsonl.check_file(source.file, source.key, columns)


def check_cells(found: Sequence[Source]) -> None:
    """Refuse a row without a prompt or an answer.

    OpenRLHF stops when it reaches the row, maybe in the middle of training, or puts the word None
    into an input template.  Call it after OpenRLHF has read the data.

    Raises:
        ValueError: the message names flag, file, row and column.
    """
    for source in found:
        wrong = source.empty_cell()
        if wrong is not None:
            raise InvalidValue(wrong)


def explain(args: Any, error: BaseException) -> str | None:
    """Explain an error that was raised while OpenRLHF read the data.

    None if the error came from elsewhere, or if the rows fit the flags.

    Args:
        args: the parsed command line.
    """
    if not any(module.startswith("openrlhf.datasets") for module, _ in modules_of(error)):
        return None
    return sources.wrong_in(listed(args))


def remote_names(args: Any) -> dict[str, str]:
    """The names in the command line that may come from a hub, by flag."""
    models = {"model": nested_args(args).model, "ref": nested_args(args).ref}
    names = {f"{of}.model_name_or_path": model.model_name_or_path for of, model in models.items()}
    given = {
        f"--{installed_flag(flag, vars(args))}": str(name) for flag, name in names.items() if name
    }
    return sources.remote_names(given, listed(args))


def tokenized(dataset: Any) -> Iterator[pairs.Pair]:
    """Row, prompt, chosen and rejected answer of the pairs of a ``RewardDataset`` to check."""
    for row, (chosen, _, rejected, _, length) in pairs.sampled(dataset):
        chosen, rejected = chosen.flatten().tolist(), rejected.flatten().tolist()
        yield row, chosen[:length], chosen[length:], rejected[length:]
