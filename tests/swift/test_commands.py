"""The commands and the Python of the pages and the examples' headers that need ms-swift, as they are
written there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from page_commands import Command, Reader, each, every_snippet
from swift.cli.main import parse_yaml_args
from swift_command import TINY
from swift_command import command as script
from swift_command import words as as_flags

SHORT = {"max_steps": 1, "eval_on_start": False, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def rest(tiny: Path, few: Path) -> dict[str, Any]:
    """What ``...`` stands for."""
    here = {"model": str(tiny / "model"), "dataset": str(few / "train.jsonl"), "output_dir": "out"}
    return {**TINY, **here, "loss_type": "focalpo", "focalpo_gamma": 0.05}


@pytest.fixture(scope="module")
def reader(rest: dict[str, Any], few: Path, tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """A folder with the file that the pages name."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "run.yaml").write_text(
        yaml.safe_dump({**rest, "columns": json.loads(rest["columns"])})
    )
    return Reader(
        folder, few, MODELSCOPE_CACHE=str(folder / "cache"), HF_DATASETS_CACHE=str(folder / "hf")
    )


@pytest.mark.xdist_group("commands")
@each("swift")
def test_a_command(
    reader: Reader, rest: dict[str, Any], command: Command, monkeypatch: pytest.MonkeyPatch
):
    """The tiny runs are trained for a step, with the command line that ms-swift makes of a file."""
    given = {key: value for key, value in rest.items() if f"--{key}" not in command.words}
    words = command.filled(*as_flags(given)) if "..." in command.words else command.words
    if words[0] == "focalpo":
        assert "predicted first loss 0.6695" in reader.focalpo(words)
        return
    monkeypatch.chdir(reader.folder)
    argv = words[2:]
    monkeypatch.setenv("SWIFT_CONFIG_FILE", "")  # it is set here, and must not stay
    parse_yaml_args(argv)
    output = reader.run(script(), [*argv, *as_flags(SHORT)], **command.variables)
    assert "active. loss=focalpo gamma=0.05" in output and "'loss': '0.6695'" in output


@pytest.mark.xdist_group("commands")
def test_the_snippet(reader: Reader, rest: dict[str, Any]):
    (snippet,) = [each.text for each in every_snippet() if "from swift import" in each.text]
    given = {key: value for key, value in rest.items() if f"{key}=" not in snippet}
    given |= {**SHORT, "dataset": [rest["dataset"]], "report_to": ["none"]}
    (reader.folder / "script.py").write_text(snippet.replace("...", f"**{given!r}"))
    output = reader.run(str(reader.folder / "script.py"), [])
    assert "active. loss=focalpo gamma=0.05" in output
