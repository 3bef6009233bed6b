"""Arena-Hard's files. Its code is no package, so what it reads from them is transcribed here."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from harness import EXAMPLES

FOLDER = EXAMPLES / "eval" / "arena_hard"
MODELS = ["llama3_focalpo", "mistral_focalpo"]
JUDGE, BASELINE = "gpt-4-1106-preview", "gpt-4-0314"

# What gen_answer.py and gen_judgment.py (before version 2.0) look up in each file.
ANSWER_KEYS = {"bench_name", "temperature", "max_tokens", "num_choices", "model_list"}
JUDGE_KEYS = {
    "bench_name", "judge_model", "reference", "ref_model", "baseline", "baseline_model", "pairwise",
    "temperature", "max_tokens", "number_of_judgment_attempts", "regex_pattern", "system_prompt",
    "prompt_template", "model_list",
}  # fmt: skip
ENDPOINT_KEYS = {"model_name", "endpoints", "api_type", "parallel"}
PROMPTS = {"system_prompt", "prompt_template"}


def load(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def test_every_file_is_found():
    files = {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*") if path.is_file()}
    names = ["gen_answer_config.yaml", "judge_config.yaml", "chat_template.jinja"]
    assert files == {"api_config.yaml"} | {f"{model}/{name}" for model in MODELS for name in names}


@pytest.mark.parametrize("model", MODELS)
def test_answers(model: str):
    """Greedy, 4096 tokens, of the benchmark's first version."""
    config = load(FOLDER / model / "gen_answer_config.yaml")
    assert set(config) == {"name"} | ANSWER_KEYS
    assert config["bench_name"] == "arena-hard-v0.1"
    assert (config["temperature"], config["max_tokens"], config["num_choices"]) == (0.0, 4096, 1)
    assert config["model_list"] == [model]


@pytest.mark.parametrize("model", MODELS)
def test_judge(model: str):
    """Judge and baseline by name, both orders, and the verdict's five labels."""
    config = load(FOLDER / model / "judge_config.yaml")
    assert set(config) == {"name"} | JUDGE_KEYS - PROMPTS
    assert config["bench_name"] == "arena-hard-v0.1"
    assert (config["judge_model"], config["baseline_model"]) == (JUDGE, BASELINE)
    assert config["baseline"] is True and config["pairwise"] is True
    assert config["reference"] is False and config["temperature"] == 0
    assert config["model_list"] == [model]
    pattern = re.compile(config["regex_pattern"])
    for label in ("A>>B", "A>B", "A=B", "B>A", "B>>A"):
        assert pattern.findall(f"I say [[{label}]].") == [label]


def test_endpoints():
    """The judge's key comes from the environment; the local servers get a word that is no key."""
    config = load(FOLDER / "api_config.yaml")
    assert set(config) == {JUDGE, *MODELS}
    for name, entry in config.items():
        assert set(entry) == ENDPOINT_KEYS
        assert entry["model_name"] == name and entry["api_type"] == "openai"
    assert config[JUDGE]["endpoints"] is None
    for model in MODELS:
        (endpoint,) = config[model]["endpoints"]
        assert endpoint == {"api_base": "http://127.0.0.1:8000/v1", "api_key": "unused"}


@pytest.mark.parametrize("model", MODELS)
def test_the_judges_prompt_is_added(model: str, tmp_path: Path):
    """The README's line takes the two prompts from Arena-Hard's own file, and nothing else of it."""
    page = (EXAMPLES / "eval" / "README.md").read_text()
    (line,) = re.findall(r"^    (grep -hE .*)$", page, re.MULTILINE)
    config = tmp_path / "arena-hard" / "config"
    config.mkdir(parents=True)
    (config / "judge_config.yaml").write_text(
        "judge_model: another\ntemperature: 1\n"
        'system_prompt: "Be fair.\\n\\nSay [[A>B]] or [[B>A]]."\n\n'
        'prompt_template: ["<|User|>\\n{question_1}\\n{answer_1}\\n{answer_2}"]\n'
        "model_list:\n  - another\n"
    )
    (tmp_path / "examples").symlink_to(EXAMPLES)
    line = line.replace("llama3_focalpo", model)
    subprocess.run(["bash", "-euo", "pipefail", "-c", line], cwd=tmp_path, check=True)
    made = load(config / "focalpo_judge.yaml")
    assert set(made) == {"name"} | JUDGE_KEYS
    assert made["system_prompt"] == "Be fair.\n\nSay [[A>B]] or [[B>A]]."
    assert made["prompt_template"] == ["<|User|>\n{question_1}\n{answer_1}\n{answer_2}"]
    ours = load(FOLDER / model / "judge_config.yaml")
    assert {key: made[key] for key in ours} == ours
