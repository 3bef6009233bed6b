"""What LLaMA-Factory trains with our losses that other hosts don't have, in its real processes."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
from contract import FIRST
from harness import Run, environment, run_python, zero3_on_cpu
from llamafactory_run import LORA, LlamaFactory
from safetensors.torch import load_file

NAMES = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "logps/rejected")


def losses(run: Run) -> list[float]:
    return [entry["loss"] for entry in history(run) if "loss" in entry]


def history(run: Run) -> list[dict[str, float]]:
    return json.loads((run.folder / "trainer_state.json").read_text())["log_history"]


def same(run: Run, other: Run) -> None:
    """To the last bit: what is logged of each step, and the weights that are saved."""
    steps = [[entry for entry in history(each) if "loss" in entry] for each in (run, other)]
    assert len(steps[0]) == 5
    for ours, theirs in zip(*steps, strict=True):
        assert {name: ours[name] for name in NAMES} == {name: theirs[name] for name in NAMES}
    names = [path.name for path in run.folder.glob("*.safetensors")]
    assert names == [path.name for path in other.folder.glob("*.safetensors")] and len(names) == 1
    weights = [load_file(each.folder / names[0]) for each in (run, other)]
    assert weights[0].keys() == weights[1].keys()
    assert all(weights[0][key].equal(weights[1][key]) for key in weights[0])


# For each, the host's own run that gamma 0 has to equal.
OWN: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": LORA,
    "4 bits": {**LORA, "quantization_bit": 4, "quantization_method": "bnb"},
    "frozen layers": {"finetuning_type": "freeze", "freeze_trainable_layers": 2},
    "label smoothing": {"dpo_label_smoothing": 0.2},
    "an SFT term": {"pref_ftx": 0.5},
    "LD-DPO": {"ld_alpha": 0.5},
}  # fmt: skip
# What the host says of a case that it could also leave out.
SAID = {"4 bits": "Quantizing model to 4 bit with bitsandbytes."}


@pytest.mark.releases
@pytest.mark.parametrize("case", OWN)
def test_gamma_zero_is_the_hosts_own(llamafactory: LlamaFactory, case: str):
    own = {"pref_loss": "sigmoid", "focalpo_gamma": None, "output_dir": "own"}
    theirs = llamafactory.train(**OWN[case] | in_folder(llamafactory, own))
    ours = llamafactory.train(**OWN[case], focalpo_gamma=0.0)
    assert "focalpo_plugins: active. loss=focalpo gamma=0.0" in ours.output
    assert "focalpo_plugins: " not in theirs.output
    assert SAID.get(case, "") in ours.output
    same(ours, theirs)
    saved = {path.name for path in ours.folder.glob("adapter_*")}
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    assert saved == (adapter if case in ("LoRA", "4 bits") else set())


@pytest.mark.releases
@pytest.mark.parametrize("margin", ["simpo", "orpo"])
def test_gamma_zero_without_a_reference(llamafactory: LlamaFactory, margin: str):
    own = {"pref_loss": margin, "focalpo_gamma": None, "output_dir": "own"}
    theirs = llamafactory.train(**in_folder(llamafactory, own))
    ours = llamafactory.train(focalpo_margin=margin, focalpo_gamma=0.0)
    assert f" beta=0.1 margin={margin} " in ours.output
    same(ours, theirs)
    focal = llamafactory.train(focalpo_margin=margin)
    assert losses(focal) != losses(theirs)


def in_folder(host: LlamaFactory, changes: dict[str, Any]) -> dict[str, Any]:
    return {**changes, "output_dir": str(host.folder / changes["output_dir"])}


@pytest.mark.releases
@pytest.mark.parametrize("key", ["ref_model", "adapter_name_or_path"])
def test_another_model_that_is_not_there(llamafactory: LlamaFactory, tmp_path: Path, key: str):
    """The last line has the path, and the name that is near."""
    (tmp_path / "model").mkdir()
    run = llamafactory(llamafactory.config(**LORA, **{key: str(tmp_path / "modle")}, max_steps=1))
    assert run.code != 0
    words = f"There is no such file or folder: {key} '{tmp_path}/modle' ('model' is beside it)"
    assert words in run.output.strip().splitlines()[-1]


@pytest.mark.releases
def test_adapters_that_are_trained_on(llamafactory: LlamaFactory):
    """Their reference is the model without them, so the margins aren't 0 at first, and nothing is
    wrong with that."""
    run = llamafactory.train(**LORA)
    more = {"adapter_name_or_path": str(run.folder), "output_dir": str(llamafactory.folder / "2")}
    further = llamafactory.train(finetuning_type="lora", max_steps=1, **more)
    assert losses(run)[0] == pytest.approx(FIRST, abs=1e-5)
    assert losses(further)[0] != pytest.approx(FIRST, abs=1e-5)
    assert "first step" in run.output and "first step" not in further.output


def test_the_file_is_refused_without_this_package(llamafactory: LlamaFactory):
    """By the host itself, whose loss would be DPO's."""
    run = llamafactory(llamafactory.config(), FOCALPO_AUTOLOAD="0")
    assert run.code != 0
    assert "Some keys are not used by the HfArgumentParser: ['focalpo_gamma']" in run.output


def test_keys_after_the_file(llamafactory: LlamaFactory):
    run = llamafactory.train("focalpo_gamma=0.1", "max_steps=1")
    assert "loss=focalpo gamma=0.1 " in run.output
    assert losses(run)[0] == pytest.approx(2**-0.1 * math.log(2), abs=1e-5)
    run = llamafactory(llamafactory.config(), "focalpo_gama=0.1")
    assert run.code != 0
    assert run.output.strip().endswith(
        "unknown key focalpo_gama, got 0.1; did you mean 'focalpo_gamma'?"
    )


def test_one_run_after_the_other_in_python(llamafactory: LlamaFactory):
    """A notebook trains our loss, the host's own and ours again, by `run_exp` with a dict."""
    ours = llamafactory.config(max_steps=1)
    own = {key: value for key, value in ours.items() if key != "focalpo_gamma"}
    own["pref_loss"] = "sigmoid"
    script = "from llamafactory.train.tuner import run_exp\n" + "".join(
        f"run_exp({config!r})\n" for config in (ours, own, ours)
    )
    run = run_python("-c", script, cwd=llamafactory.folder, HF_HUB_OFFLINE="1")
    assert run.returncode == 0, run.stderr[-4000:]
    found = [line.partition("'loss': '")[2][:6] for line in run.stdout.splitlines()]
    assert [loss for loss in found if loss] == ["0.6695", "0.6931", "0.6695"]
    assert run.stderr.count("focalpo_plugins: active.") == 2


def test_the_model_card_of_evaluations_that_differ(llamafactory: LlamaFactory, few: Path):
    """Before the first step every margin is 0, so there is no pair ranked right."""
    held_out = llamafactory.data("held_out", few / "test.jsonl")
    run = llamafactory.train(
        eval_dataset=held_out, eval_strategy="steps", eval_steps=5, eval_on_start=True
    )
    first, last = [entry for entry in history(run) if "eval_loss" in entry]
    assert first["eval_focalpo/margin_correct"] == 0 and first["eval_rewards/accuracies"] == 0
    assert last["eval_rewards/accuracies"] > 0
    assert "Focalpo/margin Correct" in (run.folder / "README.md").read_text()


def test_a_loss_of_another_package(llamafactory: LlamaFactory, hinge_package: Path):
    """Its hinge is 1 at a margin of 0, where the host's own of that name trains DPO."""
    config = llamafactory.config(pref_loss="hinge", focalpo_gamma=None, hinge_offset=1.0)
    run = llamafactory(config, path=[hinge_package])
    assert run.code == 0, run.output[-4000:]
    assert losses(run)[0] == pytest.approx(1.0, abs=1e-6)
    assert "active. loss=hinge offset=1.0" in run.output


def test_the_hosts_own_launcher(llamafactory: LlamaFactory):
    """On two ranks; the reason of a failed run is the last line, after all tracebacks."""
    config = llamafactory.config(gradient_accumulation_steps=1, max_steps=2)
    run = launched(llamafactory, config)
    assert run.code == 0, run.output[-6000:]
    assert losses(run)[0] == pytest.approx(FIRST, abs=1e-5)
    assert run.output.count("focalpo_plugins: active.") == 1
    run = launched(llamafactory, {**config, "focalpo_gamma": -1})
    assert run.code != 0
    last = run.output.strip().splitlines()[-1]
    assert last.startswith("focalpo_plugins: focalpo_gamma must be"), run.output[-3000:]


def launched(host: LlamaFactory, config: dict[str, Any]) -> Run:
    variables = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}
    done = subprocess.run(
        ["llamafactory-cli", "train", str(host.write(config))],
        env=environment(**variables),
        cwd=host.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    return Run(done.returncode, done.stdout, Path(config["output_dir"]))


def test_zero_3(llamafactory: LlamaFactory, tmp_path: Path):
    """On two ranks: what DDP trains, up to rounding."""
    changes = {"gradient_accumulation_steps": 1, "max_steps": 3}
    plain = llamafactory.train(ranks=2, **changes)
    path = zero3_on_cpu(tmp_path)
    out = str(llamafactory.folder / "zero")
    sharded = llamafactory.train(ranks=2, **changes, deepspeed=path, output_dir=out)
    assert losses(sharded) == pytest.approx(losses(plain), abs=1e-4)
    assert losses(sharded)[0] == pytest.approx(FIRST, abs=1e-5)


def test_resuming_with_another_template(llamafactory: LlamaFactory):
    run = llamafactory.train(max_steps=1, save_strategy="steps", save_steps=1)
    changes = {"template": "default", "resume_from_checkpoint": str(run.folder / "checkpoint-1")}
    run = llamafactory(llamafactory.config(**changes))
    assert run.code != 0
    assert "template was 'llama3', got 'default': resuming would change" in run.output


def test_streamed_data_are_not_balanced(llamafactory: LlamaFactory):
    config = llamafactory.config(
        streaming=True, dataloader_num_workers=1, focalpo_balanced_batches=True
    )
    run = llamafactory(config)
    assert run.code != 0
    assert "focalpo_balanced_batches can't be combined with training data" in run.output


def test_dropout_that_neftune_adds_is_refused_beside_shared_prompts(llamafactory: LlamaFactory):
    config = llamafactory.config(neftune_noise_alpha=5, focalpo_shared_prompts=True)
    run = llamafactory(config)
    assert run.code != 0
    assert "focalpo_shared_prompts can't be combined with neftune_noise_alpha, got 5" in run.output


def test_a_precomputed_reference_on_two_ranks(llamafactory: LlamaFactory):
    options = {"gradient_accumulation_steps": 1, "learning_rate": 1e-3}
    plain, run = (
        llamafactory.train(ranks=2, **options, **more)
        for more in ({}, {"focalpo_precompute_ref": True})
    )
    assert losses(run) == pytest.approx(losses(plain), abs=2e-5)


def test_no_precomputed_reference_of_adapters_under_deepspeed(
    llamafactory: LlamaFactory, tmp_path: Path
):
    """It is the policy, which DeepSpeed has not prepared yet."""
    changes = {"gradient_accumulation_steps": 1, "deepspeed": zero3_on_cpu(tmp_path), **LORA}
    run = llamafactory(llamafactory.config(focalpo_precompute_ref=True, **changes), ranks=2)
    assert run.code != 0
    assert "focalpo_precompute_ref can't be combined with adapters under" in run.output


REFUSED_PRECOMPUTE = {
    "no reference": (
        {"focalpo_margin": "simpo"},
        "can't be combined with focalpo_margin, got 'simpo'",
    ),
    "no training": (
        {"do_train": False, "do_eval": True, "max_steps": None, "eval_dataset": "train"},
        "focalpo_precompute_ref can't be combined with a run that doesn't train, got True: the "
        "reference is the policy itself",
    ),
    "another folder's key": (
        {"focalpo_precompute_ref": None, "focalpo_precompute_dir": "x"},
        "focalpo_precompute_dir needs focalpo_precompute_ref: true, got only 'x'",
    ),
}


@pytest.mark.parametrize("case", REFUSED_PRECOMPUTE)
def test_no_precomputed_reference(llamafactory: LlamaFactory, case: str):
    changes, words = REFUSED_PRECOMPUTE[case]
    run = llamafactory(llamafactory.config(**{"focalpo_precompute_ref": True, **changes}))
    assert run.code != 0
    assert words in run.output.strip().splitlines()[-1]
