"""The paper's runs in examples/llamafactory: their values, their tokens, and that they train.

Model and data are small ones in the same formats (tests/support/formats.py); the full runs are
trained on ZeRO-3 with two ranks.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from formats import make_llama3, make_zephyr, rows, zephyr_prompt
from harness import EXAMPLES, Run, run_python, zero3_on_cpu
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer
from llamafactory_run import LlamaFactory
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
from transformers import AutoTokenizer

FOLDER = EXAMPLES / "llamafactory"
RECIPES = {path.stem: path for path in FOLDER.glob("*.yaml") if path.stem != "tiny_focalpo"}
NAMES = sorted(RECIPES)
CONFIGS = {name: yaml.safe_load(path.read_text()) for name, path in RECIPES.items()}
EVERYWHERE = {
    "stage": "dpo", "do_train": True, "pref_loss": "focalpo", "focalpo_gamma": 0.05,
    "pref_beta": 0.01, "flash_attn": "fa2", "num_train_epochs": 1, "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1, "optim": "adamw_torch", "weight_decay": 0.0, "max_grad_norm": 1.0,
    "seed": 42, "bf16": True, "disable_gradient_checkpointing": False, "use_reentrant_gc": False,
}  # fmt: skip
LORA = {
    "finetuning_type": "lora", "lora_rank": LORA_RANK, "lora_alpha": 128, "lora_dropout": 0.05,
    "lora_target": "all",
}  # fmt: skip
# What names a place, or says in words where it comes from.
NO_SOURCE = {"stage", "do_train", "pref_loss", "finetuning_type", "dataset", "eval_dataset", "template"}  # fmt: skip


def test_the_recipes():
    assert NAMES == OF_THE_PAPER


@pytest.mark.parametrize("name", NAMES)
def test_values_are_the_papers(name: str):
    base, _, rate, _, length = PAPER[model_of(name)]
    lora, config = name.endswith("lora"), CONFIGS[name]
    expected = {
        **EVERYWHERE, "model_name_or_path": base, "cutoff_len": length,
        **(LORA if lora else {"finetuning_type": "full"}), "learning_rate": 5e-6 if lora else rate,
    }  # fmt: skip
    assert {key: config.get(key) for key in expected} == expected
    of_loss = {key for key in config if key.startswith(("focalpo_", "pref_", "dpo_", "simpo", "lora"))}  # fmt: skip
    assert of_loss <= expected.keys(), "a setting of the loss that the table doesn't have"


@pytest.mark.parametrize("name", NAMES)
def test_the_batch_is_128(name: str):
    """On 8 GPUs; with LoRA on one."""
    config, gpus = CONFIGS[name], 1 if name.endswith("lora") else 8
    each = config["per_device_train_batch_size"] * config["gradient_accumulation_steps"]
    assert each * gpus == 128
    assert config.get("deepspeed") == (None if gpus == 1 else "examples/deepspeed/zero3.json")


@pytest.mark.parametrize("name", NAMES)
def test_the_header(name: str):
    """The command, and what every host's has."""
    command = f"llamafactory-cli train {RECIPES[name].relative_to(EXAMPLES.parent)}"
    assert command in header(RECIPES[name])
    check_header(RECIPES[name])


@pytest.mark.parametrize("name", NAMES)
def test_every_value_has_its_source_beside_it(name: str):
    check_sources(RECIPES[name], NO_SOURCE)


@pytest.fixture(scope="session")
def pairs(tiny: Path) -> dict[str, list[dict]]:
    return {
        split: [json.loads(line) for line in (tiny / f"{split}.jsonl").open()][:24]
        for split in ("train", "test")
    }


@pytest.fixture(scope="session")
def places(pairs: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model and its data for both, made with the flags that the headers have."""
    folder = tmp_path_factory.mktemp("recipes")
    texts = [turn["content"] for pair in pairs["train"] for turn in pair["chosen"]]
    for model, make in (("llama3", make_llama3), ("mistral", make_zephyr)):
        make(folder / model, texts)
        base, data, *_ = PAPER[model]
        files = {}
        for split, some in pairs.items():
            # A name as of the hub, since it becomes the name of the entry.
            file = folder / f"{data.rpartition('/')[2]}_{split}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows(some, model)))
            files[f"{data}:{split}"] = str(file)
        command = (
            header(RECIPES[f"{model}_focalpo"])
            .partition("make_data.py ")[2]
            .partition(" Launch,")[0]
        )
        words = [word for word in command.split() if word != "\\"]
        out = words[words.index("--out") + 1]
        here = {**files, base: str(folder / model), out: str(folder / f"data_{model}")}
        script = str(FOLDER / "make_data.py")
        done = run_python(script, *(here.get(word, word) for word in words))
        assert done.returncode == 0, done.stderr
        assert {*here} <= {*words} | {base}
        for name in (model, f"{model}_lora"):
            name = name.replace(model, f"{model}_focalpo")
            assert out in (CONFIGS[name].get("dataset_dir"), CONFIGS[name].get("tokenized_path"))
            assert command in header(RECIPES[name])
    return folder


def small(name: str, places: Path, **changes: Any) -> dict[str, Any]:
    """The recipe with a small model and its data in place, and what a CPU can't do left out."""
    config, model = dict(CONFIGS[name]), model_of(name)
    config["tokenized_path" if "tokenized_path" in config else "dataset_dir"] = str(
        places / f"data_{model}"
    )
    config |= {
        "model_name_or_path": str(places / model), "output_dir": str(places / f"out_{name}"),
        "max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
        "eval_steps": 2, "save_steps": 2, "preprocessing_num_workers": None, "bf16": False,
        "flash_attn": "sdpa",
    }  # fmt: skip
    if "deepspeed" in config:
        config["deepspeed"] = zero3_on_cpu(places)
    return {key: value for key, value in (config | changes).items() if value is not None}


def history(run: Run) -> list[dict[str, float]]:
    return json.loads((run.folder / "trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize("name", NAMES)
def test_it_trains(places: Path, name: str):
    """Two steps, an evaluation, and two steps more from the checkpoint by the same command."""
    host, ranks = LlamaFactory(places / "unused", places), 1 if name.endswith("lora") else 2
    run = host(small(name, places), ranks=ranks)
    assert run.code == 0, run.output[-6000:]
    assert "loss=focalpo gamma=0.05" in run.output and "beta=0.01" in run.output
    found = [entry["loss"] for entry in history(run) if "loss" in entry]
    assert len(found) == 2 and found[0] == pytest.approx(2**-0.05 * math.log(2), abs=1e-5)
    assert [entry["step"] for entry in history(run) if "eval_loss" in entry] == [2]
    if ranks == 2:
        assert list((run.folder / "checkpoint-2").glob("global_step*"))  # DeepSpeed's
    run = host(small(name, places, max_steps=4), ranks=ranks)
    assert run.code == 0, run.output[-6000:]
    after = [entry["loss"] for entry in history(run) if "loss" in entry]
    assert len(after) == 4 and after[:2] == found


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", NAMES)
def test_tokens(places: Path, pairs: dict, name: str, split: str):
    """Those of the other recipes: one BOS, the prompt, masked; then the answer and the end of the
    turn, both learned.  The text is written out by the formats' rules, and tokenized whole."""
    config = small(name, places, deepspeed=None, eval_strategy="no")
    model, data, training, _, _ = get_train_args(config)
    assert training.warmup_steps == 0.1 and training.learning_rate == float(config["learning_rate"])
    module = load_tokenizer(model)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data)
    sets = get_dataset(template, model, data, training, "rm", **module)
    tokenizer = AutoTokenizer.from_pretrained(places / model_of(name))
    write, end = WRITE[model_of(name)]
    found = [
        (row[f"{side}_input_ids"], [label for label in row[f"{side}_labels"] if label >= 0])
        for row in sets["train_dataset" if split == "train" else "eval_dataset"]
        for side in ("chosen", "rejected")
    ]
    expected = []
    for pair in pairs[split]:
        bare = write(pair["chosen"][0]["content"]).removeprefix(tokenizer.bos_token)
        length = 1 + len(tokenizer(bare, add_special_tokens=False).input_ids)
        for side in ("chosen", "rejected"):
            text = bare + pair[side][-1]["content"] + end
            ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
            expected.append((ids, ids[length:]))
    assert sorted(found) == sorted(expected) and len(found) == 48


def test_long_sequences_lose_their_end(places: Path, tmp_path: Path):
    """As in the other recipes: with room for one token of the answer, that one is learned."""
    pair = {side: [{"role": "user", "content": "Q"}, {"role": "assistant", "content": 9 * side}]
            for side in ("chosen", "rejected")}  # fmt: skip
    (tmp_path / "long.jsonl").write_text(json.dumps(pair) + "\n")
    tokenizer = AutoTokenizer.from_pretrained(places / "mistral")
    prompt = zephyr_prompt("Q").removeprefix("<s>")
    length = 1 + len(tokenizer(prompt, add_special_tokens=False).input_ids)
    words = ["--tokenizer", str(places / "mistral"), "--empty-system", "--cutoff", str(length + 1)]
    out = tmp_path / "out"
    script = str(FOLDER / "make_data.py")
    done = run_python(script, str(tmp_path / "long.jsonl"), *words, "--out", str(out))
    assert done.returncode == 0, done.stderr
    from datasets import load_from_disk

    (row,) = load_from_disk(str(out))["train"]
    for side in ("chosen", "rejected"):
        assert len(row[f"{side}_input_ids"]) == length + 1
        assert row[f"{side}_labels"] == [-100] * length + row[f"{side}_input_ids"][-1:]


def test_white_space_around_messages(tmp_path: Path):
    """``--strip`` takes it away, as Llama-3's template does."""
    pair = {side: [{"role": "user", "content": " Q\n"}, {"role": "assistant", "content": f"\n {side} "}]
            for side in ("chosen", "rejected")}  # fmt: skip
    (tmp_path / "rows.jsonl").write_text(json.dumps(pair) + "\n")
    script = str(FOLDER / "make_data.py")
    for flags, answer in (([], "\n chosen "), (["--strip"], "chosen")):
        done = run_python(
            script, str(tmp_path / "rows.jsonl"), *flags, "--out", str(tmp_path / "out")
        )
        assert done.returncode == 0, done.stderr
        row = json.loads((tmp_path / "out" / "rows.jsonl").read_text())
        assert row["chosen"]["content"] == answer
