"""The recipes in examples/swift: their values, their tokens, and that they train.

Model and data are small ones in the same formats (tests/support/formats.py).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from formats import make_llama3, make_zephyr, rows
from harness import EXAMPLES
from paper_recipes import (
    LORA_RANK,
    OF_THE_PAPER,
    PAPER,
    WRITE,
    check_header,
    check_sources,
    header,
    model_of,
)
from swift_command import TINY, train, words
from transformers import AutoTokenizer

from focalpo_plugins.swift.dry_run import plan

FOLDER = EXAMPLES / "swift"
RECIPES = {path.stem: path for path in FOLDER.glob("*.yaml") if path.stem != "tiny_focalpo"}
NAMES = sorted(RECIPES)
CONFIGS = {name: yaml.safe_load(path.read_text()) for name, path in RECIPES.items()}
EVERYWHERE = {
    "rlhf_type": "dpo", "loss_type": "focalpo", "focalpo_gamma": 0.05, "beta": 0.01,
    "attn_impl": "flash_attention_2", "torch_dtype": "bfloat16", "split_dataset_ratio": 0,
    "truncation_strategy": "right", "num_train_epochs": 1, "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1, "optim": "adamw_torch", "adam_beta2": 0.999, "weight_decay": 0.0,
    "max_grad_norm": 1.0, "seed": 42, "data_seed": 42, "gradient_checkpointing": True,
}  # fmt: skip
LORA = {"tuner_type": "lora", "lora_rank": LORA_RANK, "lora_alpha": 128, "lora_dropout": 0.05,
        "target_modules": "all-linear"}  # fmt: skip
# What names a place or a format.
NO_SOURCE = {"rlhf_type", "loss_type", "tuner_type", "model_type", "use_hf", "external_plugins",
             "template", "split_dataset_ratio", "truncation_strategy", "columns", "chosen", "rejected"}  # fmt: skip


def test_the_recipes():
    assert NAMES == OF_THE_PAPER


@pytest.mark.parametrize("name", NAMES)
def test_values_are_the_papers(name: str):
    base, data, rate, _, length = PAPER[model_of(name)]
    lora, config = name.endswith("lora"), CONFIGS[name]
    expected = {
        **EVERYWHERE, "model": base, "dataset": data, "max_length": length,
        **(LORA if lora else {"tuner_type": "full"}), "learning_rate": 5e-6 if lora else rate,
    }  # fmt: skip
    assert {key: config.get(key) for key in expected} == expected
    of_loss = {key for key in config if re.match("focalpo_|beta|loss|lora|rpo|ld_|label", key)}
    assert of_loss <= expected.keys(), "a setting of the loss that the table doesn't have"


@pytest.mark.parametrize("name", NAMES)
def test_the_batch_is_128(name: str):
    """On 8 GPUs; with LoRA on one."""
    config, gpus = CONFIGS[name], 1 if name.endswith("lora") else 8
    each = config["per_device_train_batch_size"] * config["gradient_accumulation_steps"]
    assert each * gpus == 128
    assert config.get("deepspeed") == (None if gpus == 1 else "zero3")


@pytest.mark.parametrize("name", NAMES)
def test_the_header(name: str):
    """The command, and what every host's has."""
    launch = "" if name.endswith("lora") else "NPROC_PER_NODE=8 "
    path = RECIPES[name].relative_to(EXAMPLES.parent)
    assert f"from the repository root: {launch}swift rlhf {path} " in header(RECIPES[name])
    check_header(RECIPES[name])


@pytest.mark.parametrize("name", NAMES)
def test_every_value_has_its_source_beside_it(name: str):
    check_sources(RECIPES[name], NO_SOURCE)


@pytest.fixture(scope="session")
def pairs(tiny: Path) -> list[dict]:
    """24 of the tiny ones, and one with white space around its messages."""
    found = [json.loads(line) for line in (tiny / "train.jsonl").open()][:24]
    turns = {"user": " How far?\n", "assistant": "\n Not far. "}
    said = [{"role": role, "content": content} for role, content in turns.items()]
    return [*found, {"chosen": said, "rejected": [said[0], {**said[1], "content": "No. \n"}]}]


@pytest.fixture(scope="session")
def places(pairs: list[dict], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model and its data for both."""
    folder = tmp_path_factory.mktemp("recipes")
    texts = [turn["content"] for pair in pairs for turn in pair["chosen"]]
    for model, make in (("llama3", make_llama3), ("mistral", make_zephyr)):
        make(folder / model, texts)
        lines = [json.dumps(row) + "\n" for row in rows(pairs, model)]
        (folder / f"{model}.jsonl").write_text("".join(lines))
    return folder


def small(name: str, places: Path, **changes: Any) -> dict[str, Any]:
    """The recipe with a small model and its data in place, and what a CPU can't do left out."""
    config, model = dict(CONFIGS[name]), model_of(name)
    assert not Path(config["external_plugins"]).is_absolute()
    return config | {
        "model": places / model, "dataset": places / f"{model}.jsonl", "use_hf": None,
        "model_type": config.get("model_type", "llama"), "attn_impl": None, "deepspeed": None,
        "external_plugins": EXAMPLES.parent / config["external_plugins"],
        "columns": json.dumps(config["columns"]), "torch_dtype": "float32", "fp16": False,
        "bf16": False, "check_model": False, "warmup_steps": 0, "max_steps": 1,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        # A worker would come off the tests' fork server, which hasn't imported the template.
        "dataloader_num_workers": 0, "dataloader_persistent_workers": False, **changes,
    }  # fmt: skip


def trained(folder: Path, given: dict[str, Any]) -> str:
    """The output of a run that has only these keys."""
    code, output = train(folder, {**dict.fromkeys(TINY), "output_dir": folder / "out", **given})
    assert code == 0, output[-6000:]
    return output


@pytest.mark.parametrize("name", NAMES)
def test_it_trains(name: str, places: Path, tmp_path: Path):
    output = trained(tmp_path, small(name, places, output_dir=tmp_path / "out"))
    assert "loss=focalpo gamma=0.05" in output and "beta=0.01" in output
    assert "'loss': '0.6695'" in output


@pytest.mark.releases
@pytest.mark.parametrize("name", ["llama3_focalpo", "mistral_focalpo_lora"])
def test_tokens(name: str, places: Path, pairs: list[dict], tmp_path: Path):
    """Those of the other recipes: one BOS, the prompt, masked; then the answer and the end of the
    turn, both learned.  The text is written out by the formats' rules, and tokenized whole; Llama-3's
    template takes away the white space around messages, Zephyr's doesn't."""
    given = small(name, places, dataset_shuffle=False)
    found = [
        (side.ids, side.trained)
        for pair in plan(words(given), 1, tmp_path).pairs
        for side in (pair.chosen, pair.rejected)
    ]
    tokenizer = AutoTokenizer.from_pretrained(places / model_of(name))
    write, end = WRITE[model_of(name)]
    expected = []
    for pair in pairs:
        for side in ("chosen", "rejected"):
            said, answer = (turn["content"] for turn in pair[side])
            if name.startswith("llama3"):
                said, answer = said.strip(), answer.strip()
            bare = write(said).removeprefix(tokenizer.bos_token)
            text = bare + answer + end
            length = 1 + len(tokenizer(bare, add_special_tokens=False).input_ids)
            ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
            expected.append((ids, [False] * length + [True] * (len(ids) - length)))
    assert found == expected and len(found) == 50


@pytest.mark.releases
@pytest.mark.parametrize("name", ["llama3_focalpo", "mistral_focalpo_lora"])
def test_conversations_of_several_turns(name: str, places: Path, tmp_path: Path):
    """The text is the model's own template's; Mistral's after an empty system turn, unless there is
    one.  Only the last answer is learned."""
    told = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(4)]
    asked = [{"role": "system", "content": "Be short."}, *told]
    data = tmp_path / "turns.jsonl"
    lines = [json.dumps({"chosen": [*each[:-1], {**each[-1], "content": "best"}], "rejected": each})
             for each in (told, asked)]  # fmt: skip
    data.write_text("\n".join(lines) + "\n")
    given = small(name, places, dataset=data, dataset_shuffle=False)
    tokenizer = AutoTokenizer.from_pretrained(places / model_of(name))
    empty = [{"role": "system", "content": ""}] * name.startswith("mistral")
    found = [pair.rejected for pair in plan(words(given), 1, tmp_path / "scratch").pairs]
    for side, turns in zip(found, ([*empty, *told], asked), strict=True):
        text = tokenizer.apply_chat_template(turns, tokenize=False).removeprefix(
            tokenizer.bos_token
        )
        ids = tokenizer(text.rstrip("\n"), add_special_tokens=False).input_ids
        assert side.ids == [tokenizer.bos_token_id, *ids]
        learned = [token for token, is_it in zip(side.ids, side.trained, strict=True) if is_it]
        assert tokenizer.decode(learned) == f"turn 3{WRITE[model_of(name)][1]}"
