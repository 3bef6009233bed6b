"""The commands of the pages and the scripts' headers that need OpenRLHF, as they are written there."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import environment, launched
from page_commands import Command, Reader, commands_of, each

COMMAND = "openrlhf.cli.train_dpo"
# A model that isn't there: OpenRLHF looks for it once it has accepted all flags.
NO_MODEL = [
    "--model.model_name_or_path", "nobody/no-such-model", "--ds.attn_implementation", "eager"
]  # fmt: skip
SHORT = ["--data.max_samples", "32", "--eval.steps", "-1"]


@pytest.fixture(scope="module")
def reader(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """A folder with the file that the pages name."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copy(few / "train.jsonl", folder / "pairs.jsonl")
    return Reader(folder, few, RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")


def tiny_run(reader: Reader) -> str:
    """The tiny script, from the start, on two steps of pairs; the next command it names is run."""
    done = reader.folder / "done.txt"
    if not done.exists():
        (command,) = (each for each in commands_of("openrlhf") if "tiny_focalpo.sh" in each.text)
        run = subprocess.run(
            [*command.words, *SHORT], cwd=reader.folder, env=environment(), capture_output=True,
            text=True, timeout=600,  # seconds
        )  # fmt: skip
        assert run.returncode == 0, run.stderr[-4000:]
        done.write_text(run.stderr)
        reader.follow(run.stderr)
    return done.read_text()


@pytest.mark.xdist_group("commands")
@each("openrlhf")
def test_a_command(
    reader: Reader,
    command: Command,
    commands: Callable,
    flags_of_reader: Callable,
    tmp_path: Path,
):
    """The tiny script trains; of those for GPUs, the launcher's parser reads its own flags, and
    OpenRLHF's the others."""
    words = command.words
    if words[0] == "focalpo" and words[1] == "check":
        output = reader.focalpo(command.filled(*flags_of_reader(words)))
        assert "0.6695" in output or "0.66952" in output
    elif words[0] == "focalpo":
        tiny_run(reader)
        outputs = reader.folder / "outputs"
        for name in ("a", "b"):
            shutil.copytree(outputs / "tiny_focalpo_openrlhf", outputs / name)
        assert reader.focalpo(words)
    elif words[1].endswith("tiny_focalpo.sh"):
        assert "focalpo_plugins: active. loss=focalpo gamma=0.05" in tiny_run(reader)
    else:
        if words[0] == "bash":
            line = launched(reader.folder / words[1], tmp_path, **command.variables)
            words = [Path(line[0]).name, *line[1:]]
        else:
            words = command.filled(*flags_of_reader(words))
        given = reader.run(f"page_commands:parse_{words[0]}", words[1:]).split("\n")
        at = given.index(COMMAND)
        ((code, output),) = commands([[word for word in given[at + 1 :] if word] + NO_MODEL])
        assert code == 1 and "openrlhf/models/actor.py" in output, output
