"""Pairs as token ids by the tokenizer's chat template, as TRL prepares them from 0.29 on.

TRL before that, which LLaMA-Factory requires, ends each answer with one EOS more, and its trainer
can't be imported beside transformers 5.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

_Row = Mapping[str, Any]


def trl_has_it() -> bool:
    """Whether the installed TRL prepares pairs so itself."""
    try:
        from trl import DPOTrainer
    except RuntimeError:  # what TRL raises if a part of it can't be imported
        return False
    return not hasattr(DPOTrainer, "tokenize_row")


def by_template(
    pairs: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> Dataset:
    """The pairs with their token ids; without those whose prompt fills ``max_length``."""
    from trl import extract_prompt

    if "prompt" not in pairs.column_names:
        pairs = pairs.map(extract_prompt)
    found = pairs.map(_tokenized, fn_kwargs={"tokenizer": tokenizer})
    if max_length is not None:
        found = found.filter(lambda row: len(row["prompt_ids"]) < max_length)
    return found


def _tokenized(row: _Row, tokenizer: Any) -> dict[str, list[int]]:
    prompt = _ids(row, tokenizer, row["prompt"], add_generation_prompt=True)
    found = {"prompt_ids": prompt}
    for side in ("chosen", "rejected"):
        answer = row[side]
        if isinstance(answer, str) and not answer.endswith(tokenizer.eos_token):
            answer += tokenizer.eos_token
        found[f"{side}_ids"] = _ids(row, tokenizer, row["prompt"] + answer)[len(prompt) :]
    return found


def _ids(row: _Row, tokenizer: Any, told: Any, **how: Any) -> list[int]:
    """Token ids of a text, or of messages."""
    if isinstance(told, str):
        ids: list[int] = tokenizer(told).input_ids
        return ids
    tools = row.get("tools")
    how["tools"] = json.loads(tools) if isinstance(tools, str) else tools
    how |= row.get("chat_template_kwargs") or {}
    ids = tokenizer.apply_chat_template(told, return_dict=True, **how)["input_ids"]
    return ids


class Collator:
    """Makes a batch, chosen sequences first; what exceeds ``max_length`` is cut off at the end."""

    def __init__(self, padding: int, max_length: int | None) -> None:
        self._padding, self._max_length = padding, max_length

    def __call__(self, rows: Sequence[_Row]) -> dict[str, Tensor]:
        ids, answers = [], []
        for side in ("chosen", "rejected"):
            for row in rows:
                prompt, answer = row["prompt_ids"], row[f"{side}_ids"]
                ids.append(torch.tensor([*prompt, *answer][: self._max_length]))
                mask = [0] * len(prompt) + [1] * len(answer)
                answers.append(torch.tensor(mask[: self._max_length]))
        return {
            "input_ids": pad_sequence(ids, True, self._padding),
            "attention_mask": pad_sequence([torch.ones_like(each) for each in ids], True),
            "completion_mask": pad_sequence(answers, True),
        }
