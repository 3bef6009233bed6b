"""Conversations as OpenRLHF trains them, and as their chat template renders them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..guards import pairs, texts
from ..guards.faults import Fault
from .data import Source
from .names import nested_args


def text_faults(found: Iterable[Source], tokenizer: Any, evaluation: bool = False) -> list[Fault]:
    """The faults of rows that OpenRLHF would train differently from the chat template.

    Args:
        found: the sources that the command line names.
        tokenizer: the one whose template OpenRLHF applies.
        evaluation: whether to check the evaluation data instead of the training data.
    """
    return texts.find(
        (
            row
            for source in found
            if source.evaluation == evaluation
            for row in _rendered(source, tokenizer)
        ),
        host="OpenRLHF",
        of_sides="OpenRLHF cuts both off after as many characters as the chosen side's turns have, "
        "so that the rejected answer loses text or gains some",
        of_cut="OpenRLHF cuts it off at the length of the prompt, and with this template the row's "
        "rendering doesn't begin with the prompt's. Use another template",
        evaluation=evaluation,
    )


def _rendered(source: Source, tokenizer: Any) -> Iterator[texts.Row]:
    from openrlhf.datasets.reward_dataset import preprocess_data

    data = nested_args(source.args).data
    if not data.apply_chat_template:
        return
    keys = data.prompt_key, data.chosen_key, data.rejected_key
    render = tokenizer.apply_chat_template
    try:
        rows = source.rows
    except Exception:  # OpenRLHF reports what can't be read
        return
    for place, row in pairs.sampled(rows):
        try:
            prompt, *trained, _ = preprocess_data(row, None, *keys, render, True)
            chosen, rejected = (_messages(row, key, data.prompt_key) for key in keys[1:])
            sides = [
                texts.Side(prompt, answer, said[-1]["content"], render(said, tokenize=False))
                for answer, said in zip(trained, (chosen, rejected), strict=True)
            ]
        except Exception:  # the template can't render the row: OpenRLHF reports it
            continue
        differ = chosen[:-1] != rejected[:-1]
        yield texts.Row(
            f"row {place} of {source.key} {source.path!r}",
            sides[0],
            sides[1],
            turns_differ=differ,
            in_answers=bool(data.prompt_key) and differ,
        )


def _messages(row: Mapping[str, Any], key: str, prompt: str | None) -> list[Mapping[str, Any]]:
    return [*(row[prompt] if prompt else []), *row[key]]
