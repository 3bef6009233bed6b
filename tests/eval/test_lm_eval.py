"""This project's lm-eval files in the real lm-eval: names, metrics and shots, and one run on a
CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from harness import EXAMPLES
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval_tasks import QUESTIONS, shipped_config, write_tasks
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.xdist_group("lm_eval")  # one worker makes the run

GROUP = EXAMPLES / "eval" / "tasks" / "table2.yaml"

# The Open LLM leaderboard v1, from its documentation: few-shot examples and metric of each task. The
# leaderboard's name of the metric comes first; what follows is what our README says is printed too.
LEADERBOARD = {
    "arc_challenge": (25, ["acc_norm", "acc"]),
    "hellaswag": (10, ["acc_norm", "acc"]),
    "truthfulqa_mc2": (0, ["acc"]),
    "winogrande": (5, ["acc"]),
    "gsm8k": (5, ["exact_match"]),
    "mmlu": (5, ["acc"]),
}


def test_run_files(plan, configs: Path):
    """One for each model; lm-eval accepts every key, and the model gets only plain text."""
    files = {path.stem: path for path in (configs / "lm_eval").iterdir()}
    assert set(files) == {model.name for model in plan.models}
    for model in plan.models:
        config = EvaluatorConfig.from_config(files[model.name])
        assert config.model == "hf"
        bos = {"add_bos_token": True} if model.bos_in_prompt else {}
        assert config.model_args == {"pretrained": model.path, "dtype": "bfloat16", **bos}
        assert config.tasks == [yaml.safe_load(GROUP.read_text())["group"]]
        assert config.include_path == [str(GROUP.parent)]
        assert config.apply_chat_template is False
        assert config.fewshot_as_multiturn is False
        assert config.system_instruction is None
        assert config.limit is None and config.num_fewshot is None
        assert config.batch_size == 1


def test_group_is_the_leaderboards():
    """Every name exists in the installed release, has the metric, and gets its few-shot count."""
    group = yaml.safe_load(GROUP.read_text())
    members = {entry.get("task", entry.get("group")): entry for entry in group["task"]}
    assert {name: entry["num_fewshot"] for name, entry in members.items()} == {
        name: shots for name, (shots, _) in LEADERBOARD.items()
    }
    for name, (_, metrics) in LEADERBOARD.items():
        shipped = shipped_config(name)
        # A group has to be named by `group`: with `task` all its members get its name, and lm-eval
        # loops.
        assert ("group" in shipped) == ("group" in members[name])
        listed = shipped.get("metric_list", shipped.get("aggregate_metric_list"))
        assert set(metrics) <= {entry["metric"] for entry in listed}


@pytest.fixture(scope="module")
def run(
    tiny: Path, configs: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict, dict[str, list[dict]]]:
    """Results and samples of ``lm-eval run --config``: our run file and our group, unchanged except for the model, the CPU and the place of the tasks' data."""
    folder = tmp_path_factory.mktemp("lm_eval")
    tasks = folder / "tasks"
    tasks.mkdir()
    write_tasks(tasks)
    config = yaml.safe_load((configs / "lm_eval" / "llama3_focalpo.yml").read_text()) | {
        "model_args": {"pretrained": str(tiny / "model"), "dtype": "float32"},
        "include_path": [str(GROUP.parent), str(tasks)],
        "device": "cpu",
        "output_path": str(folder / "out"),
    }
    (folder / "run.yml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", "--config", "run.yml"],
        cwd=folder,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(folder / "hf"),
            "TOKENIZERS_PARALLELISM": "false",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    (results,) = (folder / "out").rglob("results_*.json")
    samples = {
        path.name.removeprefix("samples_").rpartition("_")[0]: [
            json.loads(line) for line in path.read_text().splitlines()
        ]
        for path in (folder / "out").rglob("samples_*.jsonl")
    }
    return json.loads(results.read_text()), samples


def test_shots_and_metrics_of_the_run(run):
    """25 examples reach ARC's prompt and so on, also the subjects of MMLU, and the leaderboard's
    metrics are in the results."""
    results, samples = run
    for name, (shots, metrics) in LEADERBOARD.items():
        for task in ["mmlu_anatomy", "mmlu_astronomy"] if name == "mmlu" else [name]:
            assert results["n-shot"][task] == shots
            for metric in metrics:
                found = [key for key in results["results"][task] if key.startswith(f"{metric},")]
                assert found, results["results"][task]
    prompt = samples["arc_challenge"][0]["arguments"]["gen_args_0"]["arg_0"]
    assert prompt.count("Question:") == 26
    assert "exact_match,strict-match" in results["results"]["gsm8k"]


def log_probability(model, tokenizer, context: str, continuation: str) -> float:
    """Sum of the continuation's log-probabilities after the context."""
    before = tokenizer(context)["input_ids"]
    ids = tokenizer(context + continuation)["input_ids"]
    assert ids[: len(before)] == before and len(ids) <= 512
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    logps = logits.log_softmax(-1)
    return sum(logps[i - 1, ids[i]].item() for i in range(len(before), len(ids)))


def test_accuracy_by_hand(run, tiny: Path):
    """ARC: the answer with the highest log-probability is right for acc, the one with the highest per
    character for acc_norm; MMLU: the letter, over the questions of both subjects alike."""
    results, samples = run
    model = AutoModelForCausalLM.from_pretrained(tiny / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    first = QUESTIONS[0]
    shots = f"Question: {first[0]}\nAnswer: {first[1][first[2]]}\n\n" * 25
    plain, normed = [], []
    for sample, (question, choices, answer) in zip(
        samples["arc_challenge"], QUESTIONS, strict=True
    ):
        context = f"{shots}Question: {question}\nAnswer:"
        sums = [log_probability(model, tokenizer, context, f" {choice}") for choice in choices]
        assert [args["arg_0"] for args in sample["arguments"].values()] == [context] * 4
        seen = [float(response[0][0]) for response in sample["resps"]]
        assert seen == pytest.approx(sums, abs=1e-3)
        plain.append(sums.index(max(sums)) == answer)
        per = [value / len(choice) for value, choice in zip(sums, choices, strict=True)]
        normed.append(per.index(max(per)) == answer)
    assert plain != normed, "the two have to differ somewhere, or nothing is told apart"
    assert [sample["acc"] for sample in samples["arc_challenge"]] == plain
    assert [sample["acc_norm"] for sample in samples["arc_challenge"]] == normed
    arc = results["results"]["arc_challenge"]
    assert arc["acc,none"] == pytest.approx(sum(plain) / 6)
    assert arc["acc_norm,none"] == pytest.approx(sum(normed) / 6)

    right = 0
    for question, choices, answer in QUESTIONS:

        def ask(question: str, choices: list[str]) -> str:
            lines = [f"{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=True)]
            return "\n".join([question, *lines, "Answer:"])

        context = f"{ask(*first[:2])} {'ABCD'[first[2]]}\n\n" * 5 + ask(question, choices)
        sums = [log_probability(model, tokenizer, context, f" {letter}") for letter in "ABCD"]
        right += sums.index(max(sums)) == answer
    assert results["results"]["mmlu"]["acc,none"] == pytest.approx(right / 6)
