"""Runs of ms-swift's own kinds: adapters, 4 bits, terms beside the loss, its launcher, its YAML."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import yaml
from contract import FIRST
from forked import environment
from harness import ON_CPU, without_paths
from safetensors.torch import load_file
from swift_command import LORA, TINY, ZERO_3, train

FOCALPO = {"loss_type": "focalpo", "focalpo_gamma": 0.05}
ZERO = {"loss_type": "focalpo", "focalpo_gamma": 0.0}
SAVED = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3}
# Of each step: its speed depends on the machine.
OF_MACHINE = ("time", "speed", "memory", "total_flos", "runtime", "per_second", "model_checkpoint")


class Ran:
    """A finished run."""

    def __init__(self, folder: Path, code: int, output: str) -> None:
        self.folder, self.code, self.output = folder, code, output
        assert code == 0, output[-6000:]
        lines = (folder / "out" / "logging.jsonl").read_text().splitlines()
        self.history = next(
            entry["log_history"] for entry in map(json.loads, lines) if "log_history" in entry
        )

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.history if "loss" in entry]

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [
            {name: value for name, value in entry.items() if not any(w in name for w in OF_MACHINE)}
            for entry in self.history
            if "loss" in entry
        ]

    @property
    def checkpoint(self) -> Path:
        return next((self.folder / "out").glob("checkpoint-*"))

    def weights(self) -> dict[str, Any]:
        return load_file(next(self.checkpoint.glob("*model.safetensors")))

    def said(self, what: str) -> list[str]:
        lines = [line for line in self.output.splitlines() if "focalpo_plugins: " in line]
        return [line for line in lines if what in line]


@pytest.fixture
def run(tiny: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Ran]:
    def of(ranks: int = 1, how: dict[str, Any] | None = None, **given: Any) -> Ran:
        folder = tmp_path_factory.mktemp("run")
        data = {"model": tiny / "model", "dataset": few / "train.jsonl", "max_steps": 2}
        return Ran(folder, *train(folder, {**data, **given}, ranks, **(how or {})))

    return of


def same_weights(one: Ran, other: Ran) -> bool:
    ours, theirs = one.weights(), other.weights()
    return ours.keys() == theirs.keys() and all(ours[k].equal(theirs[k]) for k in ours)


def without_ours(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in step.items() if not k.startswith("focalpo/")} for step in steps]


@pytest.mark.releases
@pytest.mark.parametrize("tuner", [{}, LORA], ids=["full", "lora"])
def test_gamma_zero_has_the_weights_of_the_hosts_own(run: Callable[..., Ran], tuner: dict):
    """And saves the same files; only args.json names another loss."""
    own, zero = (run(**SAVED, **tuner, **loss) for loss in ({}, ZERO))
    assert without_ours(zero.steps) == own.steps
    assert same_weights(own, zero)
    files = [sorted(path.name for path in each.checkpoint.iterdir()) for each in (own, zero)]
    assert files[0] == files[1]
    saved = [json.loads((each.checkpoint / "args.json").read_text()) for each in (own, zero)]
    assert saved[1].keys() - saved[0].keys() == {"focalpo_gamma"}
    assert saved[1]["loss_type"] == "focalpo"


@pytest.mark.releases
@pytest.mark.parametrize("method", ["dpo", "kto", "sft"])
def test_the_hosts_own_runs_are_untouched(run: Callable[..., Ran], method: str, few: Path,
                                          tmp_path: Path):  # fmt: skip
    """With this package as with its autoload off: losses, weights, arguments, and no word."""
    given: dict[str, Any] = {**SAVED, "rlhf_type": method}
    if method == "sft":
        given |= {"rlhf_type": "dpo", "loss_type": "sft"}
    if method == "kto":
        rows = [json.loads(line) for line in (few / "train.jsonl").read_text().splitlines()]
        lines = [
            json.dumps({"messages": row[side], "label": side == "chosen"})
            for row in rows[:16]
            for side in ("chosen", "rejected")
        ]
        (tmp_path / "kto.jsonl").write_text("\n".join(lines))
        given |= {"dataset": tmp_path / "kto.jsonl", "columns": None, "max_steps": 2,
                  "save_steps": 2}  # fmt: skip
    ours, without = run(**given), run(how={"FOCALPO_AUTOLOAD": "0"}, **given)
    assert ours.steps == without.steps
    assert same_weights(ours, without)
    assert "focalpo" not in without_paths(ours.output.replace("focalpo_plugins/swift", ""))
    saved = [json.loads((each.checkpoint / "args.json").read_text()) for each in (ours, without)]
    assert saved[0].keys() == saved[1].keys()


@pytest.mark.releases
def test_terms_beside_the_loss(run: Callable[..., Ran]):
    """With gamma 0 the host's own: sft beside it by weight, rpo_alpha, and label smoothing."""
    both = {"loss_weights": [1.0, 0.1], "label_smoothing": 0.1}
    own = run(loss_type=["sigmoid", "sft"], **both)
    zero = run(**{**ZERO, "loss_type": ["focalpo", "sft"]}, **both)
    assert zero.losses == pytest.approx(own.losses, rel=1e-6)
    assert "; the model was not saved, because save_strategy is no" in zero.output
    rpo = [run(rpo_alpha=0.2, **loss).losses for loss in ({}, ZERO)]
    assert rpo[0] == pytest.approx(rpo[1], rel=1e-6)


@pytest.mark.releases
def test_label_smoothing(run: Callable[..., Ran]):
    """At margin 0 it changes nothing; later it does."""
    plain, smooth = (run(**FOCALPO, **given) for given in ({}, {"label_smoothing": 0.2}))
    assert plain.losses[0] == smooth.losses[0] == pytest.approx(FIRST, abs=1e-5)
    assert abs(plain.losses[1] - smooth.losses[1]) > 1e-4


@pytest.mark.releases
def test_adapters(run: Callable[..., Ran], few: Path):
    """The reference is the model without them; prompts are shared in it as well."""
    held_out = {"val_dataset": few / "test.jsonl", "eval_strategy": "steps", "eval_steps": 3}
    plain = run(**FOCALPO, **LORA, **SAVED, **held_out)
    shared = run(**FOCALPO, **LORA, **SAVED, **held_out, focalpo_shared_prompts=True)
    assert plain.losses[0] == pytest.approx(FIRST, abs=1e-5)
    assert len(plain.said("policy and reference agree, largest margin 0.")) == 1
    assert shared.losses == pytest.approx(plain.losses, abs=1e-4)
    evaluations = [e for e in plain.history if "eval_focalpo/p" in e]
    assert evaluations and 0 < evaluations[-1]["eval_focalpo/p"] < 1
    assert (plain.checkpoint / "adapter_model.safetensors").is_file()


@pytest.mark.releases
def test_four_bits(run: Callable[..., Ran]):
    bits = {"quant_method": "bnb", "quant_bits": 4, "torch_dtype": "float32"}
    done = run(**FOCALPO, **LORA, **bits)
    assert done.losses[0] == pytest.approx(FIRST, abs=1e-4)


@pytest.mark.releases
def test_zero_3(run: Callable[..., Ran]):
    """On two ranks, with DeepSpeed's weights in parts: the losses of one rank, plain and with both
    switches, which exchange a step's pairs."""
    both = {"focalpo_shared_prompts": True, "focalpo_balanced_batches": True}
    one = run(**FOCALPO, **SAVED)
    ranks = [run(ranks=2, how=ON_CPU, **ZERO_3, **FOCALPO, **SAVED, **more) for more in ({}, both)]
    for ran in ranks:
        assert ran.losses[0] == pytest.approx(FIRST, abs=1e-5)
        assert ran.losses == pytest.approx(one.losses, abs=2e-3)
        assert (ran.checkpoint / "model.safetensors").is_file()
    assert 0.1 < ranks[1].history[0]["focalpo/tokens_saved"] < 0.9


def test_the_launcher_and_a_yaml(tiny: Path, few: Path, tmp_path: Path):
    """`swift rlhf x.yaml` with two processes, which torchrun starts."""
    given = {**TINY, **FOCALPO, "model": str(tiny / "model"), "max_steps": 2, "use_cpu": True,
             "dataset": str(few / "train.jsonl"), "gradient_accumulation_steps": 1,
             "focalpo_balanced_batches": True, "output_dir": str(tmp_path / "out")}  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(given))
    done = swift("rlhf", "run.yaml", folder=tmp_path, NPROC_PER_NODE="2")
    ran = Ran(tmp_path, done.returncode, done.stdout)
    assert ran.losses[0] == pytest.approx(FIRST, abs=1e-5)
    assert len(ran.said("active.")) == len(ran.said("done.")) == 1
    assert " batches=balanced" in ran.said("active.")[0]
    assert "focalpo/idle" in ran.history[0]


def test_the_reason_is_the_launchers_last_line(tiny: Path, tmp_path: Path):
    given = {**TINY, **FOCALPO, "model": str(tiny / "model"), "dataset": "x.jsonl",
             "packing": True, "use_cpu": True}  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(given))
    done = swift("rlhf", "run.yaml", folder=tmp_path, NPROC_PER_NODE="2")
    assert done.returncode != 0
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("focalpo_plugins: loss_type focalpo can't be combined with packing")


OTHER = """
from focalpo_plugins import hookimpl

@hookimpl
def register_losses(register):
    register("steep", lambda margins, power: (1 - margins).clamp(min=0) ** power, options={"power": 2.0})
"""
IN_PYTHON = """
from swift import RLHFArguments, rlhf_main

rlhf_main(RLHFArguments(**{given}))
"""


def test_another_package_and_python(tiny: Path, few: Path, tmp_path: Path):
    """Its loss has its own name and options: at margin 0 it is 1; `rlhf_main` in a script."""
    info = tmp_path / "steep-1.0.dist-info"
    info.mkdir()
    (tmp_path / "steep_losses.py").write_text(OTHER)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: steep\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[focalpo_plugins]\nsteep = steep_losses\n")
    given = {**TINY, "loss_type": "steep", "steep_power": 3.0, "report_to": ["none"],
             "model": str(tiny / "model"), "dataset": [str(few / "train.jsonl")], "max_steps": 2,
             "output_dir": str(tmp_path / "out")}  # fmt: skip
    script = tmp_path / "script.py"
    script.write_text(IN_PYTHON.format(given=given))
    done = subprocess.run([sys.executable, str(script)], env=environment(tmp_path), cwd=tmp_path,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    ran = Ran(tmp_path, done.returncode, done.stdout)
    assert ran.losses[0] == pytest.approx(1, abs=1e-5)
    assert "loss=steep power=3.0" in ran.said("active.")[0]


RESUMED = """
from swift import RLHFArguments, rlhf_main

given = {given}
rlhf_main(RLHFArguments(**given))
for name, value in (("f_divergence_type", "js_divergence"), ("reference_free", True)):
    args = RLHFArguments(**given, resume_from_checkpoint={checkpoint!r})
    setattr(args.training_args, name, value)
    try:
        rlhf_main(args)
    except ValueError as error:
        print("refused:", error)
"""


def test_resuming_with_what_only_a_script_can_set(tiny: Path, few: Path, tmp_path: Path):
    """ms-swift has no keys for these two, which change the margin."""
    given = {**TINY, **FOCALPO, "report_to": ["none"], "model": str(tiny / "model"), "max_steps": 1,
             "dataset": [str(few / "train.jsonl")], "save_strategy": "steps", "save_steps": 1,
             "output_dir": str(tmp_path / "out")}  # fmt: skip
    checkpoint = str(tmp_path / "out" / "checkpoint-1")
    (tmp_path / "script.py").write_text(RESUMED.format(given=given, checkpoint=checkpoint))
    code, output, _ = run_forked(tmp_path / "script.py", tmp_path)
    assert code == 0, output[-4000:]
    first, second = (line for line in output.splitlines() if line.startswith("refused:"))
    assert "f_divergence_type was 'reverse_kl', got 'js_divergence': resuming would" in first
    assert "reference_free was False, got True: resuming would" in second


def run_forked(script: Path, folder: Path) -> tuple[int, str, str]:
    cache = {"MODELSCOPE_CACHE": str(folder / "cache"), "HF_DATASETS_CACHE": str(folder / "hf")}
    return forked.run(str(script), [], folder, merged=True, **cache)


def test_megatron_is_refused_on_its_command_line(tmp_path: Path):
    """Before it finds that Megatron isn't installed."""
    done = subprocess.run(
        [Path(sys.executable).parent / "megatron", "rlhf", "--loss_type", "focalpo"],
        env=environment(), cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert "focalpo_plugins: megatron rlhf can't train a loss of this package" in done.stderr
    own = subprocess.run(
        [Path(sys.executable).parent / "megatron", "rlhf", "--loss_type", "sigmoid"],
        env=environment(), cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert "focalpo_plugins:" not in own.stderr


def swift(*argv: str, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """The installed command, from the start."""
    return subprocess.run(
        [Path(sys.executable).parent / "swift", *argv],
        env=environment(**variables),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,  # seconds
    )
