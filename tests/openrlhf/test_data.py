"""Data formats in OpenRLHF, and the messages for data that OpenRLHF can't read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
from datasets import Dataset, DatasetDict
from harness import ManyFocalpo
from openrlhf_flags import of_host
from row_formats import APPLY, FORMATS, KEY

# One worker makes the runs that several tests share.
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
    odd.write_text('{"chosen": "a b", "rejected": "a c"}\n{"chosen": "a", "rejected": ["b"]}\n')
    words["odd"] = argv(odd, [])
    hub = written(folder, "strings")
    words["hub"] = argv(hub, [], model="mistralai/Mistral-7B-v0.1")
    shape = ("--json", "--model-config", "mistral-7b")
    words["shape"] = argv(hub, [], *shape, model="mistralai/Mistral-7B-v0.1")
    beside = folder / "beside.jsonl"
    beside.write_text("\n".join([json.dumps(FORMATS["strings"][0]), '{"prompt": "a"']))
    words["second file"] = argv(Path(f"{hub}, {beside}"), [KEY, "prompt"])
    broken = folder / "broken.csv"
    broken.write_text('prompt,chosen,rejected\na,b,c\n"a,b\n')
    words["broken"] = argv(Path(f"{hub}, {broken}"), [KEY, "prompt"])
    for number, (suffix, column) in enumerate(EMPTY):
        path = with_an_empty_cell(folder / f"empty{number}{suffix}", column)
        words["empty", suffix, column] = argv(path, [KEY, "prompt"])
    held_out = ["--eval.dataset", str(folder / "empty0.csv")]
    words["empty, held out"] = argv(hub, [KEY, "prompt", *held_out, "--eval.split", "train"])
    words["held out"] = argv(hub, [KEY, "prompt", "--eval.dataset", str(hub)])
    saved = ["--eval.dataset", str(folder / "saved")]
    DatasetDict(dev=Dataset.from_list([FORMATS["strings"][0]] * 3)).save_to_disk(folder / "saved")
    words["saved"] = argv(hub, [KEY, "prompt", *saved])
    bad = folder / "bad.jsonl"
    bad.write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\n' * 3)
    held_out = ["--eval.dataset", f"{bad}, {hub}", "--eval.split", "train"]
    words["evaluated"] = argv(hub, [KEY, "prompt", *held_out], "--json")
    words["alike"] = argv(bad, [KEY, "prompt"])
    differ = folder / "differ.jsonl"
    differ.write_text((json.dumps(after_other_turns()) + "\n") * 4)
    words["differ"] = argv(differ, [APPLY])
    words["differ, allowed"] = argv(differ, [APPLY, "--focalpo.allow_data"], "--json")
    not_ours = (word for word in words["differ, allowed"] if word not in OURS)
    words["differ, dpo"] = [word for word in not_ours if "allow_data" not in word]
    answers = {name: focalpo(*argv) for name, argv in words.items()}
    dpo = [word for word in words["held out"] if word not in OURS]
    return answers | {"held out, dpo": focalpo(*dpo)}


def after_other_turns() -> dict[str, Any]:
    """Two turns before the last question, the second of which is longer on the chosen side."""
    said = {"chosen": "A long answer that is good.", "rejected": "A long answer that is bad."}
    return {
        side: [turns[0], {"role": "assistant", "content": said[side]}, *turns]
        for side, turns in FORMATS["whole conversations"][0].items()
    }


# Files in which a row lacks an answer or the prompt.
EMPTY = [
    (suffix, column)
    for suffix in (".csv", ".parquet", ".jsonl")
    for column in ("chosen", "rejected", "prompt")
]


def with_an_empty_cell(path: Path, column: str) -> Path:
    """Five rows; the fourth, row 3 counted from 0, has none in the column."""
    rows = [{"prompt": f"Say {i}.", "chosen": f"{i}, good", "rejected": "bad"} for i in range(5)]
    rows[3][column] = None
    data = Dataset.from_list(rows)
    write = {".csv": data.to_csv, ".parquet": data.to_parquet, ".jsonl": data.to_json}
    write[path.suffix](str(path))
    return path


def error_of(answer: Answer) -> str:
    code, output, errors = answer
    assert (code, output) == (2, ""), errors[-3000:]
    return errors.splitlines()[-1]


def advice(name: str) -> str:
    """The flags for this format, as docs/data.md lists them, as a sentence."""
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
    assert f": {name}; to read them, {advice(name)}" in found["formats"][0]
    assert found["rows"] == 4
    warned = [w for w in found["warnings"] if w.startswith("none of the sequences begins as")]
    assert len(warned) == (APPLY not in GOOD[name])


@shares_answers
@pytest.mark.parametrize(("name", "number"), [(name, i) for i, (name, _) in enumerate(FAILS)])
def test_flags_that_fail(answers: dict, name: str, number: int):
    """The host's error, then the file, its first row, the current flags and the fitting ones."""
    said = error_of(answers[name, number])
    start = " ".join(of_host(["--data.dataset"]))
    assert f". {start} " in said and f"{name.replace(',', '')}.jsonl': its first row has " in said
    neither = " ".join(of_host([f"neither {APPLY} nor {KEY}"]))
    in_use = " ".join(of_host(FAILS[number][1])) or neither
    assert f", and the flags are {in_use}: these are {name}: {advice(name)}" in said


@shares_answers
def test_a_row_that_differs(answers: dict):
    said = error_of(answers["odd"])
    assert said.endswith(
        "which fits, but row 1 has chosen (text), rejected (list). Fix or remove that row."
    )


def empty(flag: str, path: Path | str, column: str) -> str:
    (flag,) = of_host([flag])
    return (
        f"{flag} must have prompt and answers in every row, got row 3 (the first is 0) of "
        f"{str(path)!r} with an empty cell in the column {column!r}. Fill it, or remove the row."
    )


@shares_answers
@pytest.mark.parametrize(("number", "suffix", "column"), [(i, *of) for i, of in enumerate(EMPTY)])
def test_an_empty_cell(answers: dict, number: int, suffix: str, column: str):
    said = error_of(answers["empty", suffix, column])
    start, _, rest = said.partition(f"/empty{number}{suffix}'")
    path = f"{start.rpartition(chr(39))[2]}/empty{number}{suffix}"
    assert empty("--data.dataset", path, column) in said
    assert rest.endswith("are read as an empty cell.") == (suffix == ".csv")


@shares_answers
def test_an_empty_cell_of_the_evaluation_data(answers: dict):
    said = error_of(answers["empty, held out"])
    assert " ".join(of_host(["--eval.dataset"])) + " must have prompt and answers" in said
    assert "got row 3 (the first is 0) of '" in said
    assert "empty0.csv' with an empty cell in the column" in said


@shares_answers
def test_the_second_of_two_files(answers: dict):
    """OpenRLHF ignores the space after the comma."""
    said = error_of(answers["second file"])
    assert "beside.jsonl': line 2 can't be used: Expecting ',' delimiter. Fix" in said


@shares_answers
def test_a_broken_csv_beside_another_file(answers: dict):
    """Both exist here, so nothing is looked up on a hub."""
    said = error_of(answers["broken"])
    assert "/broken.csv' can't be read, in the row that begins in line 3: " in said
    assert "EOF inside string" in said and said.endswith("Fix that file.")
    assert "hub" not in said


@shares_answers
@pytest.mark.parametrize(
    ("case", "data", "splits"),
    [
        ("held out", "strings.jsonl", "a file has only train. Give {} train."),
        ("held out, dpo", "strings.jsonl", "a file has only train. Give {} train."),
        ("saved", "saved", "this folder has only dev. Give {} dev."),
    ],
)
def test_a_split_that_is_not_there(answers: dict, case: str, data: str, splits: str):
    """OpenRLHF's default is test, and its own error is about an attribute; with a loss of this
    package, a local file is refused first."""
    said = error_of(answers[case])
    dataset, split = of_host(["--eval.dataset", "--eval.split"])
    assert f"{split} must be a split of {dataset} '" in said
    assert said.endswith(f"/{data}', got 'test': " + splits.format(split))
    assert ("has no attribute 'select'" in said) == (case != "held out")


@shares_answers
def test_the_evaluation_data_is_looked_at(answers: dict):
    """Three pairs with equal answers and four good ones, in two files."""
    code, output, errors = answers["evaluated"]
    assert code == 0, errors[-3000:]
    found = json.loads(output)
    (flag,) = of_host(["--eval.dataset"])
    assert f"7 of 7 pairs of {flag} are evaluated" in found["notes"]
    same = "3 of 7 pairs of the evaluation data have identical answers"
    assert any(warning.startswith(same) for warning in found["warnings"])
    assert len(found["formats"]) == 3


@shares_answers
def test_what_a_run_refuses_is_refused(answers: dict):
    """The flag allows it, with a warning; OpenRLHF's own loss refuses nothing."""
    said = error_of(answers["differ"])
    fault = "4 of 4 rows have sides whose earlier turns differ: OpenRLHF cuts both off"
    assert f"training data refused: {fault}" in said
    assert "To train anyway, set --focalpo.allow_data. The first is row 0 of " in said
    alike = "training data refused: 3 of 3 pairs have identical answers"
    assert alike in error_of(answers["alike"])
    for case in ("differ, allowed", "differ, dpo"):
        code, output, errors = answers[case]
        assert code == 0, errors[-3000:]
        assert any(warning.startswith(fault) for warning in json.loads(output)["warnings"])


def test_an_empty_cell_ends_a_run(tiny: Path, tmp_path: Path):
    """On two ranks, before training: a missing answer, which OpenRLHF notices when it joins prompt
    and answer, and a missing prompt, which an input template would turn into the word None."""
    cases = {"chosen": [], "prompt": ["--data.input_template", "Q: {}"]}
    for column, flags in cases.items():
        path = with_an_empty_cell(tmp_path / f"{column}.csv", column)
        flags += [*OURS, "--model.model_name_or_path", str(tiny / "model"), KEY, "prompt"]
        flags += ["--data.dataset", str(path), "--ds.attn_implementation", "eager"]
        flags += ["--train.batch_size", "4", "--train.micro_batch_size", "2"]
        command = "focalpo_plugins.openrlhf.train_dpo:main"
        code, _, errors = forked.run(command, of_host(flags), tmp_path, 2)
        assert code == 1
        assert errors.count(f"focalpo_plugins: {empty('--data.dataset', path, column)}") == 1
        assert "Traceback" not in errors and "Train step" not in errors


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
    """After the launcher's own lines: a raised error, and an error of the flags' parser."""
    flags, said = ["--focalpo.gamma", "5"], "focalpo_plugins: --focalpo.gamma must be below 1/ln 2"
    if case == "data":
        path = written(tmp_path, "strings")
        flags = ["--data.dataset", str(path), "--train.batch_size", "4"]
        start = " ".join(of_host(["--data.dataset"]))
        said = f"focalpo_plugins: {start} {str(path)!r}: its first row has prompt (text), "
    run = train(*OURS, *flags, launcher="deepspeed")
    assert run.returncode != 0
    assert run.stderr.splitlines()[-1].startswith(said), run.output
