"""Arena-Hard's files. Its code isn't a package, so what it reads from them is transcribed here."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml
from sklearn.linear_model import LogisticRegression

PAPER, OTHER, BASELINE = "gpt-4-1106-preview", "qwen2.5-72b-instruct", "gpt-4-0314"

# What gen_answer.py and gen_judgment.py (before version 2.0) look up in each file.
ANSWER_KEYS = {"bench_name", "temperature", "max_tokens", "num_choices", "model_list"}
PROMPTS = {"system_prompt", "prompt_template"}
JUDGE_KEYS = {
    "bench_name", "judge_model", "reference", "ref_model", "baseline", "baseline_model", "pairwise",
    "temperature", "max_tokens", "number_of_judgment_attempts", "regex_pattern", "model_list",
}  # fmt: skip
ENDPOINT_KEYS = {"model_name", "endpoints", "api_type", "parallel"}


@pytest.fixture
def names(plan) -> list[str]:
    return [model.name for model in plan.models]


def load(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def test_every_file_is_written(configs: Path, names: list[str]):
    folder = configs / "arena_hard"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    of = ["gen_answer_config.yaml", "judge_paper.yaml", "judge_other.yaml", "chat_template.jinja"]
    assert files == {"api_config.yaml"} | {f"{name}/{file}" for name in names for file in of}


def test_answers(configs: Path, names: list[str]):
    """Greedy, 4096 tokens, of the benchmark's first version."""
    for name in names:
        config = load(configs / "arena_hard" / name / "gen_answer_config.yaml")
        assert set(config) == {"name"} | ANSWER_KEYS
        assert config["bench_name"] == "arena-hard-v0.1"
        given = (config["temperature"], config["max_tokens"], config["num_choices"])
        assert given == (0.0, 4096, 1)
        assert config["model_list"] == [name]


@pytest.mark.parametrize("key, judge", [("paper", PAPER), ("other", OTHER)])
def test_judge(key: str, judge: str, configs: Path, names: list[str]):
    """Judge and baseline by name, both orders, and the verdict's five labels; the paper's is marked,
    and the prompts are the benchmark's own, added when it is asked."""
    for name in names:
        file = configs / "arena_hard" / name / f"judge_{key}.yaml"
        assert ("2026-10-23" in file.read_text()) is (key == "paper")
        config = load(file)
        assert set(config) == {"name"} | JUDGE_KEYS and not set(config) & PROMPTS
        assert config["bench_name"] == "arena-hard-v0.1"
        assert (config["judge_model"], config["baseline_model"]) == (judge, BASELINE)
        assert config["baseline"] is True and config["pairwise"] is True
        assert config["reference"] is False and config["temperature"] == 0
        assert config["model_list"] == [name]
        pattern = re.compile(config["regex_pattern"])
        for label in ("A>>B", "A>B", "A=B", "B>A", "B>>A"):
            assert pattern.findall(f"I say [[{label}]].") == [label]


def test_endpoints(configs: Path, names: list[str]):
    """The key of the paper's judge comes from the environment; the local servers get a word that
    isn't a key."""
    config = load(configs / "arena_hard" / "api_config.yaml")
    assert set(config) == {PAPER, OTHER, *names}
    for name, entry in config.items():
        assert set(entry) == ENDPOINT_KEYS
        assert entry["model_name"] == name and entry["api_type"] == "openai"
    assert config[PAPER]["endpoints"] is None
    for name in (OTHER, *names):
        (place,) = config[name]["endpoints"]
        assert place == {"api_base": "http://127.0.0.1:8000/v1", "api_key": "unused"}


# Verdicts in the two games of a question; the baseline is A in the first and B in the second.
GAMES = [
    ("B>>A", "A>>B"), ("A=B", "A=B"), ("A>B", "B>A"), ("A>>B", "A>B"), ("B>A", None), ("B>A", "A=B"),
]  # fmt: skip


@pytest.fixture
def arena(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "arena-hard-v0.1" / "model_judgment" / PAPER
    folder.mkdir(parents=True)
    with open(folder / "llama3_focalpo.jsonl", "w") as file:
        for i, games in enumerate(GAMES):
            row = {"question_id": str(i), "games": [{"score": score} for score in games]}
            file.write(json.dumps(row) + "\n")
    return tmp_path


def test_rate_by_hand(pipeline: ModuleType, plan, arena: Path):
    """Won and weight of the questions: 6 of 6, 1 of 2, 0 of 2, 1 of 4, 1 of 1, 1.5 of 2, which is
    10.5 of 17. The error is sqrt(6/5 sum (won - r weight)^2) / 17."""
    (model,) = [m for m in plan.models if m.name == "llama3_focalpo"]
    rate, error = pipeline.arena_hard_rate(arena, PAPER, model)["Arena-Hard"]
    assert rate == pytest.approx(100 * 10.5 / 17)
    r = 10.5 / 17
    rest = [6 - 6 * r, 1 - 2 * r, -2 * r, 1 - 4 * r, 1 - r, 1.5 - 2 * r]
    assert error == pytest.approx(100 * math.sqrt(6 / 5 * sum(x * x for x in rest)) / 17)
    assert pipeline.arena_hard_rate(arena, OTHER, model) == {}


def test_rate_is_the_one_of_arena_hards_regression(pipeline: ModuleType, plan, arena: Path):
    """show_result.py fits a Bradley-Terry model to the battles, each twice, of a tie one for each
    side, and prints the win rate that it predicts against the baseline."""
    (model,) = [m for m in plan.models if m.name == "llama3_focalpo"]
    wins = []  # of the model, a battle each
    for first, second in GAMES:
        for verdict, side in ((first, "B"), (second, "A")):
            if verdict:
                weight = 3 if ">>" in verdict else 1
                wins += [[0, 1] if verdict == "A=B" else [int(verdict[0] == side)] * 2] * weight
    y = np.array(wins).ravel()
    x = np.tile([-math.log(10), math.log(10)], (len(y), 1))  # baseline, model
    fit = LogisticRegression(fit_intercept=False, C=np.inf, tol=1e-8).fit(x, y)
    baseline, ours = 400 * fit.coef_[0]
    rate, _ = pipeline.arena_hard_rate(arena, PAPER, model)["Arena-Hard"]
    assert rate == pytest.approx(100 / (1 + 10 ** ((baseline - ours) / 400)), abs=0.01)
