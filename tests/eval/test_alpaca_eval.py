"""AlpacaEval for real: its loader, its two ways to an answer, and its judge, with stand-ins for vLLM
and for the judge's server."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import alpaca_eval
import numpy as np
import pandas as pd
import pytest
from alpaca_eval import decoders
from alpaca_eval.utils import load_configs
from chat_formats import llama3_tokenizer, mistral_tokenizer
from harness import EXAMPLES
from stand_in import StandIn
from transformers import PreTrainedTokenizerFast

FOLDER = EXAMPLES / "eval" / "alpaca_eval"
MODELS = ["llama3_focalpo", "mistral_focalpo"]
JUDGE = "weighted_alpaca_eval_gpt4_turbo"

# The standard protocol's decoding: temperature, new tokens, top_p, stop ids.
DECODING = {
    "llama3_focalpo": (0.9, 4096, 1.0, [128001, 128009]),
    "mistral_focalpo": (0.7, 2048, 1.0, None),
}
TOKENIZERS = {"llama3_focalpo": llama3_tokenizer, "mistral_focalpo": mistral_tokenizer}
# The chat formats of training, as the two models' tokenizers have them: Llama 3's, BOS included, and
# Zephyr's, to which the BOS is added here.
TRAINING = {
    "llama3_focalpo": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{{ '' }}"
        "{% endif %}"
    ),
    "mistral_focalpo": (
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{{ '' }}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{{ '' }}{% endif %}"
    ),
}
ASKED = "Why is the sky blue?\n\nSay it in two lines, for example:\n  a b\n  c d"


def trained_on(model: str, tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The prompt's tokens in training."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}],
        chat_template=TRAINING[model],
        add_generation_prompt=True,
        return_dict=False,
    )


def test_every_file_is_found():
    files = {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*") if path.is_file()}
    names = ["configs.yaml", "served.yaml", "prompt.txt"]
    assert files == {f"{model}/{name}" for model in MODELS for name in names}


@pytest.mark.parametrize("model", MODELS)
def test_config(model: str):
    """alpaca_eval loads the folder and the second file, and they hold the protocol's values."""
    temperature, tokens, top_p, stop = DECODING[model]
    (name, local), *others = load_configs(FOLDER / model).items()
    (served_name, served), *more = load_configs(FOLDER / model / "served.yaml").items()
    assert not others and not more and name == served_name == model
    assert local["prompt_template"] == served["prompt_template"] == f"{model}/prompt.txt"
    assert callable(decoders.get_fn_completions(served["fn_completions"]))
    assert local["fn_completions"] == "vllm_local_completions"
    kwargs = local["completions_kwargs"]
    assert (kwargs["temperature"], kwargs["max_new_tokens"]) == (temperature, tokens)
    assert (kwargs["top_p"], kwargs.get("stop_token_ids")) == (top_p, stop)
    assert kwargs["do_sample"] is True
    kwargs = served["completions_kwargs"]
    assert (kwargs["temperature"], kwargs["max_tokens"]) == (temperature, tokens)
    assert (kwargs["top_p"], kwargs["extra_body"].get("stop_token_ids")) == (top_p, stop)


@pytest.mark.parametrize("model", MODELS)
def test_prompt_is_the_one_of_training(model: str):
    """Token for token, with exactly one BOS: the tokenizer's own, which vLLM asks it for."""
    tokenizer = TOKENIZERS[model]()
    template = (FOLDER / model / "prompt.txt").read_text()
    assert tokenizer.bos_token not in template
    ids = tokenizer(template.format(instruction=ASKED))["input_ids"]
    assert ids == trained_on(model, tokenizer, ASKED)
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("model", MODELS)
def test_arena_hards_chat_template_is_the_one_of_training(model: str):
    """vLLM's chat endpoint adds no BOS, so that template holds it."""
    tokenizer = TOKENIZERS[model]()
    template = (EXAMPLES / "eval" / "arena_hard" / model / "chat_template.jinja").read_text()
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": ASKED}],
        chat_template=template,
        add_generation_prompt=True,
        return_dict=False,
    )
    assert ids == trained_on(model, tokenizer, ASKED)
    assert ids.count(tokenizer.bos_token_id) == 1


# What the model's answer and the reference are worth, by question. Of two texts worth a and b the
# judge gives the first a / (a + b).
WORTH = [(3, 1), (1, 1), (1, 4), (1, 3), (9, 1), (1, 1), (2, 3), (7, 3)]
# 3/4 + 1/2 + 1/5 + 1/4 + 9/10 + 1/2 + 2/5 + 7/10 = 4.2, over eight questions.
WIN_RATE = 52.5


def write_dataset(folder: Path) -> Path:
    rows = [
        {
            "dataset": "made_up",
            "instruction": f"Question {i}: write a text worth {ours}",
            "output": f"reference worth {theirs}",
            "generator": "reference",
        }
        for i, (ours, theirs) in enumerate(WORTH)
    ]
    path = folder / "dataset.json"
    path.write_text(json.dumps(rows))
    return path


def write_hub_cache(folder: Path) -> None:
    """The one file that the length-controlled rate fetches from the hub: the judgments of two models
    that play for length, which the regression is fitted on as well. Made up: neither length nor
    question matters in it."""
    repo = folder / "hub" / "datasets--tatsu-lab--alpaca_eval"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = 2 * len(WORTH)
    pd.DataFrame(
        {
            "model": "gamed",
            "preference": 0.5,
            "index": list(range(len(WORTH))) * 2,
            "std_delta_len": rng.normal(size=rows),
            "instruction_difficulty": list(rng.normal(size=len(WORTH))) * 2,
            "not_gamed_baseline": False,
        }
    ).to_csv(snapshot / "df_gamed.csv", index=False)


@pytest.fixture
def run_alpaca_eval(tmp_path: Path, stand_in: StandIn) -> Callable[..., None]:
    """``alpaca_eval`` as a process of its own, on a copy of the package with our folders in it, as the
    README has the reader copy them."""
    copy = tmp_path / "site" / "alpaca_eval"
    shutil.copytree(Path(alpaca_eval.__file__).parent, copy)
    for model in MODELS:
        shutil.copytree(FOLDER / model, copy / "models_configs" / model)
        served = copy / "models_configs" / model / "served.yaml"
        text = served.read_text()
        assert "http://127.0.0.1:8000/v1" in text
        served.write_text(text.replace("http://127.0.0.1:8000/v1", stand_in.url))
    write_hub_cache(tmp_path / "hf")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OPENAI_", "PYTHONPATH"))}
    env |= {
        "PYTHONPATH": str(tmp_path / "site"),
        "OPENAI_API_KEY": "unused",
        "OPENAI_BASE_URL": stand_in.url,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
    }

    def run(*arguments: str) -> None:
        command = [sys.executable, "-m", "alpaca_eval.main", *arguments]
        done = subprocess.run(
            [*command, "--annotators_config", JUDGE, "--precomputed_leaderboard", "None"],
            env=env,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout[-6000:]

    return run


def check_judgments(server: StandIn, results: Path, model: str) -> None:
    """One call a question, to the fixed judge, and the win rate that the stand-in's shares give."""
    board = pd.read_csv(results / JUDGE / "leaderboard.csv", index_col=0)
    assert len(server.judgments) == len(WORTH)
    for asked in server.judgments:
        assert asked["model"] == "gpt-4-1106-preview"
        assert (asked["logprobs"], asked["top_logprobs"], asked["max_tokens"]) == (True, 5, 1)
    # The order of the two texts is drawn: both orders occur.
    first = [re.search(r"(answer|reference) worth", a["messages"][-1]["content"])[1] for a in server.judgments]  # fmt: skip
    assert set(first) == {"answer", "reference"}
    assert board.loc[model, "n_total"] == len(WORTH)
    assert board.loc[model, "win_rate"] == pytest.approx(WIN_RATE, abs=1e-3)
    # In our made-up judgments length says nothing, so controlling for it changes little.
    assert board.loc[model, "length_controlled_winrate"] == pytest.approx(WIN_RATE, abs=10)


# In place of the engine: it writes down what alpaca_eval hands to vLLM, and answers as the server does.
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


@pytest.mark.parametrize("model", MODELS)
def test_in_process(
    model: str, tmp_path: Path, stand_in: StandIn, run_alpaca_eval: Callable[..., None]
):
    """configs.yaml: what vLLM is handed. ``use_beam_search`` is alpaca-eval 0.6.2's doing, of which the
    README warns."""
    (tmp_path / "site" / "vllm.py").write_text(VLLM)
    run_alpaca_eval(
        "evaluate_from_model",
        model,
        f"--evaluation_dataset={write_dataset(tmp_path)}",
    )
    (asked,) = [json.loads(line) for line in (tmp_path / "asked.jsonl").read_text().splitlines()]
    assert asked["engine"]["model"] == asked["engine"]["tokenizer"] == f"outputs/{model}"
    assert asked["engine"]["tensor_parallel_size"] == 1
    temperature, tokens, top_p, stop = DECODING[model]
    params = {"temperature": temperature, "max_tokens": tokens, "top_p": top_p}
    if stop:
        params["stop_token_ids"] = stop
    assert asked["params"] == params | {"use_beam_search": True}
    tokenizer = TOKENIZERS[model]()
    assert tokenizer(asked["prompts"])["input_ids"] == [
        trained_on(model, tokenizer, f"Question {i}: write a text worth {ours}")
        for i, (ours, _) in enumerate(WORTH)
    ]
    assert stand_in.completions == []
    check_judgments(stand_in, tmp_path / "results" / model, model)


@pytest.mark.parametrize("model", MODELS)
def test_served(
    model: str, tmp_path: Path, stand_in: StandIn, run_alpaca_eval: Callable[..., None]
):
    """served.yaml: what a vLLM server gets, and the judgment of what it answers; and, for one of the
    two, the judgment alone once more."""
    run_alpaca_eval(
        "evaluate_from_model",
        f"{model}/served.yaml",
        f"--evaluation_dataset={write_dataset(tmp_path)}",
    )
    temperature, tokens, top_p, stop = DECODING[model]
    tokenizer = TOKENIZERS[model]()
    prompts = []
    for asked in stand_in.completions:
        assert asked["model"] == model
        assert (asked["temperature"], asked["max_tokens"]) == (temperature, tokens)
        assert (asked["top_p"], asked.get("stop_token_ids")) == (top_p, stop)
        assert asked["add_special_tokens"] is True
        prompts += asked["prompt"]
    wanted = [f"Question {i}: write a text worth {ours}" for i, (ours, _) in enumerate(WORTH)]
    assert sorted(tokenizer(prompts)["input_ids"]) == sorted(
        trained_on(model, tokenizer, text) for text in wanted
    )
    results = tmp_path / "results" / model
    outputs = json.loads((results / "model_outputs.json").read_text())
    assert [row["output"] for row in outputs] == [f"answer worth {ours}" for ours, _ in WORTH]
    assert {row["generator"] for row in outputs} == {model}
    check_judgments(stand_in, results, model)
    if model == MODELS[0]:
        stand_in.judgments.clear()
        (results / JUDGE / "leaderboard.csv").unlink()
        run_alpaca_eval(
            "evaluate",
            f"--model_outputs={results / 'model_outputs.json'}",
            f"--reference_outputs={tmp_path / 'dataset.json'}",
            "--caching_path=None",
        )
        check_judgments(stand_in, results, model)
