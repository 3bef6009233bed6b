"""LLaMA-Factory's data sets: why it could not read them, and prompts that it has cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..guards import hub, pairs, sources
from ..guards.faults import Catalogue, Fault
from ..guards.jsonl import broken_file
from ..guards.messages import modules_of
from ..guards.rows import ONE_MESSAGE, STRINGS, Description
from ..guards.sources import Advice

_FORMATS = {ONE_MESSAGE: ("sharegpt", "messages"), STRINGS: ("alpaca", "prompt")}
# What dataset_info.json has to say of messages with role and content.
_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
}
_CATALOGUE = Catalogue(
    "pairs",
    {
        "cut": "a prompt whose end is cut off to fit {key}={limit}: LLaMA-Factory keeps the "
        "answer, and cuts the question and the start of the assistant's turn. Raise {key}, or "
        "remove them"
    },
    harmless=(),
)


@dataclass(frozen=True)
class Source(sources.Source):
    """An entry of ``dataset`` or ``eval_dataset``.

    Attributes:
        attr: what LLaMA-Factory's ``dataset_info.json`` says of it.
    """

    attr: Any

    def load(self) -> Any:
        from datasets import load_dataset
        from llamafactory.extras.constants import FILEEXT2TYPE

        if not self.file.exists():
            return load_dataset(self.path, self.attr.subset, split=self.attr.split)
        files = sorted(self.file.iterdir()) if self.file.is_dir() else [self.file]
        kind = FILEEXT2TYPE[files[0].suffix[1:]]
        return load_dataset(kind, data_files=[*map(str, files)], split=self.attr.split)

    def in_use(self) -> str:
        ranking = str(bool(self.attr.ranking)).lower()
        return (
            f"its entry in dataset_info.json has formatting {self.attr.formatting} and ranking "
            f"{ranking}"
        )

    def advice(self, rows: Description) -> Advice:
        if rows.format not in _FORMATS:
            return Advice(
                "write the prompt's messages into one column, and each answer as one message or as "
                "text into a column of its own",
                False,
            )
        formatting, column = _FORMATS[rows.format]
        taken = self.attr.formatting in (formatting, "openai" * (formatting == "sharegpt"))
        # LLaMA-Factory takes no column that the entry doesn't name, once it names one.
        named = {column: rows.prompt, **{of: self.columns[of] for of in ("chosen", "rejected")}}
        fits = all(getattr(self.attr, name) == value for name, value in named.items())
        taken = taken and bool(self.attr.ranking) and fits
        columns = ", ".join(f"{name}: {value}" for name, value in named.items())
        words = f"set ranking: true and formatting: {formatting}, in columns {columns}"
        if rows.format == ONE_MESSAGE and not self._tagged():
            taken, tags = False, ", ".join(f"{tag}: {name}" for tag, name in _TAGS.items())
            words += f", and in tags {tags}"
        return Advice(words, taken)

    def wrong(self) -> str | None:
        return super().wrong() or self._turns()

    def _turns(self) -> str | None:
        """The first row that LLaMA-Factory leaves out for the order of its turns, in words."""
        if self.attr.formatting == "alpaca" or not self.attr.ranking:
            return None
        asking = {"user", self.attr.observation_tag}
        answering = {"assistant", self.attr.function_tag}
        for number, row in enumerate(self._written()):
            turns = row.get(self.columns["prompt"])
            if not isinstance(turns, list):
                return None
            roles = [turn.get("role") for turn in turns]
            order = roles[1:] if roles[:1] == ["system"] else roles
            fits = all(role in (answering if at % 2 else asking) for at, role in enumerate(order))
            if not fits or len(order) % 2 == 0:
                return (
                    f"{self.key} {self.path!r}: row {number} (the first is 0) has the turns "
                    f"{', '.join(map(str, roles)) or 'none'} before its answers. LLaMA-Factory "
                    "leaves a row out unless user and assistant take turns, and the user is the "
                    "last one."
                )
        return None

    def _tagged(self) -> bool:
        """Whether the first answer has the keys that the entry's tags name."""
        answer = next(super()._written())[self.columns["chosen"]]
        return {self.attr.role_tag, self.attr.content_tag} <= {*answer}

    def _written(self) -> Iterator[Mapping[str, Any]]:
        """The rows, with the names of a message's parts that all hosts share."""
        attr = self.attr
        names = {attr.role_tag: "role", attr.content_tag: "content"}
        roles = {attr.user_tag: "user", attr.assistant_tag: "assistant", attr.system_tag: "system"}

        def renamed(value: Any) -> Any:
            if isinstance(value, list):
                return [renamed(each) for each in value]
            if not isinstance(value, Mapping):
                return value
            found = {names.get(name, name): part for name, part in value.items()}
            if "role" in found:
                found["role"] = roles.get(found["role"], found["role"])
            return found

        for row in super()._written():
            yield {name: renamed(value) for name, value in row.items()}


def listed(data_args: Any) -> Iterator[Source]:
    """The data sets that the arguments name."""
    from llamafactory.data.parser import get_dataset_list

    for key in ("dataset", "eval_dataset"):
        for attr in get_dataset_list(getattr(data_args, key), data_args.dataset_dir):
            path = attr.dataset_name
            if attr.load_from in ("file", "script"):
                path = str(Path(data_args.dataset_dir, path))
            columns = {"chosen": attr.chosen or "chosen", "rejected": attr.rejected or "rejected"}
            prompt = attr.prompt if attr.formatting == "alpaca" else attr.messages
            columns |= {"prompt": prompt} if prompt else {}
            yield Source(key, path, key == "eval_dataset", columns, attr)


def check_files(data_args: Any) -> None:
    """Refuse local files of pairs that can't be read.

    Raises:
        ValueError: the message names file and line.
    """
    found = []
    with suppress(ValueError):  # an entry that isn't there: the host reports it
        found = list(listed(data_args))
    sources.check_files(found)


def explain(data_args: Any, error: BaseException) -> str | None:
    """Explain an error that was raised while LLaMA-Factory read the data.

    None if the error came from elsewhere, or if nothing was found.
    """
    if not any(module.startswith("llamafactory.data") for module, _ in modules_of(error)):
        return None
    broken = broken_file(error)
    if broken is not None:
        return broken
    return sources.wrong_in(listed(data_args))


def reason(
    model_args: Any, data_args: Any, finetuning_args: Any, error: BaseException
) -> str | None:
    """Why a run of these arguments stopped; None if nothing was found."""
    names = _remote_names(model_args, data_args, finetuning_args)
    return explain(data_args, error) or hub.explain(error, names)


def _remote_names(model_args: Any, data_args: Any, finetuning_args: Any) -> dict[str, str]:
    """The names of models and data that may come from a hub, by key."""
    models = {"model_name_or_path": str(model_args.model_name_or_path)}
    if finetuning_args.ref_model is not None:
        models["ref_model"] = str(finetuning_args.ref_model)
    for adapter in model_args.adapter_name_or_path or ():  # if several are missing, the last
        if not Path(adapter).exists():
            models["adapter_name_or_path"] = str(adapter)
    with suppress(ValueError):  # an entry that isn't there: the host reports it
        return sources.remote_names(models, listed(data_args))
    return models


def cut_prompts(
    found: Iterable[pairs.Pair], tokenizer: Any, template: Any, limit: int, evaluation: bool
) -> list[Fault]:
    """Pairs whose prompt doesn't end as the template ends every prompt.

    Args:
        template: LLaMA-Factory's template, by which the pairs were tokenized.
        limit: the number of tokens that a sequence was cut to.
        evaluation: whether this is evaluation data, of which nothing is refused.
    """
    end = _end_of_prompts(tokenizer, template)
    cut, checked = [], 0
    for row, prompt, *answers in found:
        checked += 1
        whole = len(prompt) + max(map(len, answers))
        if whole >= limit and end and list(prompt[-len(end) :]) != end:
            cut.append(f"row {row} of the tokenized data, {tokenizer.decode(prompt[-40:])!r}")
    words = {"cut": cut} if cut else {}
    return _CATALOGUE.faults(words, checked, evaluation, key="cutoff_len", limit=limit)


def _end_of_prompts(tokenizer: Any, template: Any) -> list[int]:
    """The token ids with which the template ends every prompt."""
    ends = []
    for question in ("One", "2?"):
        asked = [{"role": "user", "content": question}, {"role": "assistant", "content": "Yes"}]
        ends.append(template.encode_oneturn(tokenizer, asked)[0][::-1])
    same = 0
    while same < min(map(len, ends)) and ends[0][same] == ends[1][same]:
        same += 1
    return list(ends[0][:same][::-1])
