"""A pair's tokens in OpenRLHF, in the formats of the two models that the scripts train."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from formats import llama3_prompt, make_llama3, make_zephyr, rows, zephyr_prompt
from harness import EXAMPLES, launched

pytestmark = pytest.mark.xdist_group("in one process")

FORMATS = {
    "llama3": (make_llama3, llama3_prompt, "<|eot_id|>"),
    "mistral": (make_zephyr, zephyr_prompt, "</s>"),
}


@pytest.fixture(scope="module")
def pairs(tiny: Path) -> list[dict]:
    return [json.loads(line) for line in (tiny / "train.jsonl").open()][:24]


def chat_template(model: str, folder: Path) -> str | None:
    """The template that the model's script passes on, if any."""
    line = launched(EXAMPLES / "openrlhf" / f"{model}_focalpo.sh", folder)
    flag = "--data.tokenizer_chat_template"
    return line[line.index(flag) + 1] if flag in line else None


@pytest.mark.parametrize("model", list(FORMATS))
def test_tokens(openrlhf: SimpleNamespace, pairs: list, tmp_path: Path, model: str):
    """One BOS, then the prompt, masked; then the answer and the end of the turn, both trained. The
    texts of prompt and answer are written out here by the formats' rules, and tokenized without the
    tokenizer's own special tokens."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    make, write_prompt, end = FORMATS[model]
    texts = [turn["content"] for pair in pairs for turn in pair["chosen"]]
    tokenizer = AutoTokenizer.from_pretrained(make(tmp_path / model, texts))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # as OpenRLHF's get_tokenizer
    data = SimpleNamespace(
        prompt_key=None,
        chosen_key="chosen",
        rejected_key="rejected",
        apply_chat_template=True,
        tokenizer_chat_template=chat_template(model, tmp_path),
    )
    dataset = openrlhf.RewardDataset(
        Dataset.from_list(list(rows(pairs, model))),
        tokenizer,
        512,
        SimpleNamespace(args=SimpleNamespace(data=data)),
        is_dpo=True,
        num_processors=None,
    )
    trainer = object.__new__(openrlhf.DPOTrainer)
    assert len(dataset) == len(pairs)
    for number, pair in enumerate(pairs):
        chosen, chosen_mask, rejected, rejected_mask, prompt_length = dataset[number]
        prompt = write_prompt(pair["chosen"][0]["content"]).removeprefix(tokenizer.bos_token)
        before = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False).input_ids]
        for column, ids, mask in (
            ("chosen", chosen, chosen_mask), ("rejected", rejected, rejected_mask)
        ):  # fmt: skip
            text = prompt + pair[column][-1]["content"] + end
            whole = [before[0], *tokenizer(text, add_special_tokens=False).input_ids]
            assert ids[0].tolist() == whole
            assert whole.count(tokenizer.bos_token_id) == 1
            # One row for each position that predicts a token, with 1 there: the sum is 1 where the
            # trainer counts it.
            count = len(whole) - 1
            sums, _ = trainer._get_batch_logps(
                torch.eye(count), mask.expand(count, -1), [prompt_length] * count
            )
            learned = [token for token, is_it in zip(whole[1:], sums, strict=True) if is_it]
            assert learned == whole[len(before) :]
            assert learned[-1] == tokenizer.convert_tokens_to_ids(end) == tokenizer.eos_token_id
