"""The commands of examples/eval/README.md, as far as their own parsers can check them."""

from __future__ import annotations

import inspect
import re
import shlex
import sys
from importlib.metadata import version
from types import ModuleType

import pytest
from harness import EXAMPLES

FOLDER = EXAMPLES / "eval"
PAGE = (FOLDER / "README.md").read_text()
COMMANDS = [
    line[4:] for line in PAGE.splitlines() if line.startswith("    ") and line.strip() == line[4:]
]


def starting_with(word: str) -> list[list[str]]:
    found = [shlex.split(line) for line in COMMANDS if line.split()[0] == word]
    assert found
    return found


def test_every_file_has_a_test():
    """Nobody would look at a file in a new place."""
    files = {p.relative_to(FOLDER).as_posix() for p in FOLDER.rglob("*") if p.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    assert files == {"README.md", "models.yml", "pipeline.py", "tasks/table2.yaml"}


def test_no_key_in_a_file():
    for path in FOLDER.rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            text = path.read_text()
            assert not re.search(r"\bsk-\w|hf_\w{10}", text), path
            assert set(re.findall(r"API_KEY=(\S*)", text)) <= {"..."}, path


def test_pipeline_commands(pipeline: ModuleType, plan, monkeypatch: pytest.MonkeyPatch):
    """The parser takes each, the models and benchmarks exist, and each command is in the table."""
    called = []
    for name in ("configs", "generate", "judge", "table", "answers"):
        monkeypatch.setattr(pipeline, name, lambda plan, args: called.append(args))
        assert f"| `{name}` |" in PAGE
    given = [words for words in starting_with("python") if words[1] == "examples/eval/pipeline.py"]
    for _, _, *arguments in given:
        monkeypatch.setattr(sys, "argv", ["pipeline.py", *arguments])
        pipeline.main()
    assert len(called) == len(given) >= 8
    names = {model.name for model in plan.models}
    for args in called:
        assert set(args.models or []) <= names
        assert set(args.benchmarks) <= set(pipeline.BENCHMARKS)
    (asked,) = {args.question for args in called if args.question}
    assert asked in pipeline.QUESTION
    for option in set(re.findall(r"`(--[\w-]+)", PAGE)) - {"--judge", "--decoding"}:
        assert any(f'"{option}"' in line for line in inspect.getsource(pipeline.main).splitlines())


def test_decodings(plan):
    """The page's table has the values of models.yml."""
    rows = {line.split("`")[1]: line for line in PAGE.splitlines() if line.startswith("| `")}
    for name, of in plan.file["decodings"].items():
        for sampling in of.values():
            for value in (sampling["temperature"], sampling["max_tokens"]):
                assert re.search(rf"\b{value:g}\b", rows[name]), (name, value)
    assert re.search(r"top_p 0\.7\b", rows["lion"])


def test_arithmetic():
    """Each product on the page, to the digits that it is given with."""
    found = re.findall(r"(\d[\d.]*) x (\d[\d.]*) = (\d[\d.]*\d|\d)( thousand)?", PAGE)
    assert len(found) >= 10
    for first, second, result, thousand in found:
        made = float(first) * float(second) / (1000 if thousand else 1)
        digits = len(result.partition(".")[2])
        assert abs(made - float(result)) <= 0.5001 * 10**-digits, (first, second, result)


def test_times():
    """From what the page assumes: tokens times two FLOP a parameter, over GPUs at 100 TFLOP/s."""
    read = 60e6 * 2 * 8e9 / 1e14 / 3600
    wrote = 1319 * 150 / 40 / 3600
    assert f"{read:.1f} + {wrote:.1f} = {read + wrote:.0f} hours" in PAGE
    judge = 2 * 72.7e9 / 4e14 / 60  # minutes a token
    assert f"| {1108e3 * judge:.0f} minutes |" in PAGE
    arena = 1800e3 * judge, 500e3 / 1000 / 60
    assert f"| {arena[0]:.0f} + {arena[1]:.0f} = {sum(arena):.0f} minutes |" in PAGE
    assert f"{312 * 4 / 60:.0f} GPU-hours" in " ".join(PAGE.split())


def test_the_judge_that_is_gone(plan):
    """Its name and end date, as in models.yml."""
    judge = plan.file["judges"]["paper"]
    (date,) = re.findall(r"\d{4}-\d\d-\d\d", judge["note"])
    assert date in PAGE and f"`{judge['model']}`" in PAGE
    assert date in (EXAMPLES.parent / "docs" / "reproduction.md").read_text()


def test_versions():
    """What the page installs is what these tests ran with."""
    wanted = set(re.findall(r"(alpaca-eval|lm-eval)(?:\[hf\])?==([\d.]+)", PAGE))
    assert wanted == {(name, version(name)) for name in ("alpaca-eval", "lm-eval")}
    for name, below in set(re.findall(r'"(setuptools|datasets)<(\d+)"', PAGE)):
        assert int(version(name).split(".")[0]) < int(below)


def test_files_exist():
    paths = re.findall(r"examples/[\w./-]+\w", " ".join(COMMANDS))
    paths += [f"examples/eval/{path}" for path in re.findall(r"\]\(([\w./]+)\)", PAGE)]
    assert len(paths) > 10
    for path in paths:
        assert (EXAMPLES.parent / path).exists(), path
