"""The command line in OpenRLHF's real command: what it offers, refuses and accepts."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from harness import run_python
from openrlhf_flags import of_host

pytestmark = pytest.mark.releases
# One worker makes the runs that several tests share.
shares_ends = pytest.mark.xdist_group("flags")

# A model that doesn't exist: an accepted command line stops when it looks for it.
MODEL = "nobody/no-such-model"
LOOKS_FOR_MODEL = "openrlhf/models/actor.py"
EAGER = ["--ds.attn_implementation", "eager"]
ACCEPTED = ["--model.model_name_or_path", MODEL, *EAGER]
OURS = ["--loss", "focalpo"]

REFUSED = [
    (
        ["--loss", "focalp"],
        "argument --loss: must be one of dpo, focalpo, hinge, got 'focalp'; did you mean 'focalpo'?",
    ),
    (["--loss"], "argument --loss: expected one argument"),
    ([*OURS, "--focalpo.gamma", "-0.1"], "--focalpo.gamma must be a finite number of at least 0, got -0.1"),
    ([*OURS, "--focalpo.gamma", "nan"], "--focalpo.gamma must be a finite number of at least 0, got nan"),
    ([*OURS, "--focalpo.gamma", "inf"], "--focalpo.gamma must be a finite number of at least 0, got inf"),
    ([*OURS, "--focalpo.gamma", "x"], "argument --focalpo.gamma: must be a number, got 'x'; it is 0.05 by default."),
    (
        [*OURS, "--focalpo.gamma", "1.5"],
        "--focalpo.gamma must be below 1/ln 2 = 1.4427 for variant 'correct', got 1.5: from there on, "
        "training runs backwards from the first step. The paper uses 0.05; "
        "to train anyway, set --focalpo.allow_reversed.",
    ),
    (
        [*OURS, "--focalpo.gamma=1", "--focalpo.variant=correct_exact"],
        "--focalpo.gamma must be below 1 for variant 'correct_exact', got 1.0",
    ),
    (
        [*OURS, "--focalpo.variant", "corect"],
        "--focalpo.variant must be one of correct, correct_exact, incorrect, got 'corect'",
    ),
    (
        ["--focalpo.gamma", "0.1"],
        "--focalpo.gamma is a flag of --loss focalpo, got 0.1 with --loss dpo. Give --loss focalpo, or "
        "remove --focalpo.gamma.",
    ),
    (
        ["--loss", "dpo", "--focalpo.variant", "correct"],
        "--focalpo.variant is a flag of --loss focalpo, got 'correct' with --loss dpo.",
    ),
    (
        ["--loss", "hinge", "--focalpo.allow_reversed"],
        "--focalpo.allow_reversed is a flag of --loss focalpo, got True with --loss hinge.",
    ),
    (["--loss", "hinge", "--hinge.offset", "0"], "--hinge.offset must be above 0, got 0.0: the paper uses 1."),
    ([*OURS, "--model.ipo_enable"], "--model.ipo_enable must be left out with --loss focalpo, got both"),
    ([*OURS, "--model.beta", "0"], "--model.beta must be a finite number above 0, got 0.0"),
    ([*OURS, "--model.beta", "inf"], "--model.beta must be a finite number above 0, got inf"),
    (
        [*OURS, "--model.label_smoothing", "0.5"],
        "--model.label_smoothing must be at least 0 and below 0.5, got 0.5",
    ),
    (
        [*OURS, "--model.label_smoothing", "-0.1"],
        "--model.label_smoothing must be at least 0 and below 0.5, got -0.1",
    ),
    ([*OURS, "--train.micro_batch_size", "0"], "--train.micro_batch_size must be at least 1, got 0."),
    ([*OURS, "--data.max_samples", "0"], "--data.max_samples must be at least 1, got 0."),
    (
        [*OURS, "--model.nll_loss_coef", "nan"],
        "--model.nll_loss_coef must be a finite number of at least 0, got nan: it is the weight of",
    ),
    (
        [*OURS, "--model.aux_loss_coef", "-0.1"],
        "--model.aux_loss_coef must be a finite number of at least 0, got -0.1",
    ),
    # The reference's log-probabilities: these flags belong to each loss, but aren't its options.
    (
        ["--loss", "dpo", "--focalpo.precompute_ref"],
        "--focalpo.precompute_ref is a flag of --loss focalpo, got True with --loss dpo. Give --loss "
        "focalpo, or remove --focalpo.precompute_ref.",
    ),
    (
        ["--loss", "hinge", "--focalpo.precompute_ref"],
        "--focalpo.precompute_ref is a flag of --loss focalpo, got True with --loss hinge.",
    ),
    (
        [*OURS, "--focalpo.precompute_dir", "kept"],
        "--focalpo.precompute_dir needs --focalpo.precompute_ref, got only 'kept'. Add "
        "--focalpo.precompute_ref, or remove --focalpo.precompute_dir.",
    ),
    (
        [*OURS, "--focalpo.precompute"],
        "unknown flag --focalpo.precompute, got '--focalpo.precompute'; did you mean",
    ),
    # Balanced batches: a flag of each loss, and settings that make a pair's loss depend on its
    # batch.
    (
        [*OURS, "--focalpo.balanced_batches", "--model.aux_loss_coef", "0.01"],
        "--focalpo.balanced_batches can't be combined with --model.aux_loss_coef, got 0.01: the "
        "routers' loss is computed from all tokens of a micro-batch. Remove one of the two.",
    ),
    (
        ["--loss", "hinge", "--focalpo.balanced_batches"],
        "--focalpo.balanced_batches is a flag of --loss focalpo, got True with --loss hinge.",
    ),
    ([*OURS, "--focalpo.balanced"], "unknown flag --focalpo.balanced, got '--focalpo.balanced'; did you mean"),
    # argparse itself would expand each of these to the one flag that begins like this.
    ([*OURS, "--focalpo.gam", "0.1"], "unknown flag --focalpo.gam, got '--focalpo.gam'; did you mean '--focalpo.gamma'?"),
    ([*OURS, "--focalpo.g=0.1"], "unknown flag --focalpo.g, got '--focalpo.g=0.1'"),
    (["--los", "focalpo"], "unknown flag --los, got '--los'; did you mean '--loss'?"),
    # Misspelt.
    ([*OURS, "--focalpo.gama", "0.1"], "unknown flag --focalpo.gama, got '--focalpo.gama'; did you mean '--focalpo.gamma'?"),
    # Flags that need CUDA, with any loss.
    ([*OURS, "--ds.packing_samples"], "--ds.packing_samples must be left out without CUDA, got it on a CPU"),
    (["--ds.packing_samples"], "--ds.packing_samples must be left out without CUDA, got it on a CPU"),
    ([*OURS, "--ds.use_liger_kernel"], "--ds.use_liger_kernel must be left out without CUDA, got it on a CPU"),
    (
        [*OURS, "--ds.attn_implementation", "flash_attention_2"],
        "--ds.attn_implementation must be eager or sdpa without CUDA, got 'flash_attention_2' on a CPU",
    ),
]  # fmt: skip

# Each differs from a refused one only in the refused part.
LET_THROUGH = [
    [],
    ["--loss", "dpo"],
    ["--loss=focalpo"],
    [*OURS, "--focalpo.gamma", "0"],
    [*OURS, "--focalpo.gamma", "5e-2", "--focalpo.variant", "correct_exact"],
    [*OURS, "--focalpo.gamma", "1.5", "--focalpo.allow_reversed"],
    [*OURS, "--focalpo.gamma", "1.5", "--focalpo.variant", "incorrect"],
    [
        *OURS,
        "--model.beta",
        "0.01",
        "--model.label_smoothing",
        "0.49",
        "--model.nll_loss_coef",
        "0.2",
    ],
    ["--loss", "hinge", "--hinge.offset", "2"],
    ["--loss", "hinge", "--hinge.precompute_ref"],
    [*OURS, "--focalpo.precompute_ref", "--focalpo.precompute_dir", "kept"],
    [*OURS, "--model.aux_loss_coef", "0.01"],
    # A mean by sequence.
    ["--loss", "hinge", "--hinge.balanced_batches", "--model.nll_loss_coef", "0.2"],
    # OpenRLHF's own loss is unaffected, even with values that our loss would refuse.
    ["--model.ipo_enable"],
    ["--model.beta", "0"],
    ["--model.label_smoothing", "0.7"],
    # OpenRLHF's own abbreviations.
    [*OURS, "--loc", "0", "--logger.logging", "2"],
]


@pytest.fixture(scope="module")
def ends(commands: Callable, hinge_package: Path) -> dict[tuple[str, ...], tuple[int, str]]:
    argvs = [["--help"]] + [[*ACCEPTED, *argv] for argv in (*LET_THROUGH, *(r[0] for r in REFUSED))]
    return dict(zip(map(tuple, argvs), commands(argvs, hinge_package), strict=True))


def name(argv: object) -> str | None:
    return " ".join(argv) or "nothing" if isinstance(argv, list) else ""


@shares_ends
@pytest.mark.parametrize("argv, message", REFUSED, ids=name)
def test_refused(ends: dict, argv: list[str], message: str):
    """With argparse's exit code and form, before the model is looked up."""
    code, output = ends[(*ACCEPTED, *argv)]
    assert code == 2, output
    assert f"train_dpo.py: error: {of_host([message])[0]}" in output
    assert output.startswith("usage: train_dpo.py")
    assert LOOKS_FOR_MODEL not in output


@shares_ends
@pytest.mark.parametrize("argv", LET_THROUGH, ids=name)
def test_let_through(ends: dict, argv: list[str]):
    """Only the model is wrong, and it is looked up after everything is parsed."""
    code, output = ends[(*ACCEPTED, *argv)]
    assert code == 1, output
    assert LOOKS_FOR_MODEL in output and "couldn't find them in the cached files" in output
    assert "usage:" not in output


@shares_ends
def test_help(ends: dict):
    code, output = ends[("--help",)]
    assert code == 0
    own, ours = output.split("\nfocalpo_plugins:\n")
    assert of_host(["--model.beta"])[0] in own and "--loss" not in own.replace(
        "[--loss {dpo,focalpo,hinge}]", ""
    )
    for text in (
        "--loss {dpo,focalpo,hinge}",
        "Focusing parameter; 0 is DPO (default: 0.05)",
        "Modulating factor: correct, correct_exact, incorrect (default: correct)",
        "--focalpo.allow_reversed",
        "Option of the loss hinge (default: 1.0)",
        "--hinge.precompute_ref",
        "Folder for the file of precompute_ref (default: OpenRLHF's output folder)",
    ):
        assert text in ours, output


# A flag of OpenRLHF's that is one word, and one that in newer releases has the word before a dot.
DOTTED = of_host(["--model.beta"]) == ["--model.beta"]
CLASHES = ["optim", "muon", "local_rank"] if DOTTED else ["pretrain", "beta", "local_rank", "model"]
CLASHING = """
import torch
from focalpo_plugins import hookimpl


def loss(margins, lr=1.0):
    return torch.relu(lr - margins)


@hookimpl
def register_losses(register):
    for name in {names}:
        register(name, loss, options={{"lr": 1.0}})
"""


@pytest.fixture(scope="module")
def clashing(commands: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """``clashing(*argv)`` with a package whose losses have the first words of OpenRLHF's flags as
    names."""
    folder = tmp_path_factory.mktemp("clashing")
    names = [*CLASHES, "apart"]
    (folder / "clashing_losses.py").write_text(CLASHING.format(names=names))
    info = folder / "clashing_losses-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: clashing-losses\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[focalpo_plugins]\nclashing = clashing_losses\n")
    return lambda argvs: commands([[*ACCEPTED, *argv] for argv in argvs], folder)


def test_a_loss_that_is_called_as_a_flag_begins(clashing: Callable):
    """OpenRLHF makes ``optim.lr`` an attribute of ``optim``, which is a word of its own.  Only a run
    that asks for such a loss stops; the host's flags, and the package's other loss, are as before."""
    refused = [["--loss", name] for name in CLASHES]
    own = ["--optim", "muon", "--muon.lr", "0.1"] if DOTTED else ["--beta", "0.2"]
    fine = [own, [*OURS, *own], ["--loss", "apart", "--apart.lr", "2", *own]]
    ends = clashing([*refused, *fine])
    for name, (code, output) in zip(CLASHES, ends, strict=False):
        assert code == 2
        assert (
            "train_dpo.py: error: argument --loss: must be a loss whose name is not the first word "
            f"of a flag of OpenRLHF, got {name!r} of the package clashing: its flags would begin "
            f"with --{name} too. Register it under another name."
        ) in output
        assert LOOKS_FOR_MODEL not in output
    for code, output in ends[len(refused) :]:
        assert (code, LOOKS_FOR_MODEL in output) == (1, True), output


@pytest.mark.parametrize(
    "runner",
    [["-m", "cProfile", "-o", "prof", "-m", "openrlhf.cli.train_dpo"],
     [str(Path(find_spec("openrlhf").origin).parent / "cli" / "train_dpo.py")]],
    ids=["profiler", "path"],
)  # fmt: skip
def test_run_by_a_profiler_or_by_its_path(tmp_path: Path, runner: list[str]):
    """`__main__` is the profiler's here, or has no name; the flags exist anyway, and so does the
    CPU mode, without which OpenRLHF can't be imported here."""
    run = run_python(*runner, "--help", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "--focalpo.gamma" in run.stdout.split("\nfocalpo_plugins:\n")[1]
    assert run.stderr.count("focalpo_plugins: CPU mode") == 1


def test_openrlhf_as_a_library_keeps_cuda():
    """For example in a notebook on a CPU: nothing in torch or argparse is replaced."""
    script = """
import argparse, sys, torch
names = ("set_device", "current_device", "synchronize")
before = [getattr(torch.cuda, name) for name in names], argparse.ArgumentParser.parse_args
import openrlhf.cli
from importlib.util import find_spec
assert find_spec("openrlhf.cli.train_dpo") is not None
print(before == ([getattr(torch.cuda, name) for name in names], argparse.ArgumentParser.parse_args))
print([name for name in sys.modules if name.startswith(("focalpo_plugins", "flash_attn_2_cuda"))])
"""
    run = run_python("-c", script)
    assert run.stdout == "True\n[]\n", run.stderr
