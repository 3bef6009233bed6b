"""Every command that a reader is told to type, and which test runs it.

They are collected from the pages, the headers of the examples and the help texts.  ``RULES`` has a
test for each: ``tests/HOST/test_commands.py``, which runs or parses them as written, another test
that does, or a reason why there is none.  A command without a rule fails in tests/test_commands.py.
"""

from __future__ import annotations

import argparse
import ast
import re
import runpy
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import forked
import pytest
from harness import EXAMPLES

ROOT = EXAMPLES.parent
PAGES = sorted([*ROOT.glob("*.md"), *EXAMPLES.rglob("*.md"), *(ROOT / "docs").glob("*.md")])
# What a line begins with that is a command, unless its block says so.
PROGRAMS = {
    "accelerate", "axolotl", "bash", "deepspeed", "export", "find", "focalpo", "git", "hf", "huggingface-cli",
    "llamafactory-cli", "lm_eval", "megatron", "mkdocs", "mypy", "nox", "pip", "pre-commit", "pytest",
    "python", "python3", "ray", "rm", "ruff", "source", "swift", "torchrun", "trl", "twine", "uv",
    "vllm", ".", ".nox/runner/bin/nox", ".nox/runner/bin/pip",
}  # fmt: skip
REST = "..."  # stands for the reader's other flags


@dataclass(frozen=True)
class Command:
    """One program with its arguments, as the page has it; a line with ``&&`` has several."""

    page: str
    text: str

    @property
    def variables(self) -> dict[str, str]:
        """Those that are set in front of it."""
        return dict(word.split("=", 1) for word in self._words[: self._start])

    @property
    def words(self) -> list[str]:
        return self._words[self._start :]

    @property
    def _words(self) -> list[str]:
        return shlex.split(self.text, comments=True)

    @property
    def _start(self) -> int:
        is_variable = [re.match(r"[A-Z_]+=", word) is not None for word in self._words]
        return [*is_variable, False].index(False)

    def filled(self, *flags: str) -> list[str]:
        """The words with the reader's other flags in the place of ``...``."""
        at = self.words.index(REST) if REST in self.words else len(self.words)
        return [*self.words[:at], *flags, *self.words[at + 1 :]]


@dataclass(frozen=True)
class Rule:
    """What holds the commands whose ``page: text`` matches."""

    pattern: str
    host: str = ""  # the folder of the test_commands.py that runs or parses them
    test: str = ""  # path::function of another test
    by: str = ""  # what stands in that test's file: how it gets the command
    reason: str = ""  # why no test does

    def holds(self, command: Command) -> bool:
        return re.search(self.pattern, f"{command.page}: {command.text}") is not None


RULES = (
    # Machines and services.
    Rule(r"\bpip install |: python3 -m venv |: \. venv", reason="installs"),
    Rule(r": pip (uninstall|show) |: rm -r ", reason="changes or lists an environment"),
    Rule(r": find .* lock", reason="what a killed build of DeepSpeed leaves"),
    Rule(r": git |: twine |: pre-commit install", reason="a repository, or an upload"),
    Rule(r": hf auth login", reason="a hub"),
    Rule(r": ray start ", reason="a cluster; tests/axolotl/test_multinode.py starts Ray itself"),
    Rule(r": export HF_DATASETS_TRUST_REMOTE_CODE=1", reason="a variable of datasets"),
    # Before every test that needs its files.
    Rule(r": python examples/make_tiny\.py", test="tests/conftest.py::tiny", by="make_tiny.py"),
    # Each in its host's own folder.
    Rule(r": python examples/llamafactory/|llamafactory-cli.*(run|tiny_focalpo)\.yaml", host="llamafactory"),
    Rule(r": swift rlhf (--|run\.yaml)|swift/tiny_focalpo\.yaml|focalpo check -- swift", host="swift"),
    Rule(r": (deepspeed|torchrun) |bash examples/openrlhf/", host="openrlhf"),
    Rule(r": focalpo check .*-- --loss|: focalpo report DPO=", host="openrlhf"),
    Rule(r"docs/llamafactory\.md: focalpo ", host="llamafactory"),
    Rule(r"docs/swift\.md: focalpo ", host="swift"),
    Rule(r": focalpo (check|report|score) |: axolotl |: \w+=1 HF_HUB_OFFLINE=1 axolotl ", host="axolotl"),
    Rule(r": python examples/(study/(study|quality_lm)|make_kto_data)\.py", host="axolotl"),
    Rule(r": focalpo |: python (-m focalpo_plugins|benchmarks/(run|picture)\.py)", host="core"),
    Rule(r": python examples/study/quality\.py", host="core"),
    # What other tests run, or look up.
    Rule(r": from focalpo_plugins import (FocalPO|check)", test="tests/trl/test_readme.py::test_the_snippet", by="import FocalPOConfig, FocalPOTrainer"),
    Rule(r": from swift import RLHFArguments", test="tests/swift/test_commands.py::test_the_snippet", by="from swift import"),
    Rule(r"docs/data\.md: def ", test="tests/test_commands.py::test_rows_are_converted_as_the_page_says", by='"as_messages"'),
    Rule(r"docs/another-loss\.md: import ", test="tests/test_readme.py::test_another_loss", by="my_losses.py"),
    Rule(r"\bnox\b", test="tests/test_readme.py::test_sessions", by="nox -s "),
    Rule(r": python benchmarks/gpu\.py", test="tests/trl/test_gpu_kit.py::test_trls_ways_on_a_small_model", by="gpu.py"),
    Rule(r": pytest test_my_losses\.py", test="tests/test_readme.py::test_another_loss", by="test_my_losses.py"),
    Rule(r"python examples/trl_focalpo\.py", test="tests/trl/test_examples.py::test_trl_focalpo_trains_on_a_cpu", by="trl_focalpo.py"),
    Rule(r": python examples/eval/pipeline\.py", test="tests/eval/test_pages.py::test_pipeline_commands", by="pipeline.py"),
    Rule(r"llamafactory-cli train examples", test="tests/llamafactory/test_recipes.py::test_it_trains", by="llamafactory-cli train {"),
    Rule(r"swift rlhf examples", test="tests/swift/test_recipes.py::test_it_trains", by="swift rlhf {"),
)  # fmt: skip


class Reader:
    """A reader's folder, in which commands run as a page has them; each once."""

    def __init__(self, folder: Path, few: Path | None = None, **variables: str) -> None:
        """With the repository's files, and of the tiny data only the ``few``."""
        self.folder, self.variables = folder, variables
        self.outputs: dict[tuple[str, ...], str] = {}
        tiny = folder / "examples" / "tiny"
        tiny.mkdir(parents=True)
        (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
        for path in [*EXAMPLES.iterdir(), *(EXAMPLES / "tiny").glob("*")]:
            if path.suffix != ".jsonl" and path.name != "tiny":
                (folder / path.relative_to(ROOT)).symlink_to(path)
        for path in few.iterdir() if few else ():
            shutil.copy(path, tiny)

    def run(self, function: str, argv: Sequence[str], **variables: str) -> str:
        """What it printed; it has to end well, and so has the next command that it names."""
        key = (function, *argv)
        if key not in self.outputs:
            given = {**self.variables, **variables}
            code, output, _ = forked.run(function, argv, self.folder, merged=True, **given)
            assert code == 0, f"{shlex.join(argv)}\n{output[-4000:]}"
            self.outputs[key] = output
            self.follow(output)
        return self.outputs[key]

    def follow(self, output: str) -> None:
        """Runs the next command that the last line of a run names."""
        found = re.findall(r"focalpo_plugins: done\. [^\r\n]*", output)
        assert len(found) == output.count("focalpo_plugins: active. "), output[-4000:]
        for done in found:
            following = done.partition("; next: ")[2]
            assert following.startswith("focalpo "), done
            self.focalpo(shlex.split(following))

    def focalpo(self, words: Sequence[str]) -> str:
        # It writes there, and goes on with no other run's.
        shutil.rmtree(self.folder / "scores", ignore_errors=True)
        return self.run("focalpo_plugins.cli:main", words[1:])

    def parse(self, words: Sequence[str]) -> None:
        """A script's command line, by its own parser."""
        assert words[0] == "python"
        assert self.run("page_commands:parse_script", words[1:]).endswith("parsed\n")


def rule_of(command: Command) -> Rule | None:
    return next((rule for rule in RULES if rule.holds(command)), None)


def commands_of(host: str) -> list[Command]:
    """Those that the host's test_commands.py has to run or parse, each once."""
    found = {}
    for command in every_command():
        rule = rule_of(command)
        if rule and rule.host == host:
            found.setdefault(command.text, command)
    return list(found.values())


def each(host: str) -> pytest.MarkDecorator:
    """A test for each of them."""
    found = commands_of(host)
    return pytest.mark.parametrize("command", found, ids=[command.text for command in found])


def every_command() -> Iterator[Command]:
    for page, lines, blocks in _lines():
        for line in [*lines, *blocks]:
            for text in line.split(" && "):
                command = Command(page, re.sub(r"\s+#.*", "", " ".join(text.split())))
                try:
                    words = command.words
                except ValueError:  # the apostrophe of a sentence
                    continue
                if words and (words[0] in PROGRAMS or line in blocks):
                    yield command


def every_snippet() -> Iterator[Command]:
    """The pages' Python."""
    for path in PAGES:
        text = path.read_text()
        blocks = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
        blocks += re.findall(r"\n\n((?:    .*\n|\n)+)", text)
        for block in blocks:
            if re.match(r" *(from|import|def) ", block):
                yield Command(_name(path), textwrap.dedent(block).strip())


def _lines() -> Iterator[tuple[str, list[str], list[str]]]:
    """A file, its lines that may be commands, and those that are: of a block for a shell."""
    for path in PAGES:
        yield _name(path), *_of_page(path.read_text())
    scripts = [path for end in ("yml", "yaml", "sh", "py") for path in EXAMPLES.rglob(f"*.{end}")]
    for path in sorted([*scripts, *(ROOT / "benchmarks").glob("*.py")]):
        yield _name(path), _of_header(path), []
    from focalpo_plugins.cli.arguments import parser_of

    (commands,) = (
        action
        for action in parser_of("focalpo")._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    for name, parser in commands.choices.items():
        yield f"focalpo {name} --help", [line.strip() for line in parser.epilog.splitlines()], []


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _of_page(page: str) -> tuple[list[str], list[str]]:
    """Indented code and inline code that is more than a name; and fenced blocks for a shell."""
    page = _joined(page)
    blocks = re.findall(r"^```(?:sh|bash)\n(.*?)^```$", page, re.M | re.S)
    page = re.sub(r"^```.*?^```$", "", page, flags=re.M | re.S)
    inline = re.findall(r"`([^`]+)`", re.sub(r"^    .*$", "", page, flags=re.M))
    some = [text for text in inline if re.search(r"^\S+=\S+ \S+ |^\S+ \S+ \S|^\S+ (--|\S*/)", text)]
    indented = re.findall(r"^    (.*)$", page, re.M)
    return [*indented, *some], [line for block in blocks for line in block.splitlines()]


def _of_header(path: Path) -> list[str]:
    """The indented lines of a script's docstring, or of the comment that a file begins with."""
    if path.suffix == ".py":
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        return re.findall(r"^    (\S.*)$", _joined(doc), re.M)
    top = re.match(r"(?:#.*\n)*", _joined(path.read_text()))[0]
    return re.findall(r"^#(?: \w+:)? {3,}(\S.*)$", top, re.M)


def _joined(text: str) -> str:
    """With a command that goes on in the next line in one."""
    return re.sub(r"\\\n(?:# )?\s*", "", text)


def parse_script() -> None:
    """Only the parser of the script that ``sys.argv[1]`` names, on what follows it."""

    def parse_args(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> None:
        parsed(parser, argv)
        print("parsed")
        sys.exit(0)

    parsed, argparse.ArgumentParser.parse_args = argparse.ArgumentParser.parse_args, parse_args
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


def parse_axolotl() -> None:
    """Only Axolotl's own parser; it would pass an option that it doesn't know on to its launcher."""
    from axolotl.cli.main import cli

    context = cli.make_context("axolotl", sys.argv[1:])
    name, command, argv = cli.resolve_command(context, sys.argv[1:])
    after = argv[argv.index("--") + 1 :] if "--" in argv else []
    unknown = command.make_context(name, list(argv), parent=context).args
    print("parsed" if unknown == after else f"unknown: {unknown}")


def parse_deepspeed() -> None:
    """Only the parser of DeepSpeed's launcher; prints what it would start, a word a line."""
    from deepspeed.launcher.runner import parse_args

    given = parse_args(sys.argv[1:])
    assert given.module
    print(given.user_script, *given.user_args, sep="\n")


def parse_torchrun() -> None:
    """The same of torchrun."""
    from torch.distributed.run import parse_args

    given = parse_args(sys.argv[1:])
    assert given.module
    print(given.training_script, *given.training_script_args, sep="\n")
