"""Whole runs of OpenRLHF's command, through the launchers that people use."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from contract import FIRST
from harness import SUPPORT, run_python

# One worker makes the runs that several tests share.
shares_runs = pytest.mark.xdist_group("three launchers")

OURS = ("--loss", "focalpo")
NAMES = {"p", "weight", "reversed", "margin_correct", "margin_incorrect"}


def finished(run):
    assert run.returncode == 0, run.output
    return run


@pytest.fixture(scope="module")
def zero3(train: Callable, few: Path):
    """Four epochs with ZeRO-3 on two ranks, an evaluation after each, no accumulation."""
    evaluate = ("--eval.dataset", str(few / "test.jsonl"), "--eval.split", "train")
    return finished(
        train(
            *OURS, *evaluate, "--ds.zero_stage", "3", "--train.micro_batch_size", "4",
            "--train.max_epochs", "4", "--lr_scheduler", "constant",
            launcher="torchrun", ranks=2,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def checkpointed(train: Callable):
    """Two epochs with ZeRO-2 on two ranks under DeepSpeed's launcher, accumulating over two."""
    return finished(
        train(
            *OURS, "--ckpt.save_steps", "3", "--train.max_epochs", "2", "--lr_scheduler", "constant",
            launcher="deepspeed", ranks=2,
        )
    )  # fmt: skip


WITH_NLL = (
    "--model.label_smoothing",
    "0.1",
    "--model.nll_loss_coef",
    "0.2",
    "--ds.zero_stage",
    "2",
)


@pytest.fixture(scope="module")
def dpo(train: Callable):
    """OpenRLHF's own loss, with this package installed, on one rank, and another loss."""
    return finished(train("--loss", "dpo", *WITH_NLL, launcher="python"))


# No mark: under DeepSpeed before 0.19, ZeRO-2 on two CPU ranks and schedules of an adapter fail with
# torch 2.13 for any loss; the runs on ZeRO-3 cover it there.
@shares_runs
def test_deepspeeds_launcher(checkpointed):
    """Two ranks, which accumulate; the contract has the other launcher."""
    assert checkpointed.steps("train/")[1]["loss"] == pytest.approx(FIRST, abs=1e-5)
    (line,) = checkpointed.said("focalpo_plugins: active")
    assert "loss=focalpo gamma=0.05 variant=correct " in line


@shares_runs
@pytest.mark.releases
def test_warns_once_of_the_cpu(zero3, dpo):
    for run in (zero3, dpo):
        assert len(run.said("focalpo_plugins: CPU mode.")) == 1


@shares_runs
@pytest.mark.releases
def test_learns(zero3):
    """The accuracy rises from the first epoch to the last, on the same 40 pairs, 3 with swapped labels."""
    accuracy = [step["acc"] for _, step in sorted(zero3.steps("train/").items())]
    first, last = sum(accuracy[:5]) / 5, sum(accuracy[15:]) / 5
    assert last > max(0.65, first + 0.3)


@shares_runs
def test_diagnostics_are_of_all_accumulated_batches(zero3, checkpointed):
    """The same pairs, once as two batches of four and once as four batches of two: the diagnostics
    of a step agree, up to bf16's rounding of differently padded batches."""
    whole, accumulated = zero3.steps("train/focalpo/"), checkpointed.steps("train/focalpo/")
    for step in range(1, 6):
        assert accumulated[step]["p"] == pytest.approx(whole[step]["p"], abs=0.01)
    assert len({round(whole[step]["p"], 2) for step in range(1, 6)}) > 1


@shares_runs
@pytest.mark.releases
def test_the_same_batch_however_it_is_split(train_many: Callable, zero3):
    """Eight pairs at once, as two batches of four, and as four on each of two ranks: the same losses,
    gradient norms and diagnostics, to what bf16 makes of differently padded batches.

    OpenRLHF's `loss` is that of the last batch, and its `loss_mean` that of a step on one rank."""
    flags = (*OURS, "--ds.zero_stage", "3", "--lr_scheduler", "constant", "--train.max_epochs", "4")
    runs = train_many({size: (*flags, "--train.micro_batch_size", size) for size in ("8", "4")})
    whole = zero3.steps("train/")
    for run in runs.values():
        steps = finished(run).steps("train/")
        assert sorted(steps) == sorted(whole)
        for step in range(1, 6):
            ours, theirs = steps[step], whole[step]
            assert ours["loss_mean"] == pytest.approx(theirs["loss"], abs=0.005), step
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.05), step
            for name in ("p", "weight", "reversed"):
                name = f"focalpo/{name}"
                assert ours[name] == pytest.approx(theirs[name], abs=0.005), (step, name)


@shares_runs
def test_diagnostics_in_evaluation_and_progress_bar(zero3):
    evaluated = zero3.steps("eval/")
    assert sorted(evaluated) == [5, 10, 15, 20]
    for step in evaluated.values():
        assert {name for name in NAMES if f"focalpo/{name}" in step} >= NAMES - {"margin_incorrect"}
        assert step["focalpo/margin_correct"] > 0 >= step.get("focalpo/margin_incorrect", 0)
    bars = [line for line in zero3.stderr.replace("\r", "\n").split("\n") if "focalpo/p=" in line]
    assert any("Eval stage" in bar for bar in bars) and any("Train step" in bar for bar in bars)


@shares_runs
@pytest.mark.releases
def test_saved_model_loads(zero3, tiny: Path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained = AutoModelForCausalLM.from_pretrained(zero3.folder / "out", dtype=torch.float32)
    start = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(zero3.folder / "out")(
        "What colour is it?", return_tensors="pt"
    )
    with torch.no_grad():
        logits = trained(**ids).logits
        assert torch.isfinite(logits).all()
        assert (logits - start(**ids).logits).abs().max() > 0.1


def same(ours, others, *, less: str = "") -> None:
    """Each step that OpenRLHF logged, and the saved weights, to the last bit."""
    logged = {
        step: {tag: value for tag, value in values.items() if not less or less not in tag}
        for step, values in ours.steps().items()
    }
    assert len(logged) == 5
    assert logged == others.steps()
    weights = [(run.folder / "out" / "model.safetensors").read_bytes() for run in (ours, others)]
    assert weights[0] == weights[1]


@shares_runs
@pytest.mark.releases
def test_gamma_zero_is_dpo(train: Callable, dpo, tmp_path: Path):
    """In addition, torch is imported before OpenRLHF's command is known."""
    (tmp_path / "sitecustomize.py").write_text("import torch\n")
    gamma_0 = finished(
        train(*OURS, "--focalpo.gamma", "0", *WITH_NLL, launcher="python", path=[tmp_path])
    )
    assert len(gamma_0.said("focalpo_plugins: active. loss=focalpo gamma=0.0")) == 1
    same(gamma_0, dpo, less="focalpo/")


@shares_runs
@pytest.mark.releases
def test_dpo_is_untouched(train: Callable, dpo):
    without_us = finished(
        train(*WITH_NLL, module="openrlhf_on_a_cpu", path=[SUPPORT], FOCALPO_AUTOLOAD="0")
    )
    same(dpo, without_us)
    assert not dpo.said("focalpo_plugins: active")


@shares_runs
def test_stop_and_resume(train: Callable, checkpointed, tmp_path: Path):
    """A run resumed at step 3, in the middle of an epoch, comes to the same end. 40 pairs divide by
    the batch of 8; otherwise OpenRLHF skips pairs when it resumes."""
    shutil.copytree(
        checkpointed.folder / "checkpoints" / "global_step3",
        tmp_path / "checkpoints" / "global_step3",
    )
    (tmp_path / "checkpoints" / "latest").write_text("global_step3")
    two_epochs = ("--train.max_epochs", "2", "--lr_scheduler", "constant")
    resumed = finished(train(*OURS, "--ckpt.load_enable", *two_epochs, ranks=2, folder=tmp_path))
    assert "consumed_samples: 24" in resumed.stdout
    whole, rest = checkpointed.steps("train/"), resumed.steps("train/")
    assert sorted(whole) == list(range(1, 11)) and sorted(rest) == list(range(4, 11))
    for step, values in rest.items():
        for tag in ("loss", "focalpo/p", "chosen_reward"):
            assert values[tag] == pytest.approx(whole[step][tag], rel=1e-6), (step, tag)


def test_lora(train: Callable):
    """An adapter starts as the reference, so the first loss is that of margin 0; then it learns."""
    run = finished(train(*OURS, "--ds.lora.rank", "4", "--train.max_epochs", "2"))
    losses = [step["loss"] for _, step in sorted(run.steps("train/").items())]
    assert len(losses) == 10
    assert losses[0] == pytest.approx(FIRST, abs=1e-5)
    assert sum(losses[5:]) / 5 < FIRST - 0.005
    assert (run.folder / "out" / "adapter_model.safetensors").stat().st_size > 10_000


@pytest.fixture
def experts(tiny: Path, tmp_path: Path) -> Path:
    """An untrained mixture of experts that reads the tiny model's tokens."""
    import torch
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    tokenizer.save_pretrained(tmp_path / "experts")
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        num_experts_per_tok=1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "experts")
    return tmp_path / "experts"


def test_auxiliary_loss(train: Callable, experts: Path):
    """OpenRLHF adds its load-balancing loss to our loss as to its own: with gamma 0 everything is
    equal to the last bit, and without the auxiliary loss it isn't."""
    flags = ("--model.model_name_or_path", str(experts), "--model.aux_loss_coef")
    dpo = finished(train("--loss", "dpo", *flags, "0.5"))
    gamma_0 = finished(train(*OURS, "--focalpo.gamma", "0", *flags, "0.5"))
    without = finished(train(*OURS, "--focalpo.gamma", "0", *flags, "0"))
    same(gamma_0, dpo, less="focalpo/")
    outs = [(run.folder / "out" / "model.safetensors").read_bytes() for run in (gamma_0, without)]
    assert outs[0] != outs[1]


def test_shared_prompts_with_experts(train: Callable, experts: Path):
    """OpenRLHF asks for the routers' loss with any coefficient."""
    flags = ("--focalpo.shared_prompts", "--model.model_name_or_path", str(experts))
    run = train(*OURS, *flags)
    assert run.returncode == 1 and not run.steps()
    (line,) = run.said("--focalpo.shared_prompts can't be combined with a mixture of experts")
    assert line.endswith("Remove --focalpo.shared_prompts.")


@pytest.fixture
def in_blocks_of_64(tiny: Path, tmp_path: Path) -> Path:
    """An untrained model of sizes that bitsandbytes' 4-bit kernels for a CPU can handle: not the
    tiny one's 352."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(tiny / "model", tmp_path / "model")
    config = AutoConfig.from_pretrained(tiny / "model", hidden_size=128, intermediate_size=128)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_wrapper_qlora_and_wandb(train: Callable, in_blocks_of_64: Path):
    """The wrapper with the autoload off, 4-bit weights under LoRA, the reference offloaded, and W&B,
    which OpenRLHF then logs to instead of TensorBoard."""
    run = finished(
        train(
            *OURS, "--model.label_smoothing", "0.1",
            "--ds.load_in_4bit", "--ds.lora.rank", "4", "--ref.offload",
            "--logger.wandb.key", "none", "--model.model_name_or_path", str(in_blocks_of_64),
            module="focalpo_plugins.openrlhf.train_dpo",
            TORCH_DEVICE_BACKEND_AUTOLOAD="0", WANDB_MODE="offline",
        )
    )  # fmt: skip
    (line,) = run.said("focalpo_plugins: active")
    assert "label_smoothing=0.1" in line
    (log,) = run.folder.glob("wandb/offline-run-*/run-*.wandb")
    for name in NAMES:
        assert f"train/focalpo/{name}".encode() in log.read_bytes()
    assert (run.folder / "out" / "adapter_config.json").is_file()
    assert (run.folder / "out" / "adapter_model.safetensors").stat().st_size > 10_000


@pytest.fixture(scope="module")
def host_source() -> Path:
    import importlib.util

    return Path(importlib.util.find_spec("openrlhf").origin).parent


# An edit of OpenRLHF's trainer, the message about it, and whether a model has been loaded by then.
CONSTRUCTION = "self.loss_fn = DPOLoss("
MOVED = {
    "constructed elsewhere": (
        [(CONSTRUCTION, "self.loss_fn = make_loss(")],
        "def make_loss(*args):\n    return DPOLoss(*args)\n",
        "DPOTrainer.__init__ constructs no DPOLoss",
        False,
    ),
    "constructed by another name": (
        [(CONSTRUCTION, "self.loss_fn = DPOLoss and Renamed(")],
        "from openrlhf.models import DPOLoss as Renamed\n",
        "its loss_fn is DPOLoss",
        True,
    ),
    "called by another name": (
        [(CONSTRUCTION, "self.other = Renamed(0.1)\n        self.loss_fn = DPOLoss(")]
        + [("preference_loss, chosen_reward, reject_reward = self.loss_fn(",)
           + ("preference_loss, chosen_reward, reject_reward = self.other(",)],
        "from openrlhf.models import DPOLoss as Renamed\n",
        "it called the loss 0 times for 1 batch",
        True,
    ),
}  # fmt: skip


CLASS = "\nclass DPOTrainer("


def edit_copy(source: Path, folder: Path, module: str, edits: list[tuple[str, str]]) -> None:
    """A copy of OpenRLHF in ``folder``, with one module of it edited."""
    shutil.copytree(source, folder / "openrlhf", ignore=shutil.ignore_patterns("__pycache__"))
    text = (folder / "openrlhf" / module).read_text()
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / "openrlhf" / module).write_text(text)


@pytest.mark.releases
@pytest.mark.parametrize("how", MOVED)
def test_a_host_that_moves_its_loss(train: Callable, host_source: Path, tmp_path: Path, how: str):
    """A copy of OpenRLHF, edited as a later release might be, first on the path: the run stops."""
    edits, added, message, model_loaded = MOVED[how]
    added = f"\n{added}\n{CLASS}"
    edit_copy(host_source, tmp_path, "trainer/dpo_trainer.py", [*edits, (CLASS, added)])
    run = train(*OURS, path=[tmp_path])
    assert run.returncode == 1
    versions = f"focalpo_plugins {version('focalpo_plugins')} can't train with openrlhf {version('openrlhf')}"
    assert f"RunError: {versions}: {message}" in run.stderr
    assert "under the name focalpo" in run.stderr
    assert ("LlamaForCausalLM" in run.stdout) == model_loaded
    assert not (run.folder / "out" / "model.safetensors").exists()


@pytest.mark.releases
def test_other_commands_are_left_alone(tmp_path: Path):
    """Only this command is watched."""
    package = tmp_path / "openrlhf" / "cli"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    for command in ("train_sft", "train_dpo"):
        (package / f"{command}.py").write_text(
            "import argparse, sys, torch\n"
            "print(hasattr(argparse.ArgumentParser.parse_args, '__wrapped__'))\n"
            "print('focalpo_plugins' in sys.modules, torch.cuda.current_device.__name__)\n"
        )
    ends = [
        run_python("-m", f"openrlhf.cli.{command}", path=tmp_path).stdout.split()
        for command in ("train_sft", "train_dpo")
    ]
    assert ends == [["False", "False", "current_device"], ["True", "True", "<lambda>"]]


NO_MODEL = (
    "--model.model_name_or_path",
    "nobody/no-such-model",
    "--ds.attn_implementation",
    "eager",
)
PARSES = "    args = parser.parse_args()"


@pytest.mark.releases
def test_a_host_with_a_loss_flag_of_its_own(commands: Callable, host_source: Path, tmp_path: Path):
    """Its own flag keeps working, and a command that asks for our loss gets a message."""
    own_flag = '    parser.add_argument("--loss", default="dpo")\n' + PARSES
    edit_copy(host_source, tmp_path, "cli/train_dpo.py", [(PARSES, own_flag)])
    (code, output), (code_without, output_without) = commands(
        [[*NO_MODEL, *OURS], NO_MODEL], tmp_path
    )
    assert code == 2
    assert (
        "OpenRLHF already has --loss, which focalpo_plugins would add. Install openrlhf 0.9.10 to 0.11.2"
        in output
    )
    assert f"with openrlhf {version('openrlhf')}" in output
    assert (code_without, "openrlhf/models/actor.py" in output_without) == (1, True)


@pytest.mark.releases
def test_a_host_that_ignores_unknown_flags(commands: Callable, host_source: Path, tmp_path: Path):
    """``parse_known_args`` would silently drop our flags if they were not in its parser."""
    known = "    args, _ = parser.parse_known_args()"
    edit_copy(host_source, tmp_path, "cli/train_dpo.py", [(PARSES, known)])
    (code, output), (code_good, output_good) = commands(
        [[*NO_MODEL, *OURS, "--focalpo.gamma", "-1"], [*NO_MODEL, *OURS]], tmp_path
    )
    assert code == 2 and "--focalpo.gamma must be a finite number of at least 0" in output
    assert (code_good, "openrlhf/models/actor.py" in output_good) == (1, True)
