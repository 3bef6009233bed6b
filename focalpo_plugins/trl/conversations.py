"""Conversations as TRL trains them, and as their chat template renders them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ..guards import pairs, texts

_ANSWERS = ("chosen", "rejected")


def rendered(dataset: Any, tokenizer: Any) -> Iterator[texts.Row]:
    """Rows spread over tokenized data; none if its rows are texts, or hold no messages any more.

    TRL drops as many tokens of the whole row as the prompt has, and takes the rest as the answer.
    So the answer is complete if the row's rendering begins with the prompt's.
    """
    for place, row in pairs.sampled(dataset):
        if not all(_is_conversation(row.get(name)) for name in ("prompt", *_ANSWERS)):
            return
        tools = row.get("tools")
        given = {
            "tools": json.loads(tools) if isinstance(tools, str) else tools,
            **(row.get("chat_template_kwargs") or {}),
            "tokenize": False,
        }
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **given)
        chosen, rejected = (_side(row, name, prompt, tokenizer, given) for name in _ANSWERS)
        earlier = [row[name][:-1] for name in _ANSWERS]
        asked = any(message["role"] == "user" for turns in earlier for message in turns)
        yield texts.Row(
            f"row {place} of the tokenized data",
            chosen,
            rejected,
            in_answers=asked and earlier[0] != earlier[1],
        )


def _side(
    row: Mapping[str, Any], name: str, prompt: str, tokenizer: Any, given: dict[str, Any]
) -> texts.Side:
    said = row[name][-1]["content"]
    said = said if isinstance(said, str) else ""
    whole = tokenizer.apply_chat_template([*row["prompt"], *row[name]], **given)
    if whole.startswith(prompt):
        return texts.Side(prompt, whole.removeprefix(prompt), said, whole)
    prompt, answer = (tokenizer.decode(row[column]) for column in ("prompt_ids", f"{name}_ids"))
    # Decoded like the trained tokens: a tokenizer may change the text's spaces.
    whole = tokenizer.decode(tokenizer(whole, add_special_tokens=False)["input_ids"])
    return texts.Side(prompt, answer, said, whole)


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)
