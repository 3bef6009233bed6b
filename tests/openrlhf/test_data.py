"""What OpenRLHF's data looks like, and what is said where OpenRLHF can't read it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import ManyFocalpo
from openrlhf_flags import of_host
from row_formats import APPLY, FORMATS, KEY

# One worker makes what several tests look at, once.
shares_answers = pytest.mark.xdist_group("data")

OURS = ["--loss", "focalpo"]
GOOD = {name: flags for name, (_, _, flags) in FORMATS.items() if flags is not None}
FAILS = [
    ("strings", [APPLY]),
    ("prompt and answers as message lists", [APPLY]),
    ("prompt and answers as message lists", [KEY, "prompt"]),
    ("whole conversations", []),
    ("a prompt beside whole conversations", [APPLY, KEY, "prompt"]),
    ("messages, and one message an answer", [APPLY, KEY, "messages"]),
    ("two texts without a prompt", [APPLY]),
]
Answer = tuple[int, str, str]


def written(folder: Path, name: str) -> Path:
    row = json.dumps(FORMATS[name][0])
    path = folder / f"{name.replace(',', '')}.jsonl"  # OpenRLHF takes a comma for two files
    path.write_text("".join(row.replace("one word", f"word {i}") + "\n" for i in range(4)))
    return path


@pytest.fixture(scope="module")
def answers(
    tiny: Path, focalpo: ManyFocalpo, tmp_path_factory: pytest.TempPathFactory
) -> dict[Any, Answer]:
    folder = tmp_path_factory.mktemp("data")

    def argv(data: Path, flags: list[str], *before: str, model: str = "") -> list[str]:
        of_run = ["--model.model_name_or_path", model or str(tiny / "model"), *OURS]
        of_run += [
            "--data.dataset",
            str(data),
            "--train.batch_size",
            "4",
            "--train.micro_batch_size",
            "2",
        ]
        return ["check", *before, "--", *of_host([*of_run, "--data.max_len", "128", *flags])]

    words: dict[Any, list[str]] = {
        name: argv(written(folder, name), flags, "--json") for name, flags in GOOD.items()
    }
    for number, (name, flags) in enumerate(FAILS):
        words[name, number] = argv(written(folder, name), flags)
    odd = folder / "odd.jsonl"
    odd.write_text('{"chosen": "a b", "rejected": "a c"}\n{"chosen": "a", "rejected": null}\n')
    words["odd"] = argv(odd, [])
    hub = written(folder, "strings")
    words["hub"] = argv(hub, [], model="mistralai/Mistral-7B-v0.1")
    shape = ("--json", "--model-config", "mistral-7b")
    words["shape"] = argv(hub, [], *shape, model="mistralai/Mistral-7B-v0.1")
    return {name: focalpo(*argv) for name, argv in words.items()}


def error_of(answer: Answer) -> str:
    code, output, errors = answer
    assert (code, output) == (2, ""), errors[-3000:]
    return errors.splitlines()[-1]


def advice(name: str) -> str:
    """The flags that docs/data.md has for this format, as a sentence."""
    flags = GOOD.get(name)
    if flags is None:
        return " ".join(of_host([f"put each answer into a list, and give {APPLY} {KEY} messages"]))
    without = " and ".join(of_host([flag for flag in (APPLY, KEY) if flag not in flags]))
    if not flags:
        return f"leave out {without}"
    return " ".join(of_host([f"give {' '.join(flags)}"])) + (
        f" without {without}" if without else ""
    )


@shares_answers
@pytest.mark.parametrize("name", GOOD)
def test_each_format_is_named_with_what_reads_it(answers: dict, name: str):
    code, output, errors = answers[name]
    assert code == 0, errors[-3000:]
    found = json.loads(output)
    assert f": {name}, {advice(name)}" in found["formats"][0]
    assert found["rows"] == 4
    warned = [w for w in found["warnings"] if w.startswith("none of the sequences begins as")]
    assert len(warned) == (APPLY not in GOOD[name])


@shares_answers
@pytest.mark.parametrize(("name", "number"), [(name, i) for i, (name, _) in enumerate(FAILS)])
def test_flags_that_fail(answers: dict, name: str, number: int):
    """The host's error, then the file, its first row, the flags in use and those that fit."""
    said = error_of(answers[name, number])
    start = " ".join(of_host(["--data.dataset"]))
    assert f". {start} " in said and f"{name.replace(',', '')}.jsonl': its first row has " in said
    neither = " ".join(of_host([f"neither {APPLY} nor {KEY}"]))
    in_use = " ".join(of_host(FAILS[number][1])) or neither
    assert f", and the flags are {in_use}: these are {name}: {advice(name)}" in said


@shares_answers
def test_a_row_that_differs(answers: dict):
    said = error_of(answers["odd"])
    assert said.endswith("which fit; row 1 has chosen (text), rejected (nothing). Fix that row, or "
                         "remove it.")  # fmt: skip


@shares_answers
def test_what_comes_from_a_hub(answers: dict):
    said = error_of(answers["hub"])
    (flag,) = of_host(["--model.model_name_or_path"])
    assert f"{flag} 'mistralai/Mistral-7B-v0.1'" in said
    assert "Llama 3" not in said and "`focalpo check --model-config`" in said


@shares_answers
def test_the_memory_without_the_model(answers: dict):
    code, output, errors = answers["shape"]
    assert code == 0, errors[-3000:]
    found = json.loads(output)
    assert found["memory_bytes"]["parameters"] == 7_241_732_096
    assert (found["batch"], found["max_length"]) == (4, 128)


@pytest.mark.parametrize("case", ["data", "refusal"])
def test_the_last_line_of_a_launched_run(train: Callable, tmp_path: Path, case: str):
    """Behind the launcher's own."""
    flags, said = ["--focalpo.gamma", "5"], "focalpo_plugins: --focalpo.gamma must be below 1/ln 2"
    if case == "data":
        path = written(tmp_path, "strings")
        flags = ["--data.dataset", str(path), "--train.batch_size", "4"]
        start = " ".join(of_host(["--data.dataset"]))
        said = f"focalpo_plugins: {start} {str(path)!r}: its first row has prompt (text), "
    run = train(*OURS, *flags, launcher="deepspeed")
    assert run.returncode != 0
    assert run.stderr.splitlines()[-1].startswith(said), run.output
