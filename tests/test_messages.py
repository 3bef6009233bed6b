"""Lines of this package in a log that several ranks write to."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from harness import run_python

PACKAGE = Path(find_spec("focalpo_plugins").origin).parent
TWO_RANKS = """
import os
from focalpo_plugins.guards.messages import say
ours = os.fork()
for number in range(2000):
    say(f"rank {ours > 0}, line {number} of several words")
if ours:
    os.wait()
"""


def test_lines_of_two_ranks_are_whole():
    """Both unbuffered, as DeepSpeed's launcher starts them, with one stderr."""
    run = run_python("-u", "-c", TWO_RANKS)
    lines = run.stderr.splitlines()
    assert len(lines) == 4000
    for rank in (True, False):
        expected = [f"focalpo_plugins: rank {rank}, line {n} of several words" for n in range(2000)]
        assert [line for line in lines if f"rank {rank}" in line] == expected


def test_a_line_stays_one_line(capsys):
    from focalpo_plugins.guards.messages import say

    say("an error\nof two lines")
    assert capsys.readouterr().err == "focalpo_plugins: an error of two lines\n"


def test_nothing_else_writes_to_stderr():
    """``print`` and ``sys.exit`` write a line and its end separately; only commands, which run as
    one process, may use them."""
    apart = re.compile(r"\bprint\(|sys\.exit\(\s*f?\"|stderr\.write")
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if apart.search(path.read_text()) and "cli" not in path.parts
    }
    assert found == {"guards/messages.py"}
