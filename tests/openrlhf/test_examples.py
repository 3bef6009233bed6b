"""The launch scripts: each of their flags exists in OpenRLHF or in this package."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from formats import PAIRS
from harness import EXAMPLES, launched

# One worker makes the runs that several tests share.
shares_lines = pytest.mark.xdist_group("examples")

SCRIPTS = sorted((EXAMPLES / "openrlhf").glob("*.sh"))
COMMAND = "openrlhf.cli.train_dpo"
# The last of two flags wins: a model that doesn't exist, and the attention that flash-attn would be
# refused for on a CPU.
HERE = ["--model.model_name_or_path", "nobody/no-such-model", "--ds.attn_implementation", "eager"]


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return {script.name: launched(script, tmp_path_factory.mktemp("bin")) for script in SCRIPTS}


@pytest.fixture(scope="module")
def uncommented(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The commented flags that can be uncommented."""
    folder, found = tmp_path_factory.mktemp("uncommented"), {}
    shutil.copy(EXAMPLES / "openrlhf" / "zephyr.jinja", folder)
    for script in SCRIPTS:
        text = script.read_text()
        if "\n  # --" in text:
            (folder / script.name).write_text(text.replace("\n  # --", "\n  --"))
            found[script.name] = launched(folder / script.name, tmp_path_factory.mktemp("bin"))
    return found


@shares_lines
def test_scripts_are_there(lines: dict):
    assert list(lines) == [
        "llama3_focalpo.sh", "llama3_focalpo_lora.sh", "mistral_focalpo.sh", "tiny_focalpo.sh"
    ]  # fmt: skip


@shares_lines
def test_openrlhf_takes_every_flag(lines: dict, uncommented: dict, commands: Callable):
    """It runs until it looks for the model; an unknown flag would end it with 2."""
    argvs = []
    assert set(uncommented) == set(lines) - {"tiny_focalpo.sh"}
    for name, line in uncommented.items():
        more = {flag for flag in line if flag.startswith("--")} - set(lines[name])
        assert more == {
            "--focalpo.shared_prompts",
            *(f"--logger.wandb.{what}" for what in ("key", "project", "run_name")),
        }
    for line in [*lines.values(), *uncommented.values()]:
        module = line.index(COMMAND)
        assert line[module - 1] == ("--module" if line[0].endswith("deepspeed") else "-m")
        argv = line[module + 1 :]
        assert argv[-2:] == ["--local_rank", "0"], "what follows the script is not passed on"
        argvs.append([*argv, *HERE])
    for (code, output), argv in zip(commands(argvs), argvs, strict=True):
        assert code == 1, (argv, output)
        assert "openrlhf/models/actor.py" in output


@shares_lines
@pytest.mark.parametrize(
    "script, model, rate",
    [
        ("llama3_focalpo.sh", "meta-llama/Meta-Llama-3-8B-Instruct", "6e-7"),
        ("mistral_focalpo.sh", "HuggingFaceH4/mistral-7b-sft-beta", "5e-7"),
    ],
)
def test_the_papers_values(lines: dict, script: str, model: str, rate: str):
    """Section 4 and appendix C: gamma 0.05, batch 128, one epoch, ZeRO-3 on 8 GPUs."""
    line = lines[script]
    assert line[1:3] == ["--num_gpus", "8"]
    for flag, value in (
        ("--loss", "focalpo"),
        ("--focalpo.gamma", "0.05"),
        ("--model.model_name_or_path", model),
        ("--adam.lr", rate),
        ("--model.beta", "0.01"),
        ("--train.batch_size", "128"),
        ("--train.max_epochs", "1"),
        ("--ds.zero_stage", "3"),
    ):
        assert line[line.index(flag) + 1] == value


def value(line: list[str], flag: str) -> str:
    return line[line.index(flag) + 1]


@shares_lines
@pytest.mark.parametrize(
    "script", [path for path in SCRIPTS if "tiny" not in path.name], ids=lambda path: path.name
)
def test_the_steps_of_the_header(lines: dict, script: Path):
    line = lines[script.name]
    pairs = PAIRS[value(line, "--data.dataset")] * int(value(line, "--train.max_epochs"))
    steps = round(pairs / int(value(line, "--train.batch_size")))
    top = script.read_text().partition("\nset -euo")[0]
    assert re.findall(r"(\d+) steps", top.replace("\n# ", " ")) == [str(steps)]
    assert ("Meta Llama 3 Community License" in top) == script.name.startswith("llama3")


@shares_lines
def test_each_run_keeps_its_own_checkpoints(lines: dict):
    """OpenRLHF has one default folder for all runs, so a run would continue from another's
    checkpoint."""
    folders = set()
    for name in set(lines) - {"tiny_focalpo.sh"}:
        line, output = lines[name], value(lines[name], "--ckpt.output_dir")
        assert value(line, "--ckpt.path") == f"{output}/checkpoints"
        assert int(value(line, "--ckpt.save_steps")) == 100
        folders.add(output)
    assert len(folders) == 3


@shares_lines
def test_lora_is_the_handbooks(lines: dict):
    line = lines["llama3_focalpo_lora.sh"]
    assert (value(line, "--ds.lora.rank"), value(line, "--ds.lora.alpha")) == ("128", "128")


def test_a_script_trains_on_two_nodes(on_two_nodes: Callable):
    """As in examples/multinode.md; every margin of the first step is 0."""
    run = on_two_nodes(EXAMPLES / "openrlhf" / "llama3_focalpo.sh")
    assert run.returncode == 0, run.output
    assert len(run.said("focalpo_plugins: active")) == 1
    steps = run.steps("train/")
    assert sorted(steps) == [1, 2, 3, 4, 5]  # 40 pairs, 8 to a step
    assert steps[1]["loss"] == pytest.approx(2**-0.05 * math.log(2), abs=1e-5)
    # The script's own schedule: cosine, with a tenth of five steps, rounded up, as warm-up.
    assert steps[1]["lr"] == pytest.approx(1e-3)
