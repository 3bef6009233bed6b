"""The commands of the pages and the examples' headers that need Axolotl, as they are written there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from harness import Axolotl
from page_commands import ROOT, Command, Reader, commands_of, each

AXOLOTL = "axolotl.cli.main:main"
# The shortest run of a file's settings, in the process that has Axolotl imported.
SHORT = (
    "--max-steps", "1", "--save-steps", "1", "--dataloader-num-workers", "0", "--launcher", "python"
)  # fmt: skip
# What the folders that commands read are made by.
MADE_BY = {
    "out": "axolotl train run.yml",
    "outputs/tiny_dpo": "examples/tiny_dpo.yml",
    "outputs/tiny_focalpo": "examples/tiny_focalpo.yml",
}


@pytest.fixture(scope="module")
def reader(tiny: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """A folder with the files that the pages name."""
    reader = Reader(tmp_path_factory.mktemp("reader"), few)
    config = Axolotl(tiny, reader.folder).config(output_dir="out")
    shutil.copy(config, reader.folder / "SFT.yml")
    config.rename(reader.folder / "run.yml")
    (reader.folder / "base").symlink_to(tiny / "model")
    lines = (tiny / "test.jsonl").read_text().splitlines(keepends=True)
    (reader.folder / "p.jsonl").write_text("".join(lines[:8]))
    return reader


def train(reader: Reader, command: Command) -> str:
    output = reader.run(AXOLOTL, [*command.words[1:], *SHORT], **command.variables)
    out = reader.folder / "out"
    if out.exists():
        for run in ("dpo", "focalpo"):
            if not (out / run).exists():
                (out / run).mkdir()
                shutil.copytree(out / "checkpoint-1", out / run / "checkpoint-1")
    return output


@pytest.mark.xdist_group("commands")
@each("axolotl")
def test_a_command(reader: Reader, command: Command):
    """The tiny runs are trained for a step; what needs GPUs or a hub is parsed."""
    words = command.words
    for folder, text in MADE_BY.items():
        if any(word == folder or word.startswith(f"{folder}/") for word in words):
            train(reader, next(each for each in commands_of("axolotl") if text in each.text))
    if words[0] == "python":
        reader.parse(words)
    elif words[0] == "focalpo":
        assert reader.focalpo(words)
    elif words[1] == "focalpo":
        assert "predicted first loss" in reader.run(AXOLOTL, words[1:])
    elif words[1] == "train" and (words[2] == "run.yml" or "/tiny_" in words[2]):
        parsed(reader, words)
        loss = "dpo" if "tiny_dpo" in words[2] else "focalpo"
        assert ("focalpo_plugins: active. " in train(reader, command)) == (loss == "focalpo")
    else:
        parsed(reader, words)
        header = (ROOT / words[2]).read_text() if "/" in words[2] else ""
        for flag in re.findall(r"Resume: the launch command with (--\S+)", header):
            parsed(reader, [*words[:3], flag])


def parsed(reader: Reader, words: list[str]) -> None:
    output = reader.run("page_commands:parse_axolotl", words[1:])
    assert output.endswith("parsed\n"), output
    if "--" in words:
        assert words[words.index("--") - 1] == "torchrun"
        of_launcher = words[words.index("--") + 1 :]
        reader.run("page_commands:parse_torchrun", [*of_launcher, "-m", "axolotl.cli.train"])
