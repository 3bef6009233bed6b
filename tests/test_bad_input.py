"""The corpus of what is refused: tables beside the tests that run each row through its host's real
entry point, counted here, where no host is needed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# Where each table is, and what runs it.
TABLES = (
    "axolotl/test_plugin.py",  # load_cfg, as `axolotl train` calls it, by autoload and by plugins:
    "axolotl/test_bad_data.py",  # axolotl train
    "openrlhf/test_flags.py",  # openrlhf.cli.train_dpo
    # The contract's cases of data; TRL's script reads its file itself.
    "axolotl/test_contract.py",
    "openrlhf/test_contract.py",
)


def rows(table: str) -> list[tuple[str, str]]:
    """Each row's source, and the strings in it: the input, and the expected message."""
    tree = ast.parse((TESTS / table).read_text())
    # At the file's top, or in a class there.
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    nodes = [*tree.body, *(node for each in classes for node in each.body)]
    assigned = [
        node.value
        for node in nodes
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        and ast.unparse(getattr(node, "target", None) or node.targets[0]) in ("REFUSED", "refused")
    ]
    (found,) = assigned
    values = found.values if isinstance(found, ast.Dict) else found.elts
    strings = [
        " ".join(
            n.value
            for n in ast.walk(row)
            if isinstance(n, ast.Constant) and isinstance(n.value, str)
        )
        for row in values
    ]
    return [(ast.unparse(row), words) for row, words in zip(values, strings, strict=True)]


def test_the_corpus_is_large_and_has_no_row_twice():
    # Two hosts may give the same message for the same data.
    found = [(table.partition("/")[0], row) for table in TABLES for row, _ in rows(table)]
    assert len(found) >= 60
    assert len({*found}) == len(found)


@pytest.mark.parametrize("table", TABLES)
def test_each_row_says_what_must_be_said(table: str):
    for row, words in rows(table):
        assert len(words.split()) >= 2, row
