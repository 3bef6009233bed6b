"""The commands of examples/eval/README.md, as far as their own parsers can be asked."""

from __future__ import annotations

import inspect
import re
import shlex
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from alpaca_eval import main as alpaca_main
from alpaca_eval.annotators import PairwiseAnnotator
from alpaca_eval.constants import EVALUATORS_CONFIG_DIR
from chat_formats import llama3_tokenizer, mistral_tokenizer
from harness import EXAMPLES
from lm_eval._cli.harness import HarnessCLI

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
    """A file in a new place would be looked at by nobody."""
    files = {p.relative_to(FOLDER).parts[0] for p in FOLDER.rglob("*") if p.is_file()}
    assert files == {"README.md", "alpaca_eval", "arena_hard", "lm_eval"}


def test_no_key_in_a_file():
    for path in FOLDER.rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert not re.search(r"\bsk-\w|hf_\w{10}", text), path
            assert set(re.findall(r"API_KEY=(\S*)", text)) <= {"..."}, path


def test_alpaca_eval_commands():
    """Function, options and judge exist: what a function doesn't know goes on to `evaluate`, and from
    there to the annotator."""
    known = set(inspect.signature(alpaca_main.evaluate).parameters)
    for base in PairwiseAnnotator.__mro__:
        known |= set(inspect.signature(base.__init__).parameters)
    for _, function, *options in starting_with("alpaca_eval"):
        given = dict(zip(options[::2], options[1::2], strict=True))
        own = inspect.signature(alpaca_main.ALL_FUNCTIONS[function]).parameters
        assert {option.removeprefix("--") for option in given} <= known | set(own)
        judge = given["--annotators_config"]
        assert judge == "weighted_alpaca_eval_gpt4_turbo"
        assert (EVALUATORS_CONFIG_DIR / judge / "configs.yaml").is_file()
        if "--model_configs" in given:
            assert (FOLDER / "alpaca_eval" / given["--model_configs"]).exists()


def test_lm_eval_command(monkeypatch: pytest.MonkeyPatch):
    """lm-eval's parser takes it, and the file is there."""
    for _, *arguments in starting_with("lm-eval"):
        monkeypatch.setattr(sys, "argv", ["lm-eval", *arguments])
        assert (EXAMPLES.parent / HarnessCLI().parse_args().config).is_file()


def test_versions():
    """What the page installs is what these tests ran with."""
    wanted = set(re.findall(r"(alpaca-eval|lm-eval)(?:\[hf\])?==([\d.]+)", PAGE))
    assert wanted == {(name, version(name)) for name in ("alpaca-eval", "lm-eval")}
    for name, below in set(re.findall(r'"(setuptools|datasets)<(\d+)"', PAGE)):
        assert int(version(name).split(".")[0]) < int(below)


def test_copied_files_exist():
    paths = re.findall(r"examples/[\w./-]+\w", " ".join(COMMANDS))
    assert len(paths) > 5
    for path in paths:
        assert (EXAMPLES.parent / path).exists(), path


@pytest.mark.parametrize(
    "model, make, count",
    [
        ("llama3_focalpo", llama3_tokenizer, 1),
        ("mistral_focalpo", mistral_tokenizer, 1),
        ("llama3_focalpo", llama3_tokenizer, 0),
    ],
)
def test_bos_check(
    model: str,
    make: Callable,
    count: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """It prints 1 for a tokenizer that adds a BOS, and 0 for one that doesn't."""
    (command,) = [words for words in starting_with("python") if words[1] == "-c"]
    tokenizer = make()
    if not count:
        tokenizer.backend_tokenizer.post_processor = None
    tokenizer.save_pretrained(tmp_path)
    prompt = FOLDER / "alpaca_eval" / model / "prompt.txt"
    monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path), str(prompt)])
    exec(command[2], {})  # here, where transformers is loaded already
    assert capsys.readouterr().out == f"{count}\n"
