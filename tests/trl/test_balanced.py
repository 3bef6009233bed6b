"""Balanced batches in TRL: the same optimizer steps, on accelerate's own shards of the order.

Rounding is what differs: a step's pairs are added in another order.  In float32 losses and gradient
norms agree to 1e-5, relative, and weights to 2e-6 after twelve steps of SGD.  (AdamW divides by the
size of a gradient, so where that is 0 up to rounding it makes a step of the rounding.)
"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_trl
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_trl import PAIRS, WORDS, model, on_two_ranks, trainer
from torch.utils.data import BatchSampler, RandomSampler, Sampler, SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOTrainer

from focalpo_plugins import FocalCPOConfig, FocalORPOConfig, FocalPOTrainer
from focalpo_plugins.hf_batches import balance
from focalpo_plugins.hf_sequences import PairSequences
from focalpo_plugins.trl.reference_free import FocalCPOTrainer, FocalORPOTrainer

KEY = "focalpo_balanced_batches"
BALANCED = {KEY: True}
# Steps of eight pairs, each logged: four micro-batches of two.
STEPS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "max_steps": 12,
    "optim": "sgd",
    "learning_rate": 1e-2,
}
CUTS_IN_THE_STEP = hasattr(DPOTrainer, "_truncate_inputs")  # TRL 0.29


def uneven(count: int) -> Dataset:
    """Pairs with 1 to 20 words an answer. 45 of them fill five steps of eight, two micro-batches
    and a half."""
    draw = random.Random(0)

    def words(start: int) -> str:
        return " " + " ".join(draw.choices(WORDS[start:], k=draw.randint(1, 20)))

    rows = [
        {"prompt": f"w1 w2 w{3 + row % 9}", "chosen": words(0), "rejected": words(5)}
        for row in range(count)
    ]
    return Dataset.from_list(rows)


def assert_same_steps(one: Any, other: Any) -> None:
    """The logs and the weights of two trainers that have trained."""
    logs = [[entry for entry in host.state.log_history if "loss" in entry] for host in (one, other)]
    assert len(logs[0]) == len(logs[1]) > 1
    for plain, balanced in zip(*logs, strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "learning_rate"):
            assert balanced[name] == pytest.approx(plain[name], rel=1e-5, abs=5e-6), name
    weights = zip(one.model.parameters(), other.model.parameters(), strict=True)
    for plain, balanced in weights:
        torch.testing.assert_close(balanced, plain, rtol=0, atol=2e-6)


# The data.


@pytest.mark.releases
def test_lengths_by_hand():
    """Prompt of 2, answers of 3 and 2 that begin alike once: 5, 4, and 3 in common; a row of 6.

    Cut to 4 tokens: 4, 4 and 3, a row of 5.  With the end kept, the chosen sequence loses one token
    and the rejected one none: they are no longer side by side, so nothing is counted as common.
    The second pair has equal answers of one token, and the third an empty one.
    """
    data = Dataset.from_dict({"p": [[1, 2], [1], [7, 8]], "c": [[3, 4, 5], [2], []],
                              "r": [[3, 9], [2], [4, 5, 6]]})  # fmt: skip

    def found(**cut: Any) -> list[list[int]]:
        return [part.tolist() for part in PairSequences(data, "p", "c", "r", **cut).lengths()]

    assert found() == [[5, 2, 2], [4, 2, 5], [3, 2, 2]]
    assert found(limit=4) == [[4, 2, 2], [4, 2, 4], [3, 2, 2]]
    assert found(limit=4, keep_end=True) == [[4, 2, 2], [4, 2, 4], [0, 2, 0]]
    sequences = PairSequences(data, "p", "c", "r", limit=4)
    assert sequences.tokens("padded") == [4, 2, 4]
    assert sequences.tokens("unpadded") == [5, 2, 4]
    assert sequences.of(0) == ([1, 2, 3, 4], [1, 2, 3, 9])
    assert sequences.rows_of([([7, 8], [7, 8, 4, 5]), ([1], [9])]) == [2, None]


@pytest.mark.parametrize("cut", [{}, {"limit": 9}, {"limit": 9, "keep_end": True}])
def test_lengths_are_those_of_the_sequences(cut: dict[str, Any]):
    """Rows of a shuffled selection, with answers that share up to four tokens."""
    draw = random.Random(1)
    rows = [
        {"p": [1] * draw.randint(0, 5), "c": draw.choices([1, 2], k=draw.randint(1, 8)),
         "r": draw.choices([1, 2], k=draw.randint(1, 8))}
        for _ in range(300)
    ]  # fmt: skip
    data = Dataset.from_list(rows).shuffle(seed=0).select(range(200))
    sequences = PairSequences(data, "p", "c", "r", **cut)
    for row, (chosen, rejected, common) in enumerate(zip(*sequences.lengths(), strict=True)):
        ours, theirs = sequences.of(row)
        assert (len(ours), len(theirs)) == (chosen, rejected)
        pairs = zip(ours, theirs, strict=False)
        alike = next((i for i, (a, b) in enumerate(pairs) if a != b), min(chosen, rejected))
        assert common == alike or cut.get("keep_end") and common <= alike


# The order.


class _Own(Sampler[int]):
    """A user's own sampler: every second row, backwards."""

    def __init__(self, rows: int) -> None:
        self.rows = range(rows)[::-2]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Any:
        return iter(self.rows)


SAMPLERS = {
    "random": lambda rows: RandomSampler(range(rows), generator=torch.Generator().manual_seed(3)),
    "sequential": lambda rows: SequentialSampler(range(rows)),
    "a user's": _Own,
}


class _Loader:
    """The parts of a prepared data loader that `balance` reads."""

    def __init__(self, batch_sampler: Any) -> None:
        self.batch_sampler = batch_sampler


@settings(deadline=None, max_examples=400)
@given(
    rows=st.integers(1, 120), ranks=st.integers(1, 5), each=st.integers(1, 4),
    accumulation=st.integers(1, 4), split=st.booleans(), even=st.booleans(), drop=st.booleans(),
    sampler=st.sampled_from(sorted(SAMPLERS)), cost=st.sampled_from(["padded", "unpadded"]),
    lengths=st.randoms(use_true_random=False),
)  # fmt: skip
def test_each_step_has_its_pairs_with_their_weights(
    rows, ranks, each, accumulation, split, even, drop, sampler, cost, lengths
):
    """On accelerate's own shards, in two epochs: a step's mean loss is a sum over its pairs, each
    weighted by one over the number of pairs of its micro-batch."""
    tokens = [lengths.randint(1, 500) for _ in range(rows)]

    def epochs(balanced: bool) -> list[list[list[list[int]]]]:
        """For each of two epochs, the micro-batches of each rank."""
        of_step = each * ranks if split else each
        batches = BatchSampler(SAMPLERS[sampler](rows), of_step, drop)
        shards = [
            BatchSamplerShard(batches, ranks, rank, split_batches=split, even_batches=even)
            for rank in range(ranks)
        ]
        if balanced:
            balance(_Loader(shards[0] if ranks > 1 else batches), tokens, accumulation, cost, KEY)
        if ranks == 1:
            return [[list(batches)] for _ in range(2)]
        # Each rank draws the same order: here one after another, from the same seed.
        found = []
        for shard in shards:
            generator = getattr(batches.sampler, "generator", None)
            if generator is not None:
                generator.manual_seed(3)
            found.append([list(shard), list(shard)])
        return [list(epoch) for epoch in zip(*found, strict=True)]

    for plain, dealt in zip(epochs(False), epochs(True), strict=True):
        assert [len(of_rank) for of_rank in dealt] == [len(of_rank) for of_rank in plain]
        for start in range(0, max(map(len, plain)), accumulation):
            of_step = [
                Counter(
                    (pair, len(batch))
                    for of_rank in epoch
                    for batch in of_rank[start : start + accumulation]
                    for pair in batch
                )
                for epoch in (plain, dealt)
            ]
            assert of_step[0] == of_step[1]


# Whole runs.

WAYS: dict[str, dict[str, Any]] = {
    "balanced": {},
    "shared prompts": {"focalpo_shared_prompts": True},
    "shared and fused": {"focalpo_shared_prompts": True, "focalpo_fused": True},
    "gamma 0": {"focalpo_gamma": 0.0},
    "several epochs": {"max_steps": -1, "num_train_epochs": 2},
    "drop_last": {"dataloader_drop_last": True},
    "workers": {"dataloader_num_workers": 2},
    "precomputed": {"precompute_ref_log_probs": True},
    "moving gamma": {"focalpo_gamma": 0.5, "focalpo_gamma_end": 0.0},
    "weights and lengths": {"use_weighting": True, "ld_alpha": 0.5},
    "plain random sampler": {"accelerator_config": {"use_seedable_sampler": False}},
    "max_length": {"max_length": 12},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.releases
def test_the_same_run(tokenizer, tmp_path, way: str):
    if way == "shared and fused" and CUTS_IN_THE_STEP:
        pytest.skip("this TRL has no fused path")
    found = []
    for balanced in (False, True):
        host = trainer(
            FocalPOTrainer, tokenizer, tmp_path / str(balanced), pairs=uneven(45),
            **{**STEPS, **WAYS[way], KEY: balanced},
        )  # fmt: skip
        host.train()
        found.append(host)
    assert_same_steps(*found)


def of_pairs(batches: Any) -> list[int]:
    """The length of each pair's longer sequence."""
    lengths = [batch["attention_mask"].sum(1) for batch in batches]
    return [int(max(pair)) for both in lengths for pair in zip(*both.chunk(2), strict=True)]


@pytest.mark.releases
def test_batches_are_shorter(tokenizer, tmp_path):
    """Each step's batches of two are its pairs by length, with the longest two first; the other
    batches are in another order."""
    found, longest = {}, {}
    for balanced in (False, True):
        host = trainer(
            FocalPOTrainer, tokenizer, tmp_path, pairs=uneven(40), **{**STEPS, KEY: balanced}
        )
        batches = list(host.get_train_dataloader())
        steps = [batches[at : at + 4] for at in range(0, 20, 4)]
        found[balanced] = [[batch["input_ids"].shape[1] for batch in step] for step in steps]
        longest[balanced] = [sorted(of_pairs(step), reverse=True) for step in steps]
    assert longest[True] == longest[False]
    assert [sorted(step, reverse=True) for step in found[True]] == [s[::2] for s in longest[True]]
    assert all(step[0] == max(step) for step in found[True])
    assert sum(map(sum, found[True])) < 0.95 * sum(map(sum, found[False]))


@pytest.mark.parametrize("first, then", [(True, False), (False, True), (True, True)])
def test_resumed_inside_an_epoch(tokenizer, tmp_path, first: bool, then: bool):
    """After step 8, in the second epoch of six steps; the switch may change at this point."""
    arguments = {**STEPS, "save_strategy": "steps", "save_steps": 8}
    whole = trainer(FocalPOTrainer, tokenizer, tmp_path / "whole", pairs=uneven(45), **STEPS)
    whole.train()
    for balanced, resume in ((first, None), (then, str(tmp_path / "out" / "checkpoint-8"))):
        host = trainer(
            FocalPOTrainer, tokenizer, tmp_path / "out", pairs=uneven(45),
            **{**arguments, KEY: balanced},
        )  # fmt: skip
        host.train(resume_from_checkpoint=resume)
    assert_same_steps(whole, host)


ON_TWO_RANKS = """
import json, sys
from pathlib import Path
folder, here = Path(sys.argv[1]), sys.argv[2]
sys.path.insert(0, here)
import torch
import tiny_trl
import test_balanced as t
from focalpo_plugins import FocalPOTrainer

for way, more in t.ON_RANKS.items():
    found = []
    for balanced in (False, True):
        host = tiny_trl.trainer(
            FocalPOTrainer, tiny_trl.tokenizer(), folder / way / str(balanced), pairs=t.uneven(45),
            **{**t.STEPS, **more, t.KEY: balanced, "ddp_backend": "gloo"},
        )
        host.train()
        found.append(host)
    t.assert_same_steps(*found)
    idle = [
        sum(entry["focalpo/idle"] for entry in host.state.log_history if "focalpo/idle" in entry)
        for host in found
    ]
    if host.is_world_process_zero():
        print("FOUND " + json.dumps([way, idle, host.state.log_history[-2]["epoch"]]))
"""
# Pairs of a step: 2 x 2 ranks x 2.
ON_RANKS = {
    way: {"gradient_accumulation_steps": 2, **more}
    for way, more in {
        "filled": {},
        "both": {"focalpo_shared_prompts": True},
        "dropped": {"dataloader_drop_last": True},
        "split": {"accelerator_config": {"split_batches": True}, "per_device_train_batch_size": 4},
    }.items()
}


def test_two_ranks(tmp_path):
    """DDP, which fills the last step of an epoch with the epoch's first pairs, or drops it."""
    said = on_two_ranks(ON_TWO_RANKS, tmp_path, str(Path(__file__).parent)).splitlines()
    found = [json.loads(line.partition("FOUND ")[2]) for line in said if "FOUND " in line]
    assert [way for way, *_ in found] == list(ON_RANKS)
    for _, (plain, balanced), _ in found:
        assert plain == 0 < balanced or balanced < plain


# Messages.


@pytest.mark.releases
def test_a_margin_that_is_not_finite_names_its_row(tokenizer, tmp_path):
    """Whatever the order: only this row has the token."""
    pairs = uneven(45).to_list()
    pairs[31]["rejected"] += " w39"
    pairs = [{**row, "chosen": row["chosen"].replace("w39", "w38")} for row in pairs]
    for row in (*pairs[:31], *pairs[32:]):
        row["rejected"] = row["rejected"].replace("w39", "w38")
    policy = model(0)
    with torch.no_grad():
        policy.model.embed_tokens.weight[tokenizer.vocab["w39"]] = torch.nan
    host = trainer(
        FocalPOTrainer, tokenizer, tmp_path, policy=policy, pairs=Dataset.from_list(pairs),
        **{**STEPS, **BALANCED},
    )  # fmt: skip
    with pytest.raises(FloatingPointError, match=r"rank 0, row 31 of the data \(nan, float32\)"):
        host.train()


def test_the_starting_line(tokenizer, tmp_path, capsys):
    host = trainer(FocalPOTrainer, tokenizer, tmp_path, **BALANCED)
    host.train()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if " active. " in line]
    assert " batches=balanced " in line
    assert all("focalpo/tokens" in entry for entry in host.state.log_history if "loss" in entry)
    assert not any("tokens_saved" in key or "idle" in key for key in host.state.log_history[0])


# Refusals.


class _OwnBatches(BatchSampler):
    pass


class _WithOwnBatches(FocalPOTrainer):
    def get_train_dataloader(self) -> Any:
        return super().get_train_dataloader()

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super()._get_dataloader(*args, **kwargs)
        loader.batch_sampler.__class__ = _OwnBatches
        return loader


def dynamic(max_position: int) -> LlamaForCausalLM:
    config = model(0).config.to_dict()
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config |= {"max_position_embeddings": max_position, "rope_parameters": rope}
    config |= {"rope_scaling": rope}
    return LlamaForCausalLM(LlamaConfig(**config))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "sft": ({"loss_type": ["sigmoid", "sft"]}, r"loss_type, got \['sigmoid', 'sft'\]: sft is a mean"),
    "neftune": ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha, got 5.0: its noise"),
    "dispatch_batches": ({"accelerator_config": {"dispatch_batches": True}},
                         "dispatch_batches, got True"),
    "a RoPE by length": ({"policy": dynamic(8), "max_length": 9}, "this model's RoPE, got 'llama'"),
    "a mixture of experts": ({"policy": model(0, "mixtral"), "reference": None},
                             "router_aux_loss_coef, got 0.001: it is computed from all tokens"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused(tokenizer, tmp_path, what: str):
    """Refused before the trainer is built."""
    arguments, words = REFUSED[what]
    with pytest.raises(ValueError, match=f"^{KEY} can't be combined with {words}"):
        trainer(FocalPOTrainer, tokenizer, tmp_path, **{**BALANCED, **arguments})


def test_a_rope_whose_sequences_are_short_enough(tokenizer, tmp_path):
    trainer(FocalPOTrainer, tokenizer, tmp_path, policy=dynamic(64), max_length=64, **BALANCED)


def test_a_batch_sampler_that_is_not_known(tokenizer, tmp_path):
    host = trainer(_WithOwnBatches, tokenizer, tmp_path, **BALANCED)
    with pytest.raises(
        ValueError, match=f"^{KEY} can't be combined with a batch sampler, got '_Own"
    ):
        host.train()
    assert host.state.global_step == 0


def test_streamed_data(tokenizer, tmp_path):
    pairs = Dataset.from_list(PAIRS).to_iterable_dataset()
    host = trainer(FocalPOTrainer, tokenizer, tmp_path, pairs=pairs, **BALANCED)
    with pytest.raises(ValueError, match=f"^{KEY} can't be combined with training data, got 'Iter"):
        host.train()


def test_a_cut_that_depends_on_the_batch(tokenizer, tmp_path):
    """TRL 0.29 cuts the padded batch at its start."""
    arguments = {**BALANCED, "truncation_mode": "keep_end", "max_length": 8}
    if not CUTS_IN_THE_STEP:
        trainer(FocalPOTrainer, tokenizer, tmp_path, **arguments)
        return
    with pytest.raises(ValueError, match=f"^{KEY} can't be combined with truncation_mode"):
        trainer(FocalPOTrainer, tokenizer, tmp_path, **arguments)


# Without a reference.


def without_reference(cls: Any, config: Any, folder: Path, **arguments: Any) -> Any:
    args = config(str(folder), **{**tiny_trl.SHORT, **STEPS, "beta": 0.3, **arguments})
    # TRL's metrics of these trainers leave out pairs if an epoch's last batch isn't full.
    data = uneven(46)
    return cls(model(0), args, processing_class=tiny_trl.tokenizer(), train_dataset=data)


@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.releases
def test_the_same_run_without_a_reference(tmp_path, loss_type: str, shared: bool):
    arguments = {"loss_type": loss_type, "cpo_alpha": 0.0, "focalpo_shared_prompts": shared}
    found = []
    for balanced in (False, True):
        host = without_reference(
            FocalCPOTrainer, FocalCPOConfig, tmp_path, **{**arguments, KEY: balanced}
        )
        host.train()
        found.append(host)
    assert_same_steps(*found)
    tokens = [
        np.mean([entry["focalpo/tokens"] for entry in host.state.log_history if "loss" in entry])
        for host in found[0 if shared else 1 :]
    ]
    assert len(set(tokens)) == 1  # the same tokens, in different batches


def test_terms_of_a_likelihood(tmp_path):
    words = "is a mean over the tokens of a micro-batch"
    with pytest.raises(ValueError, match=f"^{KEY} .* cpo_alpha, got 1.0: its term {words}"):
        without_reference(FocalCPOTrainer, FocalCPOConfig, tmp_path, **BALANCED)
    with pytest.raises(ValueError, match=f"^{KEY} .* 'orpo': its likelihood term {words}"):
        without_reference(FocalORPOTrainer, FocalORPOConfig, tmp_path, **BALANCED)
