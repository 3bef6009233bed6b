"""The commands and the Python of the pages: each has a test, and those that need no host run here."""

from __future__ import annotations

import ast
import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
from page_commands import ROOT, RULES, Command, Reader, each, every_command, every_snippet, rule_of

HOSTS = {rule.host for rule in RULES} - {""}


def test_each_has_a_test():
    """Whoever writes a command into a page gives it a rule in tests/support/page_commands.py."""
    found = [*every_command(), *every_snippet()]
    without = [f"{each.page}: {each.text}" for each in found if rule_of(each) is None]
    assert not without
    assert len({command.text for command in found}) > 150
    used = {rule_of(command) for command in found}
    assert [rule.pattern for rule in RULES if rule not in used] == []


@pytest.mark.parametrize("host", sorted(HOSTS))
def test_each_folder_runs_its_commands(host: str):
    folder = Path("tests") if host == "core" else Path("tests", host)
    assert f'@each("{host}")' in (ROOT / folder / "test_commands.py").read_text()


def test_the_tests_that_rules_name():
    for rule in RULES:
        assert bool(rule.host) + bool(rule.test) + bool(rule.reason) == 1, rule
        if rule.test:
            path, _, name = rule.test.partition("::")
            text = (ROOT / path).read_text()
            functions = {
                node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)
            }
            assert name in functions and rule.by in text, rule


def test_a_command_is_read_as_a_shell_reads_it():
    text = 'A=1 B="2 3" axolotl train run.yml --rl-beta 0.1 ...  # as above'
    command = Command("page", text)
    assert command.variables == {"A": "1", "B": "2 3"}
    assert command.words == ["axolotl", "train", "run.yml", "--rl-beta", "0.1", "..."]
    assert command.filled("--seed", "1")[-3:] == ["0.1", "--seed", "1"]


class Session:
    """What nox gives to the function that runs the tests; nox itself isn't in this environment."""

    def __init__(self, *posargs: str) -> None:
        self.posargs, self.env, self.ran = posargs, {}, []

    def create_tmp(self) -> str:
        return "tmp"

    def chdir(self, folder: str) -> nullcontext:
        return nullcontext()

    def run(self, *words: str) -> None:
        self.ran += words


def test_files_after_the_dashes_replace_the_sessions_own(monkeypatch: pytest.MonkeyPatch):
    """As in `nox -s axolotl -- tests/trl`; other words go to pytest as they are."""
    monkeypatch.chdir(ROOT)
    source = ast.parse((ROOT / "noxfile.py").read_text())
    source.body = [
        node
        for node in source.body
        if isinstance(node, ast.ImportFrom) or getattr(node, "name", None) == "test"
    ]
    functions = {"Path": Path}
    exec(compile(source, "noxfile.py", "exec"), functions)
    for given, expected in (
        ((), ["tests/eval", "-n", "3"]),
        (("-k", "tests"), ["tests/eval", "-n", "3", "-k", "tests"]),
        (("tests/trl", "-x"), ["tests/trl", "-n", "3", "-x"]),
        (("tests/conftest.py::tiny",), ["tests/conftest.py::tiny", "-n", "3"]),
    ):
        session = Session(*given)
        functions["test"](session, ["tests/eval"], "-n", "3")
        words = [word.removeprefix(f"{ROOT}/") for word in session.ran]
        assert words[:4] == ["pytest", "-c", "setup.cfg", "--basetemp"]
        assert words[5:] == expected


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return Reader(tmp_path_factory.mktemp("reader"))


@pytest.mark.xdist_group("commands")
@each("core")
def test_a_command(reader: Reader, command: Command):
    """Curves are drawn; of what takes minutes, the command line is parsed."""
    words = command.words
    if words[0] == "focalpo":
        assert reader.focalpo(words)
    elif words[1] == "-m":
        assert "usage: focalpo" in reader.run(f"{words[2]}.__main__:main", words[3:])
    else:
        of_reader = {"NAME": "loss"}  # one of the table's
        reader.parse([of_reader.get(word, word) for word in words])


def test_rows_are_converted_as_the_page_says():
    """Its functions make the rows of the page's own formats, and take the white space at the ends
    of an answer away."""
    page = (ROOT / "docs" / "data.md").read_text()
    rows = [json.loads(block) for block in re.findall(r"^```json\n(.*?)^```$", page, re.M | re.S)]
    functions: dict = {}
    for snippet in every_snippet():
        if snippet.page == "docs/data.md":
            exec(snippet.text, functions)
    (text,) = [row for row in rows if {*map(type, row.values())} == {str} and "prompt" in row]
    lists = [row for row in rows if {*map(type, row.values())} == {list} and len(row) == 3]
    assert functions["as_messages"](text) in lists
    answers = {
        side: [{"role": "assistant", "content": f" {side}\n"}] for side in ("chosen", "rejected")
    }
    for side, turns in functions["stripped"](answers).items():
        assert turns[-1]["content"] == side
