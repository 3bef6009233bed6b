"""What TRL's trainer with our loss refuses, before it trains."""

from __future__ import annotations

import json

import pytest
from accelerate import ParallelismConfig
from datasets import Dataset
from tiny_trl import (
    PAIRS,
    model,
    on_two_ranks,
    trainer,
)
from trl import DPOConfig, DPOTrainer
from trl_features import LOSS_TYPES

from focalpo_plugins import FocalPOConfig, FocalPOTrainer
from focalpo_plugins.trl import PairwiseLossMixin

pytestmark = pytest.mark.releases


OURS_IS_FUSED = hasattr(DPOTrainer, "_compute_loss_liger") and not hasattr(
    DPOTrainer, "_truncate_inputs"
)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"loss_type": ["hinge"]}, "got 'hinge': it has no log-sigmoid"),
        ({"loss_type": ["ipo"]}, "got 'ipo': it has no log-sigmoid"),
        ({"loss_type": ["nca_pair"]}, "got 'nca_pair': its log-sigmoids are of each reward"),
        ({"loss_type": ["bco_pair"]}, "got 'bco_pair': its log-sigmoids are of each reward"),
        ({"loss_type": ["exo_pair"]}, "got 'exo_pair': its log-sigmoid is one term"),
        ({"loss_type": ["discopop"]}, "got 'discopop': its log-sigmoid is blended"),
        ({"loss_type": ["aot"]}, "got 'aot': it sorts the batch"),
        ({"loss_type": ["aot_unpaired"]}, "got 'aot_unpaired': it sorts the batch"),
        ({"loss_type": ["sppo_hard"]}, "got 'sppo_hard': it has no log-sigmoid"),
        ({"loss_type": ["apo_zero"]}, "got 'apo_zero': it has no log-sigmoid"),
        ({"loss_type": ["apo_down"]}, "got 'apo_down': it has no log-sigmoid"),
        (
            {"loss_type": ["sigmoid", "hinge"]},
            "loss_type must be one of sigmoid, sigmoid_norm, robust, sft, got 'hinge'",
        ),
        ({"loss_type": ["sft"]}, "it has no preference loss. Add 'sigmoid' to 'sft'"),
        (
            {"f_divergence_type": "js_divergence"},
            "f_divergence_type must be reverse_kl, got 'js_divergence'",
        ),
        ({"beta": 0.0}, "beta must be a finite number above 0, got 0.0"),
        ({"focalpo_gamma": 2.0}, "focalpo_gamma must be below 1/ln 2"),
        ({"focalpo_gamma": 1.5}, "; to train anyway, set focalpo_allow_reversed=True."),
        ({"focalpo_gamma": -1.0}, "focalpo_gamma must be a finite number of at least 0, got -1.0"),
        (
            {"focalpo_variant": "corect"},
            "focalpo_variant must be one of correct, correct_exact, incorrect, got 'corect'",
        ),
        ({"focalpo_pairwise_loss": "focal"}, "focalpo_pairwise_loss must be one of focalpo"),
        ({"label_smoothing": 0.5}, "label_smoothing must be at least 0 and below 0.5, got 0.5"),
        (
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, -0.5]},
            "loss_weights must be a finite number of at least 0, got -0.5: it is the weight of",
        ),
    ],
    ids=str,
)
def test_refusals(tokenizer, tmp_path, arguments, message):
    """Refused before the model is touched: the one given here can't be loaded."""
    with pytest.raises(ValueError) as error:
        trainer(FocalPOTrainer, tokenizer, tmp_path, policy="no/such-model", **arguments)
    assert message in str(error.value)


def test_sequences_over_several_ranks(tmp_path, monkeypatch):
    """Set in TRL's arguments, or in accelerate's config file, which becomes its environment."""
    args = FocalPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    args.parallelism_config = ParallelismConfig(sp_size=2)
    with pytest.raises(
        ValueError, match=r"^parallelism_config.sp_size must be 1, got 2: each rank"
    ):
        FocalPOTrainer("no/such-model", args=args)
    args.parallelism_config = None
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    with pytest.raises(
        ValueError, match=r"^parallelism_config.cp_size must be 1, got 2: each rank"
    ):
        FocalPOTrainer("no/such-model", args=args)


def test_batches_of_different_sizes(tmp_path):
    """transformers has the value from 5.17 on, and trains pairs of short batches with more weight."""
    args = FocalPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    args.train_sampling_strategy = "batch_rebalance"
    with pytest.raises(ValueError, match=r"^train_sampling_strategy must be .* 'batch_rebalance'"):
        FocalPOTrainer("no/such-model", args=args)


def test_a_reference_that_is_the_policy(tokenizer, tmp_path):
    """TRL's own refusal; otherwise every margin would stay 0."""
    policy = model(0)
    args = FocalPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(ValueError, match="`model` and `ref_model` cannot be the same"):
        FocalPOTrainer(
            policy,
            policy,
            args=args,
            train_dataset=Dataset.from_list(PAIRS),
            processing_class=tokenizer,
        )


def test_every_loss_type_of_this_trl_is_ours_or_refused_with_its_reason():
    """A new one must not go unnoticed."""
    from focalpo_plugins.trl.exchange import _LOGSIGMOIDS, _WHY_NOT

    assert len(LOSS_TYPES) > 10
    assert {*_LOGSIGMOIDS, *_WHY_NOT} >= LOSS_TYPES


def test_needs_its_own_config(tokenizer, tmp_path):
    with pytest.raises(TypeError, match="^args must be a FocalPOConfig, got DPOConfig"):
        FocalPOTrainer(model(0), args=DPOConfig(str(tmp_path), use_cpu=True, bf16=False))


def test_a_trainer_without_a_loss_trains_nothing(tokenizer, tmp_path):
    class Forgetful(PairwiseLossMixin, DPOTrainer):
        pass

    host = trainer(Forgetful, tokenizer, tmp_path)
    with pytest.raises(
        RuntimeError, match="^Forgetful has no pairwise loss yet, and would train DPO"
    ):
        host.train()


ONE_RANK_ALONE = """
import json, sys
from pathlib import Path
import torch
import tiny_trl as t
from focalpo_plugins.guards.ranks import together
from focalpo_plugins.hf_trainer import RANKS
folder, words = Path(sys.argv[1]), t.tokenizer()
saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "ddp_backend": "gloo"}
dpo = t.trainer(t.DPOTrainer, words, folder / "dpo", **saving)
dpo.train()
rank = dpo.args.process_index


def without_a_folder():
    host = t.trainer(t.FocalPOTrainer, words, folder / "out", **saving)
    torch.distributed.barrier()
    if rank == 0:
        (folder / "out").rmdir()
        (folder / "out").touch()
    torch.distributed.barrier()
    host.train()


def from_dpo():
    checkpoint = folder / ("dpo" if rank == 0 else "of another machine") / "checkpoint-1"
    host = t.trainer(t.FocalPOTrainer, words, folder / "other", **saving)
    host.train(resume_from_checkpoint=str(checkpoint))


def anything():
    host = t.trainer(t.FocalPOTrainer, words, folder / "any", **saving)
    together(RANKS, lambda: {}["missing"] if rank == 1 else None)


def no_folder():
    checkpoint = folder / ("dpo" if rank == 0 else "of another machine") / "checkpoint-1"
    host = t.trainer(t.FocalPOTrainer, words, folder / "other", **saving, focalpo_allow_changed=True)
    host.train(resume_from_checkpoint=str(checkpoint))


class Halved(t.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / (1 + rank)
        return output


def other_logits():
    policy = Halved(t.model(0).config)
    t.trainer(t.FocalPOTrainer, words, folder, policy=policy, focalpo_fused=True, **saving).train()


fused = [other_logits] * (sys.argv[2] == "fused")
for start in (without_a_folder, from_dpo, anything, no_folder, *fused):
    try:
        start()
    except (ValueError, RuntimeError) as error:
        sys.stdout.write("ENDED " + json.dumps([start.__name__, rank, str(error)]) + chr(10))
        sys.stdout.flush()
"""


@pytest.mark.xdist_group("forked")
def test_what_one_rank_finds_ends_all(tmp_path):
    """A folder that only rank 0 writes to; a checkpoint that only rank 0 sees, of another loss, and
    one that may be resumed; any error on rank 1; on the fused path, if this TRL leaves it to us, an
    output layer whose check fails on rank 1 only."""
    path = "fused" if OURS_IS_FUSED else "plain"
    said = on_two_ranks(ONE_RANK_ALONE, tmp_path, path).splitlines()
    found = [json.loads(line.partition("ENDED ")[2]) for line in said if "ENDED " in line]
    words = {
        "without_a_folder": "output_dir must be a writable folder, got",
        "from_dpo": "has no record of a loss of focalpo_plugins",
        "anything": "on rank 1: KeyError: 'missing'",
        "no_folder": "resume_from_checkpoint must be the folder of a checkpoint, got",
    }
    if path == "fused":
        words["other_logits"] = "focalpo_fused can't be used with Halved: its logits differ by "
    assert {(name, rank) for name, rank, _ in found} == {(n, r) for n in words for r in (0, 1)}
    for name, _, message in found:
        assert words[name] in message
