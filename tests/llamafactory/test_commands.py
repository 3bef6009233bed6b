"""The commands of the pages and the examples' headers that need LLaMA-Factory, as they are written
there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from llamafactory_run import LlamaFactory
from page_commands import Command, Reader, commands_of, each

# The tiny run's file and the page's are both trained with these.
SHORT = ("max_steps=1", "eval_on_start=false", "save_strategy=steps", "save_steps=1")


@pytest.fixture(scope="module")
def reader(tiny: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """A folder with the files that the pages name."""
    reader = Reader(tmp_path_factory.mktemp("reader"), few)
    host = LlamaFactory(tiny, reader.folder)
    host.data("train", few / "train.jsonl")
    host.write(host.config(output_dir="OUTPUT_DIR")).rename(reader.folder / "run.yaml")
    (reader.folder / "MODEL").symlink_to(tiny / "model")
    shutil.copy(few / "test.jsonl", reader.folder / "pairs.jsonl")
    return reader


def train(reader: Reader, command: Command) -> str:
    argv = [*command.words[1:], *SHORT]
    return reader.run("llamafactory.cli:main", argv, **command.variables)


def other(start: str) -> Command:
    return next(each for each in commands_of("llamafactory") if start in each.text)


@pytest.mark.xdist_group("commands")
@each("llamafactory")
def test_a_command(reader: Reader, command: Command):
    """The tiny runs are trained for a step, on the data that their script makes; data sets of a hub
    are only parsed."""
    words = command.words
    if "OUTPUT_DIR" in words:
        train(reader, other("llamafactory-cli train run.yaml"))
    if words[0] == "focalpo":
        assert reader.focalpo(words)
    elif words[0] == "llamafactory-cli":
        if words[2] != "run.yaml":
            make(reader, other("examples/tiny/train.jsonl"))
        assert "focalpo_plugins: active. loss=focalpo" in train(reader, command)
    elif "--out" in words and all(Path(word).suffix == ".jsonl" for word in sources(words)):
        assert "dataset_info.json" in make(reader, command)
    else:
        reader.parse(words)


def sources(words: list[str]) -> list[str]:
    return words[2 : words.index("--out")]


def make(reader: Reader, command: Command) -> str:
    return reader.run(str(reader.folder / command.words[1]), command.words[2:])
