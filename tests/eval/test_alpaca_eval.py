"""AlpacaEval's files in the real alpaca_eval: its loader, its prompts, its judge's settings, and the
old vLLM inside it, of which a stand-in writes down what it is handed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from alpaca_eval import completion_parsers, decoders
from alpaca_eval.constants import EVALUATORS_CONFIG_DIR
from alpaca_eval.utils import load_configs
from chat_formats import llama3_tokenizer, mistral_tokenizer
from harness import EXAMPLES
from transformers import PreTrainedTokenizerFast

FILE = EXAMPLES / "eval" / "models.yml"
ENTRIES = {
    entry["name"]: entry
    for entry in yaml.safe_load(FILE.read_text())["models"]
    if "*" not in entry["path"]  # a sweep's folders, which don't exist here
}
MODELS = list(ENTRIES)

# Temperature, new tokens, top_p, stop ids, as SimPO's and LION's repositories have them.
STOP = [128001, 128009]
DECODING = {
    ("simpo", "llama3_focalpo"): (0.9, 4096, 1.0, STOP),
    ("simpo", "mistral_focalpo"): (0.7, 2048, 1.0, None),
    ("greedy", "llama3_focalpo"): (0.0, 4096, 1.0, STOP),
    ("greedy", "mistral_focalpo"): (0.0, 2048, 1.0, None),
    ("lion", "llama3_focalpo"): (1.0, 2048, 0.7, STOP),
    ("lion", "mistral_focalpo"): (1.0, 2048, 0.7, None),
}
TOKENIZERS = {"llama3": llama3_tokenizer, "zephyr": mistral_tokenizer}
# The chat formats of training: Llama 3's with its BOS, and Zephyr's, which gets its BOS here.
TRAINING = {
    "llama3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{{ '' }}"
        "{% endif %}"
    ),
    "zephyr": (
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{{ '' }}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{{ '' }}{% endif %}"
    ),
}
# Only ORPO's own code has Zephyr's format without a system turn.
WITHOUT_SYSTEM = {"mistral_orpo_public"}
ASKED = "Why is the sky blue?\n\nSay it in two lines, for example:\n  a b\n  c d"


def trained_on(
    model: str, tokenizer: PreTrainedTokenizerFast, text: str, system: str | None = None
) -> list[int]:
    """The prompt's tokens in training; Zephyr's recipes put an empty system turn before it."""
    form = ENTRIES[model]["format"]
    if system is None and form == "zephyr" and model not in WITHOUT_SYSTEM:
        system = ""
    first = [] if system is None else [{"role": "system", "content": system}]
    return tokenizer.apply_chat_template(
        [*first, {"role": "user", "content": text}],
        chat_template=TRAINING[form],
        add_generation_prompt=True,
        return_dict=False,
    )


def test_every_file_is_written(configs: Path):
    folder = configs / "alpaca_eval"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    names = ["configs.yaml", "served.yaml", "prompt.txt"]
    wanted = {f"{of}/{m}/{name}" for of, _ in DECODING for m in MODELS for name in names}
    assert files == wanted | {f"judges/{judge}/configs.yaml" for judge in ("paper", "other")}


@pytest.mark.parametrize("decoding, model", DECODING)
def test_config(decoding: str, model: str, configs: Path):
    """alpaca_eval loads the folder and the second file, and they hold the protocol's values."""
    temperature, tokens, top_p, stop = DECODING[decoding, model]
    folder = configs / "alpaca_eval" / decoding / model
    (name, local), *others = load_configs(folder).items()
    (served_name, served), *more = load_configs(folder / "served.yaml").items()
    assert not others and not more and name == served_name == model
    assert local["prompt_template"] == served["prompt_template"] == str(folder / "prompt.txt")
    assert callable(decoders.get_fn_completions(served["fn_completions"]))
    assert local["fn_completions"] == "vllm_local_completions"
    kwargs = local["completions_kwargs"]
    assert (kwargs["temperature"], kwargs["max_new_tokens"]) == (temperature, tokens)
    assert (kwargs["top_p"], kwargs.get("stop_token_ids")) == (top_p, stop)
    assert kwargs["do_sample"] is (temperature > 0)
    assert kwargs["model_name"] == f"outputs/{model}"
    kwargs = served["completions_kwargs"]
    assert (kwargs["temperature"], kwargs["max_tokens"]) == (temperature, tokens)
    assert (kwargs["top_p"], kwargs["extra_body"].get("stop_token_ids")) == (top_p, stop)


@pytest.mark.parametrize("model", MODELS)
def test_prompt_is_the_one_of_training(model: str, configs: Path):
    """Token for token, with exactly one BOS: the tokenizer's own, which vLLM asks for, or the
    prompt's if the tokenizer adds none."""
    tokenizer = TOKENIZERS[ENTRIES[model]["format"]]()
    trained = trained_on(model, tokenizer, ASKED)
    if ENTRIES[model].get("bos_in_prompt"):
        tokenizer.backend_tokenizer.post_processor = None
    template = (configs / "alpaca_eval" / "simpo" / model / "prompt.txt").read_text()
    ids = tokenizer(template.format(instruction=ASKED))["input_ids"]
    assert ids == trained
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("model", MODELS)
def test_arena_hards_chat_template_is_the_one_of_training(model: str, configs: Path):
    """vLLM's chat endpoint adds no BOS, so that template contains it. A system turn in the request
    replaces the empty one."""
    tokenizer = TOKENIZERS[ENTRIES[model]["format"]]()
    template = (configs / "arena_hard" / model / "chat_template.jinja").read_text()

    def ids(*messages: dict[str, str]) -> list[int]:
        return tokenizer.apply_chat_template(
            list(messages), chat_template=template, add_generation_prompt=True, return_dict=False
        )

    user = {"role": "user", "content": ASKED}
    assert ids(user) == trained_on(model, tokenizer, ASKED)
    assert ids(user).count(tokenizer.bos_token_id) == 1
    system = {"role": "system", "content": "Be brief."}
    assert ids(system, user) == trained_on(model, tokenizer, ASKED, "Be brief.")


def test_the_papers_judge_is_alpaca_evals(configs: Path):
    """weighted_alpaca_eval_gpt4_turbo as shipped, except for the place of the prompt and a mark."""
    file = configs / "alpaca_eval" / "judges" / "paper" / "configs.yaml"
    assert "2026-10-23" in file.read_text()
    ((name, ours),) = load_configs(file).items()
    shipped = load_configs(EVALUATORS_CONFIG_DIR / "weighted_alpaca_eval_gpt4_turbo")
    (theirs,) = shipped.values()
    assert name == "weighted_alpaca_eval_gpt-4-1106-preview"
    assert Path(ours.pop("prompt_template")) == EVALUATORS_CONFIG_DIR / theirs.pop(
        "prompt_template"
    )
    assert ours["completions_kwargs"].pop("requires_chatml") is True  # there by the model's name
    assert ours == theirs


def test_the_other_judge_differs_in_the_model_alone(configs: Path):
    """For the same prompt, the same two tokens' probabilities, from our own server."""
    judges = configs / "alpaca_eval" / "judges"
    (other,) = load_configs(judges / "other").values()
    (paper,) = load_configs(judges / "paper").values()
    kwargs, theirs = other.pop("completions_kwargs"), paper.pop("completions_kwargs")
    assert other == paper
    changed = {key for key in kwargs if kwargs[key] != theirs.get(key)}
    assert changed == {"model_name", "top_logprobs", "price_per_token", "client_kwargs"}
    assert kwargs["top_logprobs"] > theirs["top_logprobs"] == 5
    assert callable(getattr(completion_parsers, other["fn_completion_parser"]))


# Instead of the engine: it records what alpaca_eval passes to vLLM, and answers as the server does.
VLLM = """
import json, re, types

class SamplingParams:
    def __init__(self, **kwargs):
        vars(self).update(kwargs)

class LLM:
    def __init__(self, **kwargs):
        self.kwargs = kwargs

    def generate(self, prompts, sampling_params):
        asked = {"engine": self.kwargs, "params": vars(sampling_params), "prompts": prompts}
        with open("asked.jsonl", "a") as file:
            file.write(json.dumps(asked) + chr(10))
        texts = ["answer worth " + re.search(r"worth (\\d+)", prompt)[1] for prompt in prompts]
        return [types.SimpleNamespace(outputs=[types.SimpleNamespace(text=t)]) for t in texts]
"""


@pytest.mark.parametrize("model", ["llama3_focalpo", "mistral_focalpo"])
def test_in_process(model: str, tmp_path: Path, pipeline: ModuleType):
    """configs.yaml: what vLLM is handed. ``use_beam_search`` is alpaca-eval 0.6.2's doing, of which
    the README warns. A second call asks what is left, which is nothing."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "vllm.py").write_text(VLLM)
    rows = [
        {"dataset": "x", "instruction": f"Write {i} worth {i}.", "output": "", "generator": "r"}
        for i in range(5)
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    tokenizer = TOKENIZERS[ENTRIES[model]["format"]]()
    tokenizer.save_pretrained(tmp_path / "outputs" / model)
    kind = {"model_type": "llama" if model.startswith("llama") else "mistral"}
    (tmp_path / "outputs" / model / "config.json").write_text(json.dumps(kind))
    command = [sys.executable, pipeline.__file__, "generate", "--models", model, "--in-process"]
    for _ in range(2):
        done = subprocess.run(
            [*command, "--benchmarks", "alpaca_eval", "--alpaca-data", "data.json"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path / "site"), "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout[-6000:]
    (asked,) = [json.loads(line) for line in (tmp_path / "asked.jsonl").read_text().splitlines()]
    assert asked["engine"]["model"] == asked["engine"]["tokenizer"] == f"outputs/{model}"
    assert asked["engine"]["tensor_parallel_size"] == 1
    temperature, tokens, top_p, stop = DECODING["simpo", model]
    params = {"temperature": temperature, "max_tokens": tokens, "top_p": top_p}
    if stop:
        params["stop_token_ids"] = stop
    assert asked["params"] == params | {"use_beam_search": True}
    assert tokenizer(asked["prompts"])["input_ids"] == [
        trained_on(model, tokenizer, row["instruction"]) for row in rows
    ]
    file = tmp_path / "outputs/eval/alpaca_eval/simpo" / model / "model_outputs.json"
    assert [row["output"] for row in json.loads(file.read_text())] == [
        f"answer worth {i}" for i in range(5)
    ]
