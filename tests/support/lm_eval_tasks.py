"""The leaderboard's tasks as lm-eval ships them, over a few made-up rows."""

from __future__ import annotations

import json
from pathlib import Path

import lm_eval.tasks
import yaml

SHIPPED = Path(lm_eval.tasks.__file__).parent
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


def shipped_config(name: str) -> dict:
    """What the installed lm-eval has under a name, with what it includes."""

    class Loader(yaml.SafeLoader):
        """Leaves functions unchanged."""

    Loader.add_constructor("!function", lambda loader, node: node.value)

    def load(path: Path) -> dict:
        config = yaml.load(path.read_text(), Loader)
        include = config.pop("include", None)
        return {**(load(path.parent / include) if include else {}), **config}

    config = load(SHIPPED / FILES[name])
    assert config.get("group", config["task"]) == name
    return config


def write_tasks(folder: Path) -> None:
    """The six tasks as lm-eval ships them, but over a few made-up rows and with two subjects."""
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
