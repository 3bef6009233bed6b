"""``focalpo_plugins.check(trainer)``: what it says of a script's trainer, against what is worked out
by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import trl
from peft import LoraConfig
from tiny_trl import model, trainer
from trl import DPOTrainer

from focalpo_plugins import FocalPOTrainer, check
from focalpo_plugins.trl.dry_run import plan

pytestmark = pytest.mark.releases


def test_what_it_prints(tokenizer, tmp_path: Path, capsys):
    """Eight pairs, four a batch on one rank: two steps an epoch, three asked for.  In float32 with
    Adam a weight takes 4 bytes, its gradient 4, Adam's moments 8, the reference's 4."""
    host = trainer(
        FocalPOTrainer, tokenizer, tmp_path, beta=0.1, reference=model(0), focalpo_gamma=0.05
    )
    capsys.readouterr()
    assert check(host, pair=1) == []
    said = capsys.readouterr().out
    assert f"run      FocalPOTrainer, read by TRL {trl.__version__}" in said
    assert "loss     focalpo gamma=0.05 variant=correct, beta=0.1" in said
    assert "predicted first loss 0.6695 (DPO: 0.6931)" in said  # 2^-.05 ln 2
    assert "of the 8 trained on: truncated 0 %, identical 0 %, empty 0 %" in said
    assert "4 pairs x 1 accumulated x 1 rank (gpus) = 4 pairs a step" in said
    assert "2 steps an epoch, 3 steps in the run" in said
    assert "critical path a step: plain 1.00 (" in said
    parameters = sum(each.numel() for each in model(0).parameters())
    assert f"{parameters:,} parameters, {parameters:,} trained, fp32" in said
    assert f"memory   {parameters * 20 / 2**20:.1f} MiB of state a rank (no sharding)" in said
    assert "pair 1, as the model gets it; [masked] tokens are not trained on" in said
    assert said.endswith("0 warnings, no errors\n")


def test_the_trainer_trains_the_batches_that_were_planned(tokenizer, tmp_path: Path):
    """And it trains them after it was checked."""
    host = trainer(FocalPOTrainer, tokenizer, tmp_path)
    planned = [window.pairs for window in plan(host, 1).windows]
    assert check(host) == []
    seen, of_host = [], host._count

    def count(margins: torch.Tensor) -> None:
        seen.append(host._rows_of_step())
        of_host(margins)

    host._count = count
    host.train()
    assert len(planned) == 3
    assert seen == planned


def test_whether_it_fits(tokenizer, tmp_path: Path, capsys):
    host = trainer(FocalPOTrainer, tokenizer, tmp_path)
    (warning,) = check(host, gpu_memory=1e-6)
    assert warning.startswith("the run doesn't fit into gpu_memory 1e-06: a rank needs more than ")
    assert "does not fit: a rank needs more than " in capsys.readouterr().out
    assert check(host, gpu_memory=40) == []
    assert "; gpu_memory 40 leaves " in capsys.readouterr().out


def test_adapters(tokenizer, tmp_path: Path, capsys):
    """LoRA of rank 4 on two projections of each layer; no reference is held."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    host = trainer(FocalPOTrainer, tokenizer, tmp_path, reference=None, peft_config=lora)
    check(host, gpus=8)
    trained = sum(each.numel() for each in host.model.parameters() if each.requires_grad)
    said = capsys.readouterr().out
    assert f", {trained:,} trained, " in said and "reference 0.0 MiB" in said
    assert "4 pairs x 1 accumulated x 8 ranks (gpus) = 32 pairs a step" in said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gpus": 0}, "gpus must be at least 1, got 0."),
        ({"gpu_memory": -1.0}, "gpu_memory must be a number of GiB above 0, got -1."),
        ({"pair": 8}, "pair must be "),
    ],
)
def test_what_is_out_of_range(tokenizer, tmp_path: Path, given: dict, message: str):
    host = trainer(FocalPOTrainer, tokenizer, tmp_path)
    with pytest.raises(ValueError, match=message):
        check(host, **given)


def test_streamed_data(tokenizer, tmp_path: Path):
    host = trainer(FocalPOTrainer, tokenizer, tmp_path)
    host.train_dataset = host.train_dataset.with_format(None).to_iterable_dataset()
    with pytest.raises(ValueError, match="train_dataset must have a length, got IterableDataset"):
        check(host)


def test_a_trainer_of_trl_s(tokenizer, tmp_path: Path):
    with pytest.raises(TypeError, match="trainer must be a FocalPOTrainer, .*, got DPOTrainer"):
        check(trainer(DPOTrainer, tokenizer, tmp_path))
