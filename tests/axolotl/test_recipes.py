"""The YAMLs of examples/: their numbers are the paper's or marked as ours, and Axolotl trains with
each of them. Model and data are small ones in the same formats (tests/support/formats.py), set only
by overrides; the full fine-tuning runs train on ZeRO-3 with two ranks."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import forked
import pytest
import yaml
from formats import (
    PAIRS,
    ZEPHYR_TEMPLATE,
    make_llama3,
    make_qwen3,
    make_zephyr,
    qwen3_prompt,
    rows,
)
from harness import EXAMPLES, ON_CPU, Axolotl, Run, loaded, zero3_on_cpu
from paper_recipes import LORA_RANK, PAPER, SHAPES, OfPaper, check_sources, header, weights_of
from paper_recipes import WRITE as OF_PAPER
from transformers import AutoTokenizer

YAMLS = [
    path
    for path in EXAMPLES.rglob("*.y*ml")
    # Other hosts' recipes have tests of their own.
    if not {"eval", "llamafactory", "swift"} & {*path.relative_to(EXAMPLES).parts}
]
SWEEPS = {path.stem: path for path in YAMLS if path.parent.name == "sweeps"}
RECIPES = {path.stem: path for path in sorted(set(YAMLS) - set(SWEEPS.values()))}
CONFIGS = {name: yaml.safe_load(path.read_text()) for name, path in RECIPES.items()}
PAPERS = [name for name in RECIPES if not name.startswith("tiny")]

# The last one is not the paper's but ours.
MODELS = {
    **PAPER,
    "qwen3": OfPaper("Qwen/Qwen3-8B", "trl-lib/ultrafeedback_binarized", 5e-6, [], 2048),
}
# Transcribed from the paper, section 4 and appendix C, as PAPER is...
GRID = [3e-7, 5e-7, 6e-7, 1e-6]
# ... and the rest from the SimPO (Llama-3) and Zephyr (Mistral) repositories.
EVERYWHERE = {
    "num_epochs": 1,
    "lr_scheduler": "cosine",
    "warmup_ratio": 0.1,
    "seed": 42,
    "bf16": True,
    "attn_implementation": "flash_attention_2",
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
}
FOCALPO = {"rl": "focalpo", "focalpo_gamma": 0.05, "focalpo_variant": "correct", "rl_beta": 0.01}
INCORRECT = {**FOCALPO, "focalpo_gamma": 1.0, "focalpo_variant": "incorrect"}
LORA = {
    "lora_r": LORA_RANK,
    "lora_alpha": 128,
    "lora_dropout": 0.05,
    "lora_target_linear": True,
    "learning_rate": 5e-6,
    "focalpo_fused": True,
}
KTO = {"rl": "kto", "rl_beta": 0.1, "kto_desirable_weight": 1.0, "kto_undesirable_weight": 1.0}
TABLE: dict[str, dict[str, Any]] = {
    "llama3_focalpo": {**FOCALPO, "learning_rate": PAPER["llama3"].rate},
    "mistral_focalpo": {**FOCALPO, "learning_rate": PAPER["mistral"].rate},
    "llama3_incorrect": {**INCORRECT, "learning_rate": 6e-7},
    "mistral_incorrect": {**INCORRECT, "learning_rate": 5e-7},
    "llama3_dpo": {"rl": "focalpo", "focalpo_gamma": 0.0, "rl_beta": 0.01, "learning_rate": 3e-7},
    "mistral_dpo": {"rl": "dpo", "rl_beta": 0.01, "learning_rate": 5e-7},
    # SimPO gives gamma / beta: .3 of 10 and .8 of 2.
    "llama3_simpo": {
        "rl": "simpo", "rl_beta": 10, "simpo_gamma": 3.0, "cpo_alpha": 0, "learning_rate": 1e-6
    },
    "mistral_simpo": {
        "rl": "simpo", "rl_beta": 2, "simpo_gamma": 1.6, "cpo_alpha": 0, "learning_rate": 3e-7
    },
    "llama3_focal_simpo": {
        **FOCALPO, "focalpo_margin": "simpo", "rl_beta": 10, "simpo_gamma": 3.0, "cpo_alpha": 0,
        "learning_rate": 1e-6,
    },
    "mistral_focal_simpo": {
        **FOCALPO, "focalpo_margin": "simpo", "rl_beta": 2, "simpo_gamma": 1.6, "cpo_alpha": 0,
        "learning_rate": 3e-7,
    },
    "llama3_orpo": {"rl": "orpo", "orpo_alpha": 0.1, "learning_rate": 1e-6},
    "mistral_orpo": {"rl": "orpo", "orpo_alpha": 0.1, "learning_rate": 5e-6},
    "llama3_kto": {**KTO, "learning_rate": 5e-7},
    "mistral_kto": {**KTO, "learning_rate": 5e-7},
    "llama3_focalpo_lora": {**FOCALPO, **LORA, "adapter": "lora"},
    "mistral_focalpo_lora": {**FOCALPO, **LORA, "adapter": "lora"},
    "llama3_focalpo_qlora": {**FOCALPO, **LORA, "adapter": "qlora", "load_in_4bit": True},
    "mistral_focalpo_qlora": {**FOCALPO, **LORA, "adapter": "qlora", "load_in_4bit": True},
    "qwen3_focalpo_lora": {**FOCALPO, **LORA, "adapter": "lora"},
}  # fmt: skip
# Table 1: AlpacaEval 2.0 WR and LC, Arena-Hard WR.
TABLE_1 = {
    "llama3_orpo": (33.8, 38.1, 26.0),
    "llama3_kto": (31.8, 33.1, 11.7),
    "llama3_dpo": (47.5, 48.2, 33.1),
    "llama3_simpo": (47.5, 53.7, 33.8),
    "mistral_orpo": (12.6, 14.7, 6.2),
    "mistral_kto": (12.3, 14.9, 8.8),
    "mistral_dpo": (18.6, 20.6, 16.4),
    "mistral_simpo": (21.4, 17.0, 13.3),
    **{f"{model}_focalpo": paper.scores for model, paper in PAPER.items()},
}
# Every margin, or reward, is 0 before the first step: 2^-gamma ln 2; (1-p)^1 ln 2; 1 - p.
FIRST_LOSS = {
    "focalpo": 2**-0.05 * math.log(2),
    "incorrect": math.log(2) / 2,
    "dpo": math.log(2),
    "kto": 0.5,
}
NO_SOURCE = {  # places, Axolotl's own settings, and words on where values come from
    "rl", "adapter", "load_in_4bit", "chat_template", "chat_template_jinja", "split", "type", "ds_type", "path",
    "pad_token", "skip_prepare_dataset", "excess_length_strategy", "remove_unused_columns",
}  # fmt: skip


def split_name(name: str) -> tuple[str, str]:
    """``llama3_focalpo_lora`` is the model ``llama3`` and the method ``focalpo``."""
    return name.split("_")[0], name.split("_")[1]


def words(name: str) -> str:
    return header(RECIPES[name])


def commented(name: str) -> dict[str, Any]:
    """The commented keys that can be uncommented."""
    lines = re.findall(
        r"^# (\w+: \S+)(?:  #.*)?$", RECIPES[name].read_text().partition("\n\n")[2], re.M
    )
    return yaml.safe_load("\n".join(lines))


def test_every_recipe_is_in_the_table():
    assert len(PAPERS) == 19
    assert set(PAPERS) == set(TABLE)
    assert set(RECIPES) - set(PAPERS) == {"tiny_focalpo", "tiny_dpo"}


def test_the_learning_rate_grid():
    assert yaml.safe_load(SWEEPS["learning_rate"].read_text()) == {"learning_rate": GRID}
    assert set(SWEEPS) == {"learning_rate", "seeds"}
    for method in ("focalpo", "dpo", "simpo", "orpo", "kto"):
        assert float(CONFIGS[f"llama3_{method}"]["learning_rate"]) in GRID


@pytest.mark.parametrize("key, count", [("learning_rate", 4), ("seed", 3)])
def test_axolotl_makes_the_runs_of_a_sweep(key: str, count: int):
    """The runs of Axolotl's own function for ``--sweep``, each in its own folder."""
    from axolotl.cli.utils.train import generate_config_files

    sweep = SWEEPS["learning_rate" if key == "learning_rate" else "seeds"]
    files = [
        Path(file)
        for file, grouped in generate_config_files(str(RECIPES["llama3_focalpo"]), str(sweep))
        if grouped
    ]
    runs = [yaml.safe_load(file.read_text()) for file in files]
    for file in files:
        file.unlink()
    (values,) = yaml.safe_load(sweep.read_text()).values()
    assert len(values) == count
    assert sorted(float(run[key]) for run in runs) == values
    assert len({run["output_dir"] for run in runs}) == count
    same = {k: v for k, v in CONFIGS["llama3_focalpo"].items() if k != "output_dir"}
    assert float(same[key]) in values
    assert all({**run, key: same[key]} == {**same, "output_dir": run["output_dir"]} for run in runs)


def test_offload_adds_only_the_offload():
    plain, offload = (
        json.loads((EXAMPLES / "deepspeed" / f"{name}.json").read_text())
        for name in ("zero3", "zero3_offload")
    )
    for what in ("offload_optimizer", "offload_param"):
        assert offload["zero_optimization"].pop(what) == {"device": "cpu", "pin_memory": True}
    assert offload == plain


@pytest.mark.parametrize("name", PAPERS)
def test_values_are_the_papers(name: str):
    model, method = split_name(name)
    config = CONFIGS[name]
    assert config["base_model"] == MODELS[model].model
    if method != "kto":
        for key, split in (("datasets", "train"), ("test_datasets", "test")):
            assert [(d["path"], d["split"]) for d in config[key]] == [(MODELS[model].data, split)]
    expected = {**EVERYWHERE, "sequence_len": MODELS[model].length, **TABLE[name]}
    if name.endswith("simpo"):  # Axolotl takes no ratio there
        del expected["warmup_ratio"]
        assert config["warmup_steps"] == round(0.1 * PAIRS[MODELS[model].data] / 128)
    for key, value in expected.items():
        got = float(config[key]) if key == "learning_rate" else config[key]
        assert got == value, key
    loss_keys = {
        key
        for key in config
        if key.startswith(("focalpo_", "rl_", "simpo", "orpo", "kto", "cpo", "dpo"))
    }
    assert loss_keys <= set(expected), "a setting of the loss that the table doesn't have"


@pytest.mark.parametrize("name", PAPERS)
def test_the_batch_is_128(name: str):
    """At 8 GPUs, or one for LoRA, it gives the header's steps: of pairs, or under KTO of single
    answers."""
    config = CONFIGS[name]
    gpus = 1 if "adapter" in config else 8
    assert config["micro_batch_size"] * config["gradient_accumulation_steps"] * gpus == 128
    assert (re.search(r"\b8 GPUs", words(name)) is not None) == (gpus == 8)
    pairs = PAIRS[MODELS[split_name(name)[0]].data]
    examples = pairs * (2 if split_name(name)[1] == "kto" else 1) * config["num_epochs"]
    assert f"{round(examples / 128)}" in re.findall(r"(\d+) steps", words(name))
    assert ("deepspeed" in config) == (gpus == 8)
    if gpus == 8:
        zero = json.loads((EXAMPLES.parent / config["deepspeed"]).read_text())
        assert zero["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize("name", PAPERS)
def test_the_sizes_in_the_header(name: str):
    """In GB: weights in bf16, or in 4 bits with bitsandbytes' scales (one byte for 64 weights, four
    for 16,384) without the embeddings; an adapter in float32 with gradient and AdamW's two moments;
    a checkpoint without the gradients, and with the bf16 weights where all are trained."""
    config, text = CONFIGS[name], words(name)
    layers, hidden, *_, vocabulary = SHAPES[split_name(name)[0]]
    weights = weights_of(split_name(name)[0])
    sizes = {*re.findall(r"([\d.]+) GB", text)} - {"24", "40", "80"}  # of the GPUs
    if "adapter" not in config:
        assert sizes == {f"{14 * weights.all / 1e9:.0f}"}
        return
    adapter = config["lora_r"] * weights.adapter_of_rank_1
    expected = {f"{16 * adapter / 1e9:.1f}", f"{12 * adapter / 1e9:.0f}"}
    in_4_bits = weights.linear * (1 / 2 + 1 / 64 + 4 / 16_384) + 2 * weights.embeddings
    if config["adapter"] == "lora":
        expected.add(f"{2 * weights.all / 1e9:.1f}")
    if config["adapter"] == "qlora" or "load_in_4bit" in commented(name):
        expected.add(f"{in_4_bits / 1e9:.1f}")
    if "estimate" in text:
        tokens = 2 * config["micro_batch_size"] * config["sequence_len"]
        saved, logits = layers * tokens * hidden * 2, tokens * vocabulary * 4
        total = re.search(r"(\d+) of the 24 GB", text)
        least, most = re.search(r"(\d) to (\d) GB", text).groups()
        expected |= {f"{saved / 1e9:.1f}", f"{logits / 1e9:.1f}", most}
        known = (in_4_bits + 16 * adapter + saved) / 1e9
        assert known + int(least) < int(total[1]) < known + int(most)
    assert sizes == expected


@pytest.mark.parametrize("name", PAPERS)
def test_the_header_says_what_it_is(name: str):
    """The command that trains it, the licence, the first loss, and the paper's scores."""
    text = words(name)
    assert f"axolotl train {RECIPES[name].relative_to(EXAMPLES.parent)}" in text
    assert ("Meta Llama 3 Community License" in text) == name.startswith("llama3")
    method = split_name(name)[1]
    if method in FIRST_LOSS:
        assert f"{FIRST_LOSS[method]:.4f}".rstrip("0") in text
    scores = re.findall(r"(?:WR|LC) (\d+\.\d)", text)
    assert scores == [str(score) for score in TABLE_1.get(name, ())]


def test_what_is_left_of_a_long_pair():
    """The two examples of RESULTS.md: by TRL's collator, and by the rule of the older code."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    page = (EXAMPLES / "RESULTS.md").read_text()
    pattern = (
        r"^\| \w+ \| (\d+) \| (\d+) \| (\d+) \| (\d+), (\d+) \| (\d+), (\d+) \| (\d+), (\d+) \|$"
    )
    examples = [
        tuple(map(int, found)) for found in re.findall(pattern, page.replace("-", ""), re.M)
    ]
    assert [example[:2] for example in examples] == [(1024, 512), (2048, 1800)]
    for limit, of_prompt, prompt, chosen, rejected, *left in examples:
        row = {
            "prompt_ids": [1] * prompt,
            "chosen_ids": [1] * chosen,
            "rejected_ids": [1] * rejected,
        }
        collator = DataCollatorForPreference(pad_token_id=0, max_length=limit)
        here = collator([row])["completion_mask"].sum(dim=1).tolist()
        assert left[:2] == here
        # Only the prompt is cut first, and that isn't enough here.
        assert min(prompt, of_prompt) + max(chosen, rejected) > limit
        assert left[2:] == [min(answer, limit - of_prompt) for answer in (chosen, rejected)]
        model = "mistral" if limit == 1024 else "llama3"
        assert MODELS[model].length == limit
        recipe = " ".join(RECIPES[f"{model}_focalpo"].read_text().replace("\n# ", " ").split())
        assert f" {left[2]} tokens" in recipe


@pytest.mark.parametrize("name", PAPERS)
def test_every_value_has_its_source_beside_it(name: str):
    check_sources(RECIPES[name], NO_SOURCE)


VALIDATE = """
import json, os, sys
import yaml
from axolotl.cli.config import prepare_plugins
from axolotl.utils import config
from axolotl.utils.dict import DictDefault

A100 = {"bf16": True, "fp8": False, "tf32": True, "compute_capability": "sm_80"}
ends = {}
for path, more in json.loads(sys.argv[1]):
    cfg = DictDefault(yaml.safe_load(open(path)) | more)
    gpus = 1 if cfg.adapter else 8
    os.environ["WORLD_SIZE"] = str(gpus)
    if cfg.plugins:
        prepare_plugins(cfg)
    key = path + " uncommented" * bool(more)
    try:
        cfg = config.validate_config(cfg, {**A100, "n_gpu": gpus}, {"torch_version": "2.13.0"})
        ends[key] = [cfg.rl, cfg.trainer_cls, cfg.bf16, cfg.attn_implementation]
        ends[key].append({name: cfg[name] for name in more})
    except Exception as error:
        ends[key] = repr(error)
print("ENDS", json.dumps(ends, default=lambda value: getattr(value, "value", str(value))))
"""


@pytest.fixture(scope="session")
def validated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Each recipe passes Axolotl's own validation with assumed A100s: as it is, and with all
    commented keys uncommented."""
    script = tmp_path_factory.mktemp("validate") / "validate.py"
    script.write_text(VALIDATE)
    configs = [(str(path), {}) for path in RECIPES.values()]
    configs += [(str(RECIPES[name]), commented(name)) for name in PAPERS]
    code, output, errors = forked.run(str(script), [json.dumps(configs)], EXAMPLES.parent)
    assert code == 0, errors[-6000:]
    ends = next(line for line in output.splitlines() if line.startswith("ENDS "))
    return json.loads(ends.removeprefix("ENDS "))


@pytest.mark.xdist_group("validated")
@pytest.mark.parametrize("name", list(RECIPES))
def test_axolotl_takes_it_as_it_stands(validated: dict[str, Any], name: str):
    config, end = CONFIGS[name], validated[str(RECIPES[name])]
    assert not isinstance(end, str), end
    rl, trainer, bf16, attention, _ = end
    ours = config["rl"] == "focalpo"
    margin = config.get("focalpo_margin", "dpo")
    assert rl == (margin if ours else config["rl"])
    of_margin = {
        "dpo": "trainer.AxolotlPairwiseTrainer",
        "simpo": "reference_free.AxolotlPairwiseCPOTrainer",
    }
    assert trainer == (f"focalpo_plugins.axolotl.{of_margin[margin]}" if ours else None)
    assert (bf16, attention) == (config["bf16"], config["attn_implementation"])


@pytest.mark.xdist_group("validated")
@pytest.mark.parametrize("name", PAPERS)
def test_axolotl_takes_what_can_be_uncommented(validated: dict[str, Any], name: str):
    more, end = commented(name), validated[f"{RECIPES[name]} uncommented"]
    assert not isinstance(end, str), end
    tracking = {"use_tensorboard", "wandb_project", "wandb_name", "hub_model_id", "hub_strategy"}
    memory = {"focalpo_shared_prompts"} if "adapter" in CONFIGS[name] else set()
    speed = {"focalpo_balanced_batches"} if CONFIGS[name]["rl"] == "focalpo" else set()
    other = {"adapter", "load_in_4bit"} if name.startswith("qwen3") else set()
    assert set(more) == tracking | memory | speed | other
    assert end[-1] == more, "Axolotl drops a key that it doesn't know"
    assert more["wandb_name"] == name == Path(CONFIGS[name]["output_dir"]).name
    if name.startswith("llama3"):  # the licence asks for it
        assert more["hub_model_id"].split("/")[1].startswith("Llama-3-")


def seen(run: Run) -> dict[str, Any]:
    """What WhatIsTrained saw."""
    return json.loads((run.folder / "seen.json").read_text())


@pytest.fixture(scope="session")
def pairs(tiny: Path) -> dict[str, list[dict]]:
    return {
        split: [json.loads(line) for line in (tiny / f"{split}.jsonl").open()][:24]
        for split in ("train", "test")
    }


MAKE = {"llama3": make_llama3, "mistral": make_zephyr, "qwen3": make_qwen3}
WRITE = {**OF_PAPER, "qwen3": (qwen3_prompt, "<|im_end|>")}


@pytest.fixture(scope="session")
def places(pairs: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model and its data for each trained recipe, and the pairs split for KTO with the
    flags of the recipe's header."""
    folder = tmp_path_factory.mktemp("recipes")
    texts = [turn["content"] for pair in pairs["train"] for turn in pair["chosen"]]
    for model, make in MAKE.items():
        make(folder / model, texts)
        for split, some in pairs.items():
            data = folder / f"{model}_{split}.jsonl"
            data.write_text("".join(json.dumps(row) + "\n" for row in rows(some, model)))
            if f"{model}_kto" in RECIPES:
                flags = ["--empty-system"] * ("--empty-system" in header(RECIPES[f"{model}_kto"]))
                out = folder / "kto" / data.name
                words = [folder / model, data, *flags, "--out", out]
                loaded(EXAMPLES / "make_kto_data.py").main([*map(str, words)])
    return folder


def small(name: str, places: Path, **changes: Any) -> dict[str, Any]:
    """The recipe with a small model and its data, without what a CPU can't do."""
    config = json.loads(json.dumps(CONFIGS[name]))
    model, method = split_name(name)
    data = places / "kto" if method == "kto" else places
    for key, split in (("datasets", "train"), ("test_datasets", "test")):
        here = {"path": str(data / f"{model}_{split}.jsonl"), "ds_type": "json", "split": "train"}
        config[key][0] |= here
    config |= {
        "base_model": str(places / model),
        "dataset_prepared_path": str(places / f"prepared_{name}"),
        "output_dir": str(places / f"out_{name}"),
        "max_steps": 2,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "eval_batch_size": 2,
        "eval_steps": 2,
        "save_steps": 2,
        "dataloader_num_workers": 0,
        "bf16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        "plugins": ["test_only_plugins.WhatIsTrained"],
    }
    if "deepspeed" in config:
        config["deepspeed"] = zero3_on_cpu(places)
        config["plugins"].append("test_only_plugins.GlooOnCPU")
    if config["optimizer"].startswith("paged"):
        config["optimizer"] = "adamw_torch"
    return config | changes


@pytest.fixture(scope="session")
def trained(places: Path) -> dict[str, Run]:
    """Every recipe trained for two steps."""
    axolotl = Axolotl(places, places)
    found = {}
    for name in PAPERS:
        config = places / f"{name}.yml"
        config.write_text(yaml.safe_dump(small(name, places)))
        ranks = 2 if "deepspeed" in CONFIGS[name] else 1
        found[name] = axolotl("train", config, ranks=ranks, **(ON_CPU if ranks > 1 else {}))
    return found


@pytest.mark.xdist_group("recipes")
@pytest.mark.parametrize("name", PAPERS)
def test_it_trains(trained: dict[str, Run], name: str):
    run = trained[name]
    assert run.code == 0, run.output[-6000:]
    losses = [loss for (loss,) in run.steps("loss")]
    assert len(losses) == 2
    assert [entry["step"] for entry in run.log if "eval_loss" in entry][-1] == 2
    method = split_name(name)[1]
    if method in FIRST_LOSS:
        assert losses[0] == pytest.approx(FIRST_LOSS[method], abs=1e-5)
    assert all(map(math.isfinite, losses))
    config = CONFIGS[name]
    given = seen(run)
    assert given["ranks"] == (2 if "deepspeed" in config else 1)
    assert given["zero_stage"] == (3 if "deepspeed" in config else None)
    assert given["learning_rate"] == float(config["learning_rate"])
    ours = config["rl"] == "focalpo"
    assert given["trainer"].startswith("AxolotlPairwise") == ours
    assert run.output.count("focalpo_plugins: active") == ours


@pytest.mark.xdist_group("recipes")
@pytest.mark.parametrize("name", PAPERS)
def test_the_trainer_is_given_the_recipes_settings(trained: dict[str, Run], pairs: dict, name: str):
    """Axolotl doesn't just accept a key: the value arrives."""
    config, given = CONFIGS[name], seen(trained[name])
    assert given["max_length"] == config["sequence_len"]
    # Axolotl makes steps of the ratio, by all rows; and never one step.
    steps = math.ceil(len(pairs["train"]) * (1 + (config["rl"] == "kto")) / (2 * given["ranks"]))
    warmup = config.get("warmup_steps", int(config.get("warmup_ratio", 0) * steps))
    assert given["warmup"] == (2 if warmup == 1 else warmup)
    assert given["scheduler"] == "cosine"
    beta = config.get("rl_beta", config.get("orpo_alpha"))
    assert given["beta"] == beta
    for key in ("simpo_gamma", "cpo_alpha"):
        if key in config:
            assert given[key] == config[key]


def sequences(batch: dict[str, list]) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Each sequence of a batch without its padding, and its trained tokens."""
    if "completion_mask" in batch:  # DPO and KTO
        ids, pads, learned = (batch[k] for k in ("input_ids", "attention_mask", "completion_mask"))
    else:  # CPO (SimPO) and ORPO
        both = [
            [*batch[f"chosen_{k}"], *batch[f"rejected_{k}"]]
            for k in ("input_ids", "attention_mask", "labels")
        ]
        ids, pads = both[:2]
        learned = [[label != -100 for label in row] for row in both[2]]
    return {
        (
            tuple(token for token, real in zip(row, pad, strict=True) if real),
            tuple(
                token for token, real, is_it in zip(row, pad, mask, strict=True) if real and is_it
            ),
        )
        for row, pad, mask in zip(ids, pads, learned, strict=True)
    }


@pytest.mark.xdist_group("recipes")
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", PAPERS)
def test_tokens(trained: dict[str, Run], places: Path, pairs: dict, name: str, split: str):
    """One BOS, except for Qwen3, then the prompt, masked; then the answer and the end of the turn,
    both trained. The texts of prompt and answer are written out here by the formats' rules, and
    tokenized without the tokenizer's own special tokens."""
    model, method = split_name(name)
    tokenizer = AutoTokenizer.from_pretrained(places / model)
    write_prompt, end = WRITE[model]
    bos = [] if tokenizer.bos_token is None else [tokenizer.bos_token_id]
    if (model, method) == ("mistral", "orpo"):
        end = "</s>\n</s>"  # Axolotl's strategy for ORPO leaves the newline, and TRL ends it once more
    expected = set()
    for pair in pairs[split]:
        prompt = write_prompt(pair["chosen"][0]["content"])
        bare = prompt.removeprefix(tokenizer.bos_token or "")
        length = len(bos) + len(tokenizer(bare, add_special_tokens=False).input_ids)
        for column in ("chosen", "rejected"):
            text = bare + pair[column][-1]["content"] + end
            ids = [*bos, *tokenizer(text, add_special_tokens=False).input_ids]
            expected.add((tuple(ids), tuple(ids[length:])))
    batch = sequences(seen(trained[name])["train" if split == "train" else "eval"])
    assert len(batch) >= 2
    assert batch <= expected
    for ids, learned in batch:
        assert sum(ids.count(token) for token in bos) == len(bos)
        assert (
            learned[-1]
            == tokenizer.eos_token_id
            == tokenizer.convert_tokens_to_ids(end[-len(tokenizer.eos_token) :])
        )


@pytest.mark.xdist_group("recipes")
@pytest.mark.parametrize("name", PAPERS)
def test_the_saved_tokenizer_writes_the_prompt_of_training(trained: dict[str, Run], name: str):
    """The prompt that an evaluation gets from the model's own template; some templates leave the
    BOS to the tokenizer."""
    write_prompt, _ = WRITE[split_name(name)[0]]
    tokenizer = AutoTokenizer.from_pretrained(trained[name].folder)
    turns = [{"role": "user", "content": "How far?"}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    bos = tokenizer.bos_token or ""
    assert text.removeprefix(bos) == write_prompt("How far?").removeprefix(bos)


@pytest.mark.xdist_group("recipes")
@pytest.mark.parametrize("turns", [1, 2, 3, 4])
def test_the_templates_that_recipes_bring(places: Path, turns: int):
    """Mistral's is Zephyr's with an empty system turn, unless there is one; OpenRLHF's file is the
    same with a BOS. Qwen3's is Axolotl's version of it, without thinking."""
    from axolotl.utils.chat_templates import get_chat_template

    told = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(turns)]
    empty, other = ({"role": "system", "content": text} for text in ("", "Be short."))
    how = {"add_generation_prompt": turns % 2 == 1, "tokenize": False}

    def render(model: str, messages: list, template: str, **more: Any) -> str:
        tokenizer = AutoTokenizer.from_pretrained(places / model)
        return tokenizer.apply_chat_template(messages, chat_template=template, **how, **more)

    ours = {name: CONFIGS[name].get("chat_template_jinja") for name in PAPERS}
    assert {name.split("_")[0] for name, template in ours.items() if template} == {
        "mistral", "qwen3"
    }  # fmt: skip
    (zephyr,) = {ours[name] for name in ours if name.startswith("mistral")}
    for messages, same in ((told, [empty, *told]), ([other, *told], [other, *told])):
        expected = render("mistral", same, ZEPHYR_TEMPLATE)
        assert render("mistral", messages, zephyr) == expected
        of_openrlhf = (EXAMPLES / "openrlhf" / "zephyr.jinja").read_text()
        assert render("mistral", messages, of_openrlhf) == "<s>" + expected
        assert render("qwen3", messages, ours["qwen3_focalpo_lora"]) == render(
            "qwen3", messages, get_chat_template("qwen3"), enable_thinking=False
        )


@pytest.mark.xdist_group("recipes")
@pytest.mark.parametrize("name", ["llama3_focalpo", "qwen3_focalpo_lora"])
def test_it_goes_on_from_its_checkpoint(trained: dict[str, Run], places: Path, name: str):
    """With the flag that the header names, under ZeRO-3 and with an adapter; TensorBoard follows."""
    assert "--auto-resume-from-checkpoints" in words(name)
    folder = places / f"resumed_{name}"
    shutil.copytree(trained[name].folder, folder)
    config = places / f"resumed_{name}.yml"
    changes = {"output_dir": str(folder), "max_steps": 4, "use_tensorboard": True}
    config.write_text(yaml.safe_dump(small(name, places, **changes)))
    ranks = 2 if "deepspeed" in CONFIGS[name] else 1
    run = Axolotl(places, places)(
        "train", config, "--auto-resume-from-checkpoints", ranks=ranks,
        **(ON_CPU if ranks > 1 else {}),
    )  # fmt: skip
    assert run.code == 0, run.output[-6000:]
    assert len(run.steps("loss")) == 4
    assert run.steps("loss")[:2] == trained[name].steps("loss")
    assert list(folder.rglob("events.out.tfevents.*"))


@pytest.mark.parametrize("model", ["llama3", "mistral"])
def test_the_focal_simpo_recipes_are_simpos_with_a_gamma(model: str):
    ours, simpo = (dict(CONFIGS[f"{model}_{method}"]) for method in ("focal_simpo", "simpo"))
    added = {key: ours.pop(key) for key in [*ours] if key.startswith("focalpo_")}
    assert added == {"focalpo_margin": "simpo", "focalpo_gamma": 0.05, "focalpo_variant": "correct"}
    for config in (ours, simpo):
        del config["rl"], config["output_dir"]
    assert ours == simpo
