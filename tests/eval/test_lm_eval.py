"""Our lm-eval files in the real lm-eval: names, metrics and shots, and one run on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import lm_eval.tasks
import pytest
import torch
import yaml
from harness import EXAMPLES
from lm_eval.config.evaluate_config import EvaluatorConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.xdist_group("lm_eval")  # one worker makes the run

FOLDER = EXAMPLES / "eval" / "lm_eval"
GROUP = FOLDER / "tasks" / "table2.yaml"
RUN_FILES = sorted(FOLDER.glob("*.yml"))
SHIPPED = Path(lm_eval.tasks.__file__).parent

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
# Where lm-eval has them.
FILES = {
    "arc_challenge": "arc/arc_challenge.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "truthfulqa_mc2": "truthfulqa/truthfulqa_mc2.yaml",
    "winogrande": "winogrande/default.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
    "mmlu": "mmlu/default/_mmlu.yaml",
}

QUESTIONS = [
    ("What colour is a swan?", ["white", "It depends on many things.", "red", "one"], 0),
    ("What colour is a pea?", ["There are many words in the list.", "green", "A pea.", "hot"], 1),
    ("What is the opposite of hot?", ["cold", "cold and wet and dark", "hot", "a bird"], 1),
    ("What kind of thing is a trout?", ["tree", "bird", "A trout is a kind of fish.", "fish"], 2),
    ("What kind of thing is an owl?", ["bird", "A kind of bird.", "a tool", "plum"], 0),
    ("Name the opposite of wet.", ["dry", "wet", "loud and quiet, near and far", "two"], 3),
]


def test_every_file_is_found():
    assert [path.name for path in RUN_FILES] == ["llama3_focalpo.yml", "mistral_focalpo.yml"]
    assert {p.suffix for p in FOLDER.rglob("*") if p.is_file()} == {".yml", ".yaml"}
    assert list(FOLDER.rglob("*.yaml")) == [GROUP]


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_run_file(path: Path):
    """lm-eval takes every key, and nothing but plain text is given to the model."""
    config = EvaluatorConfig.from_config(path)
    assert config.model == "hf"
    assert config.model_args == {"pretrained": f"outputs/{path.stem}", "dtype": "bfloat16"}
    assert config.tasks == [yaml.safe_load(GROUP.read_text())["group"]]
    assert (EXAMPLES.parent / config.include_path) == GROUP.parent
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
        # A group has to be named by `group`: under `task` all its members get its own name, and
        # lm-eval goes round in circles.
        assert ("group" in shipped) == ("group" in members[name])
        listed = shipped.get("metric_list", shipped.get("aggregate_metric_list"))
        assert set(metrics) <= {entry["metric"] for entry in listed}


def shipped_config(name: str) -> dict:
    """What the installed lm-eval has under a name, with what it includes."""

    class Loader(yaml.SafeLoader):
        """Leaves functions alone."""

    Loader.add_constructor("!function", lambda loader, node: node.value)

    def load(path: Path) -> dict:
        config = yaml.load(path.read_text(), Loader)
        include = config.pop("include", None)
        return {**(load(path.parent / include) if include else {}), **config}

    config = load(SHIPPED / FILES[name])
    assert config.get("group", config["task"]) == name
    return config


def write_tasks(folder: Path) -> None:
    """The six tasks as lm-eval ships them, but over a few rows of ours, and with two subjects."""
    arc = [
        {
            "question": question,
            "choices": {"text": choices, "label": list("ABCD")},
            "answerKey": "ABCD"[answer],
        }
        for question, choices, answer in QUESTIONS
    ]
    swag = [
        {
            "ctx_a": question,
            "ctx_b": "it",
            "activity_label": "Quiz",
            "endings": choices,
            "label": answer,
        }
        for question, choices, answer in QUESTIONS
    ]
    grande = [
        {"sentence": "The _ is not a plum.", "option1": "owl", "option2": "pea", "answer": "1"}
    ]
    truth = [
        {
            "question": question,
            "mc1_targets": {"choices": choices, "labels": [1, 0, 0, 0]},
            "mc2_targets": {"choices": choices, "labels": [1, 1, 0, 0]},
        }
        for question, choices, _ in QUESTIONS
    ]
    gsm = [{"question": "One and one?", "answer": "It is 2.\n#### 2"}]
    mmlu = [
        {"question": question, "subject": "made up", "choices": choices, "answer": answer}
        for question, choices, answer in QUESTIONS
    ]

    def task(
        name: str, splits: dict[str, list], include: str | None = None, **more: object
    ) -> None:
        files = {}
        for split, rows in splits.items():
            files[split] = str(folder / f"{name}-{split}.jsonl")
            Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = {
            "include": str(SHIPPED / (include or FILES[name])),
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config | more))

    # One row many times: the examples in a prompt are the same, whichever are drawn.
    task(
        "arc_challenge",
        {"train": arc[:1] * 25, "validation": arc[:1], "test": arc},
    )
    task("hellaswag", {"train": swag[:1] * 10, "validation": swag})
    task("winogrande", {"train": grande * 5, "validation": grande})
    task("truthfulqa_mc2", {"validation": truth})
    task(
        "gsm8k",
        {"train": gsm * 5, "test": gsm},
        generation_kwargs={"until": ["Question:"], "do_sample": False, "max_gen_toks": 8},
    )
    subject = "mmlu/default/_default_template_yaml"
    task("mmlu_anatomy", {"dev": mmlu[:1] * 5, "test": mmlu[:4]}, subject)
    task("mmlu_astronomy", {"dev": mmlu[:1] * 5, "test": mmlu[4:]}, subject)
    shipped = shipped_config("mmlu")
    (folder / "mmlu.yaml").write_text(
        yaml.safe_dump(shipped | {"task": ["mmlu_anatomy", "mmlu_astronomy"]})
    )


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict[str, list[dict]]]:
    """Results and samples of ``lm-eval run --config``: our run file and our group as they stand, but
    for the model, the CPU and where the data of the tasks lies."""
    folder = tmp_path_factory.mktemp("lm_eval")
    tasks = folder / "tasks"
    tasks.mkdir()
    write_tasks(tasks)
    config = yaml.safe_load(RUN_FILES[0].read_text()) | {
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
