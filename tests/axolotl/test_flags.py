"""This package's keys on the command line of Axolotl's commands: they arrive, or are refused by
name. The real command runs; in most of these tests its launchers are stand-ins that record how they
are started, which shows what Axolotl passes on."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
from harness import PLUGIN, Axolotl, environment

# One worker starts the command's process.
shares_command = pytest.mark.xdist_group("command")


@pytest.fixture(scope="module")
def command(hinge_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """`axolotl` with a third party's loss installed and stand-ins for its launchers."""
    folder = tmp_path_factory.mktemp("launchers")
    for launcher in ("accelerate", "torchrun"):
        (folder / launcher).write_text('#!/bin/sh\nprintf "STARTED %s\\n" "$*"\n')
        (folder / launcher).chmod(0o755)
    first = f"{folder}{os.pathsep}{environment()['PATH']}"

    def run(config: Path, argv: list[str]) -> tuple[int, str]:
        words = [str(config) if word == "run.yml" else word for word in argv]
        how = {"path": [hinge_package], "PATH": first, "merged": True}
        return forked.run("axolotl.cli.main:main", words, config.parent, **how)[:2]

    return run


def outcome(command: Callable, config: Path, argv: list[str]) -> tuple[int, str]:
    return command(config, argv)


TRAIN = ["train", "run.yml"]
# The arguments, and what the launcher's command line has after the config's path.
PASSED_ON: dict[str, tuple[list[str], list[str]]] = {
    "two words": ([*TRAIN, "--focalpo-gamma", "0.5"], ["--focalpo-gamma=0.5"]),
    "one word": ([*TRAIN, "--focalpo-gamma=5e-1"], ["--focalpo-gamma=0.5"]),
    "before the config": (["train", "--focalpo-gamma", "0.5", "run.yml"], ["--focalpo-gamma=0.5"]),
    "underscores": ([*TRAIN, "--focalpo_gamma", "0.5"], ["--focalpo-gamma=0.5"]),
    "underscore among hyphens": (
        [*TRAIN, "--focalpo-allow_changed"],
        ["--focalpo-allow-changed=True"],
    ),
    "a word": ([*TRAIN, "--focalpo-variant", "incorrect"], ["--focalpo-variant=incorrect"]),
    "on": ([*TRAIN, "--focalpo-fused"], ["--focalpo-fused=True"]),
    "off": ([*TRAIN, "--no-focalpo-fused"], ["--focalpo-fused=False"]),
    "off, underscores": ([*TRAIN, "--no_focalpo_fused"], ["--focalpo-fused=False"]),
    "several": (
        [*TRAIN, "--focalpo-gamma", "0", "--rl-beta", "0.2", "--focalpo-allow-reversed"],
        ["--focalpo-gamma=0.0", "--rl-beta=0.2", "--focalpo-allow-reversed=True"],
    ),
    "a third party's": (
        [*TRAIN, "--rl", "hinge", "--hinge-offset", "2"],
        ["--rl=hinge", "--hinge-offset=2.0"],
    ),
    "torchrun": (
        [*TRAIN, "--launcher", "torchrun", "--focalpo-gamma", "0.5", "--", "--nproc_per_node", "2"],
        ["--focalpo-gamma=0.5"],
    ),
    "evaluate": (["evaluate", "run.yml", "--focalpo-gamma", "0.5"], ["--focalpo-gamma=0.5"]),
}


@shares_command
@pytest.mark.releases
@pytest.mark.parametrize("case", PASSED_ON)
def test_passed_on_to_the_launcher(command: Callable, axolotl: Axolotl, case: str):
    argv, passed = PASSED_ON[case]
    of_other = dict.fromkeys(("focalpo_gamma", "focalpo_variant")) if "hinge" in argv else {}
    code, output = outcome(command, axolotl.config(**of_other), argv)
    assert code == 0, output
    (started,) = [line for line in output.splitlines() if line.startswith("STARTED")]
    before, after = started.split(f" -m axolotl.cli.{argv[0]} ")
    assert "focalpo" not in before and "hinge" not in before
    assert set(passed) <= set(after.split()[1:])
    assert len([word for word in after.split() if "focalpo-" in word or "hinge-" in word]) == len(
        [word for word in passed if "focalpo-" in word or "hinge-" in word]
    )


@shares_command
def test_passed_on_in_a_sweep(command: Callable, axolotl: Axolotl):
    """Each run of the sweep gets them."""
    sweep = axolotl.folder / "sweep.yaml"
    sweep.write_text("learning_rate: [1.0e-5, 1.0e-6]\n")
    argv = [*TRAIN, "--sweep", str(sweep), "--focalpo-gamma", "0.5"]
    code, output = outcome(command, axolotl.config(), argv)
    assert code == 0, output
    started = [line for line in output.splitlines() if line.startswith("STARTED")]
    assert len(started) == 2 and all("--focalpo-gamma=0.5" in line.split() for line in started)


PYTHON = [*TRAIN, "--launcher", "python"]
# Arguments that are refused before anything starts, whatever the launcher.
REFUSED: dict[str, tuple[list[str], str]] = {
    "misspelt": (
        [*TRAIN, "--focalpo-gama", "0.5"],
        "unknown option '--focalpo-gama'; did you mean '--focalpo-gamma'?",
    ),
    "misspelt, python": (
        [*PYTHON, "--focalpo_gama=0.5"],
        "unknown option '--focalpo_gama=0.5'; did you mean '--focalpo-gamma'?",
    ),
    "one hyphen": ([*TRAIN, "-focalpo-gamma", "0.5"], "unknown option '-focalpo-"),
    "OpenRLHF's": ([*TRAIN, "--focalpo.gamma", "0.5"], "unknown option '--focal"),
    "a third party's, misspelt": (
        [*TRAIN, "--hinge-ofset", "2"],
        "unknown option '--hinge-ofset'; did you mean '--hinge-offset'?",
    ),
    "the plug-in's own key": ([*TRAIN, "--focalpo-loss", "focalpo"], "unknown option '--focalpo-loss'"),
    "evaluate": (["evaluate", "run.yml", "--focalpo-gama", "1"], "unknown option '--focalpo-gama'; did"),
    "preprocess": (["preprocess", "run.yml", "--focalpo-gama", "1"], "unknown option '--focalpo-gama'"),
    "no value": ([*TRAIN, "--focalpo-gamma"], "Option '--focalpo-gamma' requires an argument"),
    "no number": ([*TRAIN, "--focalpo-gamma", "big"], "'big' is not a valid float"),
    "a value behind a switch": (
        [*TRAIN, "--focalpo-fused", "false"],
        "--focalpo-fused takes no value, got 'false': give --focalpo-fused for true, or "
        "--no-focalpo-fused for false.",
    ),
    "the launcher's": (
        [*TRAIN, "--", "--focalpo-gamma", "0.5"],
        "--focalpo-gamma must come before --, got it after",
    ),
    "the launcher's, misspelt": ([*TRAIN, "--", "--focalpo-gama=1"], "unknown option '--focalpo-gama=1'"),
    # Here the value has arrived by the time it is checked.
    "gamma out of range": (
        [*PYTHON, "--focalpo-gamma", "7"],
        "focalpo_gamma must be below 1/ln 2 = 1.4427 for variant 'correct', got 7.0",
    ),
    "gamma out of range, preprocess": (
        ["preprocess", "run.yml", "--focalpo_gamma=7"],
        "focalpo_gamma must be below 1/ln 2 = 1.4427 for variant 'correct', got 7.0",
    ),
    "of another loss": (
        [*PYTHON, "--hinge-offset", "2"],
        "hinge_offset belongs to rl: hinge, got 2.0 under rl: focalpo",
    ),
    "under dpo": (
        [*PYTHON, "--rl", "dpo", "--focalpo-gamma", "0.1"],
        "focalpo_gamma belongs to rl: focalpo, got 0.1 under rl: dpo",
    ),
    "of another loss, under dpo": (
        [*PYTHON, "--rl", "dpo", "--hinge-offset", "2"],
        "hinge_offset belongs to rl: hinge, got 2.0 under rl: dpo",
    ),
}  # fmt: skip


@shares_command
@pytest.mark.releases
@pytest.mark.parametrize("case", REFUSED)
def test_refused(command: Callable, axolotl: Axolotl, case: str):
    argv, message = REFUSED[case]
    dpo = dict.fromkeys(("focalpo_gamma", "focalpo_variant")) if "dpo" in argv else {}
    code, output = outcome(command, axolotl.config(**dpo), argv)
    assert code != 0 and message in " ".join(output.split()), output[-3000:]
    assert "STARTED" not in output and "Loading model" not in output
    assert "?." not in output.partition("Error:")[2]


# The YAML, the command line, and the message before anything starts; None: it starts the launcher.
IN_YAML: dict[str, tuple[dict[str, Any], list[str], str | None]] = {
    "gamma": ({"focalpo_gamma": 7}, [], "focalpo_gamma must be below 1/ln 2 = 1.4427 for variant"),
    "gamma, put right": ({"focalpo_gamma": 7}, ["--focalpo-gamma", "0.5"], None),
    "gamma, made wrong": ({}, ["--focalpo-gamma", "7"], "focalpo_gamma must be below 1/ln 2"),
    "misspelt": ({"focalpo_gama": 1}, [], "unknown key focalpo_gama, got 1; did"),
    "under dpo": (
        {"rl": "dpo"},
        [],
        "focalpo_gamma belongs to rl: focalpo, got 0.05 under rl: dpo",
    ),
    "a nested option": (
        {"rl_beta": None},
        ["--trl.beta", "-1"],
        "trl.beta must be a finite number above 0, got -1",
    ),
    "a list": ({}, ["--dpo-loss-weights", "[2.0]", "--dpo-loss-type", "[sigmoid]"], None),
    "a list, fused": (
        {"focalpo_fused": True},
        ["--dpo-loss-weights", "[2.0]"],
        "focalpo_fused can't be combined with dpo_loss_weights, got [2.0]",
    ),
    "strict": ({"strict": True, "focalpo_gamma": None}, ["--rl-beta", "-1"], "rl_beta must be"),
    "as it is": ({}, [], None),
    "the host's": ({"rl": "ipo", "focalpo_gamma": None, "focalpo_variant": None}, [], None),
}


# Axolotl 0.16 has no such key, and hands the option to the launcher.
NOT_IN_0_16 = {"a list, fused"}


@shares_command
@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[pytest.mark.releases] * (c not in NOT_IN_0_16)) for c in IN_YAML],
)
def test_refused_before_the_launcher_starts(
    command: Callable, axolotl: Axolotl, case: str, launcher: str
):
    """The message is one line, the last one, without a traceback."""
    changes, given, message = IN_YAML[case]
    argv = [*TRAIN, "--launcher", launcher, *given]
    code, output = outcome(command, axolotl.config(**changes), argv)
    *_, last = output.splitlines()
    if message is None:
        assert code == 0 and last.startswith("STARTED"), output
    else:
        assert code == 1 and last.startswith(f"Error: {message}"), output
        assert "STARTED" not in output and "Traceback" not in output


@shares_command
def test_a_broken_file_is_refused_before_the_launcher_starts(command: Callable, axolotl: Axolotl):
    path = axolotl.folder / "pairs.jsonl"
    path.write_text('{"prompt": "Hi"}]\n')
    data = {"path": str(path), "ds_type": "json", "type": "chat_template.argilla_chat"}
    code, output = outcome(command, axolotl.config(datasets=[data]), TRAIN)
    start = f"Error: datasets[0].path must be JSON lines, got {str(path)!r}: line "
    assert code == 1 and output.splitlines()[-1].startswith(start), output


@shares_command
@pytest.mark.parametrize("text", ["rl: [", "- rl", "", "\xff"])
def test_a_config_that_is_none_is_left_to_axolotl(command: Callable, axolotl: Axolotl, text: str):
    config = axolotl.folder / "other.yml"
    config.write_text(text, encoding="latin-1")
    code, output = outcome(command, config, TRAIN)
    assert code == 0 and output.splitlines()[-1].startswith("STARTED"), output


@shares_command
def test_the_runs_of_a_sweep_are_left_to_their_own_processes(command: Callable, axolotl: Axolotl):
    """The config by itself may lack what the sweep sets."""
    sweep = axolotl.folder / "sweep.yaml"
    sweep.write_text("focalpo_gamma: [0.1, 0.2]\n")
    code, output = outcome(
        command, axolotl.config(focalpo_gamma=7), [*TRAIN, "--sweep", str(sweep)]
    )
    assert code == 0 and output.count("STARTED") == 2, output


def test_the_last_line_where_no_command_of_axolotls_is_the_parent(axolotl: Axolotl):
    """The launcher's own traceback comes between the error and this line."""
    config = axolotl.config(focalpo_gamma=7)
    launch = ("accelerate", "launch", "-m", "axolotl.cli.train", str(config))
    run = subprocess.run(
        launch, env=environment(), cwd=axolotl.folder, capture_output=True, text=True
    )
    *_, before, last = run.stderr.splitlines()
    assert run.returncode != 0
    assert before.startswith("subprocess.CalledProcessError: ")
    assert last.startswith("focalpo_plugins: focalpo_gamma must be below 1/ln 2 = 1.4427"), before


@shares_command
def test_strict_takes_what_the_yaml_has(command: Callable, axolotl: Axolotl):
    """Axolotl silently drops the other options there."""
    strict = axolotl.config(strict=True, focalpo_gamma=None)
    code, output = outcome(command, strict, [*PYTHON, "--focalpo-gamma", "0.5"])
    assert code != 0
    assert "--focalpo-gamma would be dropped under strict: true" in output
    known = axolotl.config(strict=True)
    code, output = outcome(command, known, [*PYTHON, "--focalpo-gamma", "7"])
    assert "focalpo_gamma must be below 1/ln 2 = 1.4427 for variant 'correct', got 7.0" in output


@shares_command
def test_help_lists_them(command: Callable, axolotl: Axolotl):
    code, output = outcome(command, axolotl.config(), ["train", "--help"])
    assert code == 0
    for option in ("--focalpo-gamma FLOAT", "--focalpo-variant TEXT", "--hinge-offset FLOAT",
                   "--focalpo-gamma-end VALUE", "--focalpo-fused / --no-focalpo-fused"):  # fmt: skip
        assert option in output
    assert "Focusing parameter; 0 is DPO. Key of focalpo_plugins." in " ".join(output.split())
    assert "--focalpo-rl" not in output


@pytest.mark.releases
@pytest.mark.parametrize("launcher", ["accelerate", "python"])
def test_trains_what_the_command_line_says(axolotl: Axolotl, launcher: str):
    """2^-1 ln 2 = 0.3466 at gamma 1; the YAML says 0.05. torchrun gets the same words for the same
    module, as PASSED_ON has it; test_faults.py trains with it."""
    config = axolotl.config(max_steps=1, save_steps=1, focalpo_fused=True)
    given = ("--focalpo-gamma", "1", "--no-focalpo-fused")
    run = axolotl("train", config, *given, "--launcher", launcher)
    assert run.code == 0, run.output[-4000:]
    assert "active. loss=focalpo gamma=1.0 variant=correct" in run.output
    assert "path=fused" not in run.output
    assert run.steps("loss")[0][0] == pytest.approx(0.34657, abs=1e-5)


@pytest.mark.xdist_group("autoload off")
@pytest.mark.parametrize("launcher", ["accelerate", "torchrun", "python"])
def test_refused_where_the_autoload_is_off(axolotl: Axolotl, launcher: str):
    """The launchers don't accept such an option; the python launcher gets none, so this package
    reports it."""
    config = axolotl.config(plugins=[PLUGIN], max_steps=1)
    given = ("--focalpo-gamma", "0.5", "--launcher", launcher)
    run = axolotl("train", config, *given, FOCALPO_AUTOLOAD="0")
    assert run.code != 0 and not run.checkpoints
    said = {
        "accelerate": "unrecognized arguments: --focalpo-gamma",
        "torchrun": "unrecognized arguments: --focalpo-gamma",
        "python": "unknown option '--focalpo-gamma': Axolotl's command would drop it. Write "
        "focalpo_gamma in the YAML; options of focalpo_plugins need its autoload.",
    }[launcher]
    assert said in run.output


def test_a_broken_package_stops_no_option_of_axolotls(axolotl: Axolotl, package_copy: Path):
    """Options that nobody knows go to the launcher, as without this package; a misspelt one of this
    package stops."""
    (package_copy / "focalpo_plugins" / "registry.py").write_text("raise RuntimeError('broken')\n")
    source = (
        "import sys, click\n"
        "import torch\n"
        "from axolotl.cli.main import train\n"
        "for argv in (['run.yml', '--num_processes', '2'], ['run.yml', '--focalpo-gamma', '1']):\n"
        "    try:\n"
        "        print('LEFT', train.make_context('train', argv).args)\n"
        "    except Exception as error:\n"
        "        print('ERROR', error)\n"
    )
    script = axolotl.folder / "script.py"
    script.write_text(source)
    (axolotl.folder / "run.yml").touch()
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment(package_copy),
        cwd=axolotl.folder,
        capture_output=True,
        text=True,
    )
    left, error = done.stdout.splitlines()[-2:]
    assert ast.literal_eval(left.removeprefix("LEFT ")) == ["--num_processes", "2"], done.stderr
    assert error == "ERROR broken"
