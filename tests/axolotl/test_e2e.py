"""`axolotl train` and the other commands, from one YAML, in real processes."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import forked
import pytest
from contract import FIRST
from harness import (
    ON_CPU,
    PLUGIN,
    SUPPORT,
    Axolotl,
    Run,
    environment,
    zero3_on_cpu,
)

# One worker makes the runs that several tests share.
shares_plain = pytest.mark.xdist_group("plain")

# These are equal up to rounding however a global batch is split; Adam makes rounding larger.
SPLIT = ("loss", "grad_norm", "rewards/margins", "focalpo/p", "focalpo/weight", "focalpo/reversed")


@pytest.fixture(scope="session")
def plain(once: Axolotl) -> Run:
    """Six steps with evaluation and two checkpoints, without a `plugins:` line, and with the
    default worker processes for the data. test_flags.py trains with Axolotl's default launcher."""
    return once.train(how={"AXOLOTL_DATASET_NUM_PROC": "2"}, eval_steps=3)


@pytest.fixture(scope="session")
def whole(once: Axolotl) -> Run:
    """The batches of `plain`, not split in two."""
    split = {"micro_batch_size": 8, "gradient_accumulation_steps": 1}
    return once.train(**split, output_dir=str(once.folder / "whole"))


def assert_same(
    a: Run, b: Run, rel: float = 0.0, names: tuple[str, ...] = ("loss", "grad_norm")
) -> None:
    assert len(a.steps(*names)) == len(b.steps(*names)) > 0
    for ours, theirs in zip(a.steps(*names), b.steps(*names), strict=True):
        assert ours == pytest.approx(theirs, rel=rel, abs=rel)


@shares_plain
def test_model_card_names_the_method(plain: Run):
    card = (plain.folder / "README.md").read_text()
    assert re.search(r"^- focalpo$", card, re.M)
    assert re.search(r"^- dpo$", card, re.M)
    assert "trained with FocalPO" in card
    assert "2501.06645" in card


@pytest.mark.xdist_group("autoload off")
@pytest.mark.releases
def test_plugins_line_without_autoload(axolotl: Axolotl, plain: Run):
    run = axolotl.train(plugins=[PLUGIN], how={"FOCALPO_AUTOLOAD": "0"})
    assert_same(run, plain)
    assert run.output.count("focalpo_plugins: active") == 1


ADAPTER = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True}
COUNTED = {"plugins": ["test_only_plugins.Forwards"]}
LOGGED = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "logits/rejected", "focalpo/p")


def forwards(run: Run) -> dict[str, Any]:
    return json.loads((run.folder / "forwards.json").read_text())


@pytest.mark.fused
@shares_plain
def test_fused(axolotl: Axolotl, plain: Run):
    """A step is two micro-batches, and each runs the policy and the reference."""
    run = axolotl.train(focalpo_fused=True, eval_steps=3, **COUNTED)
    assert_same(run, plain, rel=1e-4, names=LOGGED)
    evaluated = [[e["eval_loss"] for e in one.log if "eval_loss" in e] for one in (run, plain)]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-5)
    assert "beta=0.1 path=fused trainer=AxolotlPairwiseTrainer" in run.output
    assert "path=fused" not in plain.output
    seen = forwards(run)
    assert seen == {"forwards": [4] * 6, "backbones": [2] * 6, "reference": True}


@shares_plain
@pytest.mark.releases
@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=pytest.mark.fused)])
def test_precomputed_reference(axolotl: Axolotl, plain: Run, fused: bool):
    """No step runs a reference and none is held, although Axolotl itself loads one and keeps it."""
    run = axolotl.train(precompute_ref_log_probs=True, focalpo_fused=fused, **COUNTED)
    assert_same(run, plain, rel=1e-4 if fused else 1e-5)
    # The fused path's first step compares some tokens' logits with the whole model's.
    steps = [2 + fused, *[2] * 5]
    assert forwards(run) == {"forwards": steps, "backbones": [1] * 6, "reference": False}


@pytest.fixture(scope="session")
def adapted(once: Axolotl) -> Run:
    return once.train(**ADAPTER, **COUNTED, output_dir=str(once.folder / "adapted"))


@pytest.mark.fused
@pytest.mark.xdist_group("adapted")
@pytest.mark.parametrize("precomputed", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_lora_fused_and_precomputed(axolotl: Axolotl, adapted: Run, fused: bool, precomputed: bool):
    if not fused and not precomputed:
        run = adapted
    else:
        run = axolotl.train(
            **ADAPTER, **COUNTED, focalpo_fused=fused, precompute_ref_log_probs=precomputed
        )
        assert_same(run, adapted, rel=1e-4)
    each = 2 if precomputed else 4
    # If the reference is the same model, precomputing it was what compared some logits.
    steps = [each + (fused and not precomputed), *[each] * 5]
    assert forwards(run) == {"forwards": steps, "backbones": [1] * 6, "reference": False}


SHARED = {"focalpo_shared_prompts": True}


@shares_plain
@pytest.mark.parametrize(
    "more",
    [
        pytest.param({}, marks=pytest.mark.releases),
        pytest.param({"focalpo_fused": True}, marks=pytest.mark.fused),
        pytest.param({"precompute_ref_log_probs": True}, marks=pytest.mark.releases),
        {"gradient_checkpointing": True},
        {"attn_implementation": "eager"},
    ],
    ids=lambda more: ", ".join(more) or "alone",
)
def test_shared_prompts(axolotl: Axolotl, plain: Run, more: dict[str, Any]):
    """The losses, gradient norms and evaluations of the plain run, from fewer tokens."""
    run = axolotl.train(**SHARED, eval_steps=3, **more)
    assert_same(run, plain, rel=1e-4, names=LOGGED)
    evaluated = [[e["eval_loss"] for e in one.log if "eval_loss" in e] for one in (run, plain)]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-5)
    assert (
        "prompts=shared attention='SDPA by segments' trainer=AxolotlPairwiseTrainer" in run.output
    )
    assert "prompts=shared" not in plain.output
    for entry in run.log:
        if "loss" in entry:
            assert 0.1 < entry["focalpo/tokens_saved"] < 0.9
    for one in (run, plain):
        agree = "first step: policy and reference agree, largest margin "
        assert one.output.count(agree) == 1


@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_shared_prompts_with_an_adapter(axolotl: Axolotl, adapter: str):
    """Its reference is the same model with the adapter off. 4-bit layers round to their own grid,
    and Axolotl draws an adapter's weights anew in each run unless a plugin seeds it."""
    given = {**ADAPTER, "adapter": adapter, "plugins": ["test_only_plugins.Killed"]}
    given |= {"load_in_4bit": True} if adapter == "qlora" else {}
    plain = axolotl.train(**given, output_dir=str(axolotl.folder / "plain"))
    run = axolotl.train(**given, **SHARED)
    near = 1e-4 if adapter == "lora" else 1e-3
    assert_same(run, plain, rel=near, names=("loss", "grad_norm", "rewards/margins", "focalpo/p"))


@pytest.mark.releases
def test_lora_and_merge(axolotl: Axolotl):
    run = axolotl.train(**ADAPTER, max_steps=3)
    assert run.steps("loss")[0][0] == pytest.approx(FIRST, abs=1e-6)
    assert run.steps("loss")[-1][0] != run.steps("loss")[0][0]
    config = axolotl.config(**ADAPTER, lora_model_dir=str(run.folder))
    merged = axolotl("merge-lora", config)
    assert merged.code == 0, merged.output[-6000:]
    assert list((run.folder / "merged").glob("*.safetensors"))


def test_qlora(axolotl: Axolotl):
    run = axolotl.train(**{**ADAPTER, "adapter": "qlora"}, load_in_4bit=True, max_steps=3)
    assert run.steps("loss")[0][0] == pytest.approx(FIRST, abs=1e-6)
    assert "focalpo_plugins: active" in run.output


def test_preprocess_and_evaluate(axolotl: Axolotl):
    config = axolotl.config(eval_steps=3)
    prepared = axolotl("preprocess", config)
    assert prepared.code == 0, prepared.output[-6000:]
    assert list((axolotl.folder / "prepared").iterdir())
    evaluated = axolotl("evaluate", config)
    assert evaluated.code == 0, evaluated.output[-6000:]
    # Axolotl's evaluate scores the given policy, which is still the reference.
    assert "focalpo_plugins: active" in evaluated.output
    losses = re.findall(r"eval_loss: ([\d.]+)", evaluated.output)
    assert losses and float(losses[-1]) == pytest.approx(FIRST, abs=1e-4)


@pytest.mark.releases
def test_third_partys_loss(axolotl: Axolotl, hinge_package: Path):
    """relu(offset - 0) at the first step, with the package's own key."""
    run = axolotl.train(
        rl="hinge",
        hinge_offset=0.75,
        focalpo_gamma=None,
        focalpo_variant=None,
        max_steps=3,
        how={"path": [hinge_package]},
    )
    assert run.steps("loss")[0][0] == pytest.approx(0.75, abs=1e-6)
    assert "loss=hinge offset=0.75" in run.output
    assert "hinge/p" in run.log[0] and "hinge/weight" not in run.log[0]


FSDP_2 = {
    "fsdp_version": 2,
    "fsdp_config": {
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "state_dict_type": "FULL_STATE_DICT",
        "reshard_after_forward": True,
        "offload_params": False,
        "cpu_ram_efficient_loading": False,
    },
}


@shares_plain
@pytest.mark.parametrize(
    "path",
    [
        pytest.param({}, id="plain"),
        pytest.param({"focalpo_fused": True}, id="fused", marks=pytest.mark.fused),
        pytest.param({**SHARED, "focalpo_balanced_batches": True}, id="shared and balanced"),
    ],
)
@pytest.mark.parametrize(
    "how, wrote", [
        pytest.param("zero3", "zero_to_fp32.py", marks=pytest.mark.releases),
        ("fsdp2", "pytorch_model_fsdp.bin"),
    ],
)  # fmt: skip
def test_two_ranks_agree_with_one_process(
    axolotl: Axolotl, whole: Run, how: str, wrote: str, path: dict[str, bool]
):
    """Two ranks of four pairs each, against eight pairs at once in one process; DeepSpeed or FSDP
    wrote the checkpoint."""
    plugin, sharded = {
        "zero3": ("GlooOnCPU", {"deepspeed": zero3_on_cpu(axolotl.folder)}),
        "fsdp2": ("FSDPOnCPU", FSDP_2),
    }[how]
    run = axolotl.train(
        ranks=2,
        gradient_accumulation_steps=1,
        plugins=[f"test_only_plugins.{plugin}"],
        how=ON_CPU,
        **sharded,
        **path,
    )
    assert (run.checkpoints[-1] / wrote).exists()
    assert run.output.count("focalpo_plugins: active") == 1
    assert run.steps("loss")[0][0] == pytest.approx(FIRST, abs=1e-6)
    assert_same(run, whole, rel=1e-3, names=SPLIT)


@shares_plain
def test_one_batch_of_eight_agrees_with_two_of_four(whole: Run, plain: Run):
    assert_same(whole, plain, rel=1e-3, names=SPLIT)


def test_run_by_a_profiler_and_by_its_path(axolotl: Axolotl):
    """`__main__` is the profiler's here and has no name. tests/test_autoload.py tests each case
    separately."""
    config = axolotl.config(max_steps=1, save_steps=1)
    train = str(Path(find_spec("axolotl").origin).parent / "cli" / "train.py")
    done = subprocess.run(
        [sys.executable, "-m", "cProfile", "-o", "prof", train, str(config)],
        env=environment(),
        cwd=axolotl.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    run = Run(done.returncode, done.stdout, axolotl.folder / "out")
    assert run.code == 0, run.output[-4000:]
    assert run.steps("loss")[0][0] == pytest.approx(FIRST, abs=1e-6)


def test_a_notebook_that_loads_all_before_it_trains(axolotl: Axolotl):
    """One config object; `rl` and the keys change between two calls. Then both are trained,
    FocalPO's first, although the other config was loaded last. DPO's garbage collections look at
    everything that Axolotl imports; FocalPO's at less than a tenth of it, and after a run all is as
    before."""
    folders = {name: str(axolotl.folder / name) for name in ("fused", "dpo", "plain")}
    configs = {
        "fused": {"rl": "focalpo", "focalpo_gamma": 1.0, "focalpo_fused": True},
        "dpo": {"rl": "dpo", "focalpo_gamma": None, "focalpo_fused": None},
        "plain": {"rl": "focalpo", "focalpo_gamma": 0.05, "focalpo_fused": False},
    }
    script = axolotl.folder / "notebook.py"
    script.write_text(
        f"""
import gc
import sys
sys.path.append({str(SUPPORT)!r})
import yaml

gc.unfreeze()  # what the process is forked off has imported
from axolotl.cli.config import load_cfg
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.train import do_train
from axolotl.utils.dict import DictDefault

if __name__ == "__main__":
    written = DictDefault(yaml.safe_load(open({str(axolotl.config(max_steps=1, save_steps=1))!r})))
    written["plugins"] = [{PLUGIN!r}, "test_only_plugins.Garbage"]
    del written["focalpo_variant"]
    loaded = []
    for name, keys in {configs!r}.items():
        written.update(keys, output_dir={folders!r}[name])
        loaded.append(load_cfg(written))
        written["datasets"] = [dict(data) for data in written["datasets"]]  # as before Axolotl
    for cfg in reversed(loaded):
        do_train(cfg, TrainerCliArgs())
        assert gc.get_freeze_count() == 0
"""
    )
    code, output, _ = forked.run(str(script), [], axolotl.folder, merged=True)
    assert code == 0, output[-4000:]
    first = {name: Run(0, "", Path(folder)).steps("loss")[0][0] for name, folder in folders.items()}
    expected = {"fused": math.log(2) / 2, "dpo": math.log(2), "plain": FIRST}
    assert first == pytest.approx(expected, abs=1e-6)
    active = [line for line in output.splitlines() if "focalpo_plugins: active" in line]
    assert ["path=fused" in line for line in active] == [False, True]
    looked_at = {
        name: json.loads((Path(folder) / "garbage.json").read_text())
        for name, folder in folders.items()
    }
    assert max(looked_at["plain"] + looked_at["fused"]) < min(looked_at["dpo"]) / 10


@pytest.mark.releases
def test_refused_by_the_command_itself(axolotl: Axolotl):
    run = axolotl("train", axolotl.config(focalpo_gama=0.1))
    assert run.code != 0
    assert "unknown key focalpo_gama, got 0.1; did you mean 'focalpo_gamma'?" in run.output
    assert "Loading model" not in run.output
    assert not run.folder.exists() or not run.checkpoints


@pytest.mark.releases
def test_another_plugins_trainer_is_refused_before_the_model_loads(axolotl: Axolotl):
    run = axolotl("train", axolotl.config(plugins=["test_only_plugins.OtherTrainer"]))
    assert run.code != 0
    assert (
        "plugins lists test_only_plugins.OtherTrainer, whose trainer DPOTrainer would run"
        in run.output
    )
    assert not run.checkpoints


def test_the_tiny_run_learns(axolotl: Axolotl):
    """The whole run. At its start policy and reference are equal, so every margin is 0 and the
    strict comparison counts no pair as ranked right; the honest start is chance, 1/2, with a
    standard error over 304 pairs of 0.029. 0.65 is five of these above it."""
    run = axolotl("train", axolotl.config(whole=True))
    assert run.code == 0, run.output[-6000:]
    held_out = [entry for entry in run.log if "eval_loss" in entry]
    assert [entry["step"] for entry in held_out] == [0, 20, 40, 60]
    assert held_out[0]["eval_loss"] == pytest.approx(FIRST, abs=1e-5)
    assert held_out[0]["eval_rewards/margins"] == 0
    assert held_out[-1]["eval_rewards/accuracies"] > 0.65
    margins = [entry["eval_rewards/margins"] for entry in held_out]
    assert margins == sorted(margins)
    assert margins[-1] > 0.2
    assert held_out[-1]["eval_loss"] < held_out[0]["eval_loss"] - 0.05
    assert (
        held_out[-1]["eval_focalpo/margin_correct"]
        > 0
        > held_out[-1]["eval_focalpo/margin_incorrect"]
    )
