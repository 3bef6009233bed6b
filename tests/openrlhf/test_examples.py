"""The launch scripts: every flag of theirs is one of OpenRLHF's, or ours."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from harness import EXAMPLES, launched

SCRIPTS = sorted((EXAMPLES / "openrlhf").glob("*.sh"))
COMMAND = "openrlhf.cli.train_dpo"
# The last of two wins: a model that no machine has, and what flash-attn is refused for on a CPU.
HERE = ["--model.model_name_or_path", "nobody/no-such-model", "--ds.attn_implementation", "eager"]


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return {script.name: launched(script, tmp_path_factory.mktemp("bin")) for script in SCRIPTS}


def test_scripts_are_there(lines: dict):
    assert list(lines) == [
        "llama3_focalpo.sh", "llama3_focalpo_lora.sh", "mistral_focalpo.sh", "tiny_focalpo.sh"
    ]  # fmt: skip


def test_openrlhf_takes_every_flag(lines: dict, commands: Callable):
    """It gets as far as looking for the model; a flag it doesn't know would end it with 2."""
    argvs = []
    for line in lines.values():
        module = line.index(COMMAND)
        assert line[module - 1] == ("--module" if line[0].endswith("deepspeed") else "-m")
        argv = line[module + 1 :]
        assert argv[-2:] == ["--local_rank", "0"], "what follows the script is not passed on"
        argvs.append([*argv, *HERE])
    for (code, output), argv in zip(commands(argvs), argvs, strict=True):
        assert code == 1, (argv, output)
        assert "openrlhf/models/actor.py" in output


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


def test_a_script_trains_on_two_nodes(on_two_nodes: Callable):
    """As examples/multinode.md has it; at the first step every margin is 0."""
    run = on_two_nodes(EXAMPLES / "openrlhf" / "llama3_focalpo.sh")
    assert run.returncode == 0, run.output
    assert len(run.said("focalpo_plugins: active")) == 1
    steps = run.steps("train/")
    assert sorted(steps) == [1, 2, 3, 4, 5]  # 40 pairs, 8 to a step
    assert steps[1]["loss"] == pytest.approx(2**-0.05 * math.log(2), abs=1e-5)
    # The script's own: cosine with a tenth of five steps, rounded up, to warm up in.
    assert steps[1]["lr"] == pytest.approx(1e-3)
