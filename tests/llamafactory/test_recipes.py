"""The paper's runs in examples/llamafactory: their values, their tokens, and that they train.

Model and data are small ones in the same formats (tests/support/formats.py); the full runs are
trained on ZeRO-3 with two ranks.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from formats import PAIRS, llama3_prompt, make_llama3, make_zephyr, rows, zephyr_prompt
from harness import EXAMPLES, Run, run_python, zero3_on_cpu
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer
from llamafactory_run import LlamaFactory
from transformers import AutoTokenizer

FOLDER = EXAMPLES / "llamafactory"
RECIPES = {path.stem: path for path in FOLDER.glob("*.yaml") if path.stem != "tiny_focalpo"}
NAMES = sorted(RECIPES)
CONFIGS = {name: yaml.safe_load(path.read_text()) for name, path in RECIPES.items()}
# The paper, section 4 and appendix C: model, data, learning rate; scores of Table 1: AlpacaEval 2.0
# WR and LC, Arena-Hard WR. Then the length, which the paper leaves to SimPO's and Zephyr's settings.
PAPER = {
    "llama3": ("meta-llama/Meta-Llama-3-8B-Instruct", "princeton-nlp/llama3-ultrafeedback-armorm",
               6e-7, ["49.8", "54.7", "34.6"], 2048),
    "mistral": ("HuggingFaceH4/mistral-7b-sft-beta", "trl-lib/ultrafeedback_binarized",
                5e-7, ["20.4", "23.9", "17.1"], 1024),
}  # fmt: skip
# Both of each, by the formats' rules: how a prompt of one turn begins, and what ends an answer.
WRITE = {"llama3": (llama3_prompt, "<|eot_id|>"), "mistral": (zephyr_prompt, "</s>")}
# Billions of weights; layers, size of hidden states, of the MLP's, and of all keys (config.json).
SIZES = {"llama3": (8.030, 32, 4096, 14336, 1024), "mistral": (7.242, 32, 4096, 14336, 1024)}
EVERYWHERE = {
    "stage": "dpo", "do_train": True, "pref_loss": "focalpo", "focalpo_gamma": 0.05,
    "pref_beta": 0.01, "flash_attn": "fa2", "num_train_epochs": 1, "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1, "optim": "adamw_torch", "weight_decay": 0.0, "max_grad_norm": 1.0,
    "seed": 42, "bf16": True, "disable_gradient_checkpointing": False, "use_reentrant_gc": False,
}  # fmt: skip
LORA = {
    "finetuning_type": "lora", "lora_rank": 128, "lora_alpha": 128, "lora_dropout": 0.05,
    "lora_target": "all",
}  # fmt: skip
# What names a place, or says in words where it comes from.
NO_SOURCE = {"stage", "do_train", "pref_loss", "finetuning_type", "dataset", "eval_dataset", "template"}  # fmt: skip


def model_of(name: str) -> str:
    return name.split("_")[0]


def header(name: str) -> str:
    lines = RECIPES[name].read_text().split("\n\n")[0].splitlines()
    return " ".join(" ".join(line.lstrip("#") for line in lines).split())


def test_the_recipes():
    assert NAMES == ["llama3_focalpo", "llama3_focalpo_lora", "mistral_focalpo", "mistral_focalpo_lora"]  # fmt: skip


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
    """On 8 GPUs; with LoRA on one.  The header has the steps that this gives."""
    config, gpus = CONFIGS[name], 1 if name.endswith("lora") else 8
    each = config["per_device_train_batch_size"] * config["gradient_accumulation_steps"]
    assert each * gpus == 128
    assert f"about {PAIRS[PAPER[model_of(name)][1]] / 128:.0f} steps" in header(name)
    assert config.get("deepspeed") == (None if gpus == 1 else "examples/deepspeed/zero3.json")


@pytest.mark.parametrize("name", NAMES)
def test_the_header(name: str):
    """The command, the licence, the first loss, the scores; the sizes in GB, by the weights in bf16
    and by AdamW's state with a master copy, or with an adapter's gradients."""
    text, lora = header(name), name.endswith("lora")
    assert f"llamafactory-cli train {RECIPES[name].relative_to(EXAMPLES.parent)}" in text
    assert ("Meta Llama 3 Community License" in text) == name.startswith("llama3")
    assert f"{2**-0.05 * math.log(2):.4f}" in text
    assert re.findall(r"(?:WR|LC) (\d+\.\d)", text) == ([] if lora else PAPER[model_of(name)][3])
    weights, layers, hidden, inner, keys = SIZES[model_of(name)]
    pairs = [(hidden, hidden)] * 2 + [(hidden, keys)] * 2 + [(hidden, inner)] * 3
    adapter = layers * LORA["lora_rank"] * sum(a + b for a, b in pairs) / 1e9
    of_lora = {f"{2 * weights:.1f}", f"{16 * adapter:.1f}", f"{12 * adapter:.0f}"}
    sizes = {*re.findall(r"([\d.]+) GB", text)} - {"40", "80"}  # of the GPUs
    assert sizes == (of_lora if lora else {f"{14 * weights:.0f}"})


@pytest.mark.parametrize("name", NAMES)
def test_every_value_has_its_source_beside_it(name: str):
    top, *body = RECIPES[name].read_text().split("\n\n")
    used = set()
    for line in "\n".join(body).splitlines():
        sources = re.findall(r"\[([\w, ]+)\]", line.partition("#")[2])
        used |= {source for group in sources for source in group.split(", ")}
        key = re.match(r"(\w+): \S", line)
        assert not key or sources or key[1] in NO_SOURCE, f"no source beside {line!r}"
    assert used == {*re.findall(r"\[(\w+)\]", top)}


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
        command = header(f"{model}_focalpo").partition("make_data.py ")[2].partition(" Launch,")[0]
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
            assert command in header(name)
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
