"""``--focalpo.shared_prompts``: OpenRLHF's numbers from fewer tokens, in whole runs.

The policy stays where it is, since two runs that learn in bf16 drift apart by whatever rounds, and
its reference is another model, so that margins are not 0.  0.1 nats are allowed, since bf16 rounds
otherwise what is laid out otherwise; ``test_log_probs_and_gradients_in_float64`` allows nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import one_batch
import pytest
import torch

from focalpo_plugins.sharing import SharedPrompts

# One worker makes the runs that several tests share.
shares_runs = pytest.mark.xdist_group("shared")

OURS = ("--loss", "focalpo")
SHARED = (*OURS, "--focalpo.shared_prompts")
TAGS = ("train/loss", "train/chosen_reward", "train/reject_reward", "train/focalpo/p")
LORA = ("--ds.lora.rank", "4", "--ds.lora.alpha", "16")


@pytest.mark.xdist_group("in one process")
def test_log_probs_and_gradients_in_float64(
    openrlhf: SimpleNamespace, forward_only: Any, tmp_path: Path
):
    """OpenRLHF's own forward pass on the batch that every host gets, whose pairs begin with prompts
    of 2 to 5 tokens: policy and reference, with and without sharing."""
    batch, prompts = one_batch.padded([0, 1, 2, 3])
    for seed in (1, 2):
        folder = tmp_path / str(seed)
        one_batch.model(seed).save_pretrained(folder)
        actor = openrlhf.Actor(str(folder), attn_implementation="sdpa", param_dtype="bf16")
        actor = actor.double().eval()
        # OpenRLHF casts logits to float32, and log-probs are of these.
        found = []
        shared = SharedPrompts("--focalpo.shared_prompts", lambda check: check())
        for ours in (False, True):
            if ours:
                shared.attach(actor.model)
            actor.zero_grad()
            with shared.of(4) if ours else nullcontext():
                chosen, rejected, *_ = forward_only.concatenated_forward(actor, *batch, prompts)
            (chosen - rejected).sum().backward()
            gradient = torch.cat([w.grad.flatten() for w in actor.parameters()])
            found.append((torch.cat([chosen, rejected]).detach(), gradient))
        (logps, gradient), (of_ours, our_gradient) = found
        torch.testing.assert_close(of_ours, logps, rtol=0, atol=1e-5)
        assert (our_gradient - gradient).norm() < 1e-6 * gradient.norm()
        # Prompts and both answers: 3 + 6 + 2, 5 + 1 + 9, 2 + 4 + 7 and 4 + 5 + 5 tokens, instead of
        # 8 sequences as long as the longest, 5 + 9.
        assert (shared.tokens, shared.tokens_before) == (11 + 15 + 13 + 14, 8 * 14)


@pytest.fixture(scope="module")
def stays(few: Path, another: Path) -> tuple[str, ...]:
    evaluate = ("--eval.dataset", str(few / "test.jsonl"), "--eval.split", "train")
    # A schedule divides by the learning rate in OpenRLHF 0.9.
    rests = ("--adam.lr", "1e-12", "--model.beta", "1")
    return (*rests, "--ref.model_name_or_path", str(another), *evaluate)


@pytest.fixture(scope="module")
def runs(train_many: Callable, stays) -> dict:
    """On one rank."""
    return train_many(
        {
            "plain": (*stays, *OURS),
            "shared": (*stays, *SHARED),
            "precomputed": (*stays, *SHARED, "--focalpo.precompute_ref"),
            "read": (*stays, *SHARED, "--focalpo.precompute_ref"),
            "sdpa": (*stays, *SHARED, "--ds.attn_implementation", "sdpa"),
        }
    )


def same(ours, plain, near: float = 0.1) -> None:
    assert ours.returncode == plain.returncode == 0, ours.output
    found, expected = ours.steps(), plain.steps()
    assert sorted(found) == sorted(expected) == [1, 2, 3, 4, 5]
    for step, values in expected.items():
        for tag in TAGS:
            assert found[step][tag] == pytest.approx(values[tag], abs=near), (step, tag)
        assert found[step]["train/grad_norm"] == pytest.approx(values["train/grad_norm"], rel=0.05)
    for tag in ("eval/eval_loss", "eval/focalpo/p"):
        assert found[5][tag] == pytest.approx(expected[5][tag], abs=near)


@shares_runs
@pytest.mark.releases
@pytest.mark.parametrize("name", ["shared", "precomputed", "sdpa"])
def test_the_same_numbers(runs, name: str):
    same(runs[name], runs["plain"])
    losses = [values["train/loss"] for values in runs["plain"].steps().values()]
    assert max(losses) - min(losses) > 0.1


@shares_runs
@pytest.mark.releases
def test_what_is_said_and_logged(runs):
    (line,) = runs["shared"].said("focalpo_plugins: active")
    assert " prompts=shared attention='SDPA by segments' trainer=PairwiseDPOTrainer " in line
    (line,) = runs["plain"].said("focalpo_plugins: active")
    assert "prompts=" not in line
    for step, values in runs["shared"].steps("train/focalpo/").items():
        assert 0.2 < values["tokens_saved"] < 0.8, step
        # The saved share refers to the padded batch, which has this many tokens.
        padded = values["tokens"] / (1 - values["tokens_saved"])
        assert padded == pytest.approx(round(padded), rel=1e-5)
    assert not any("tokens" in tag for tag in runs["plain"].steps("train/focalpo/")[1])


@shares_runs
def test_plain_and_shared_reference_have_files_of_their_own(
    train_many: Callable, stays, tmp_path: Path
):
    """They round differently, so a run reads only the file of its own kind."""
    cache = ("--focalpo.precompute_ref", "--focalpo.precompute_dir", str(tmp_path))
    asked = {"shared": (*stays, *SHARED, *cache), "plain": (*stays, *OURS, *cache)}
    found = train_many({**asked, "again": asked["shared"]})
    for name, how in (("shared", "computed"), ("plain", "computed"), ("again", "read from")):
        assert found[name].returncode == 0, found[name].output
        assert len(found[name].said(f" pairs {how}")) == 1, name
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("stage", ["2", pytest.param("3", marks=pytest.mark.releases)])
def test_two_ranks(train: Callable, stays, stage: str):
    """Under ZeRO-3 each backbone gathers its weights during the forward pass."""
    plain, shared = (
        train(*stays, *loss, "--ds.zero_stage", stage, ranks=2) for loss in (OURS, SHARED)
    )
    same(shared, plain)


def test_an_adapter_under_checkpointing(train_many: Callable):
    """The policy starts as its reference, and learns."""
    flags = (*SHARED, *LORA, "--ds.zero_stage", "2", "--model.gradient_checkpointing_enable")
    run = train_many({"": flags})[""]
    assert run.returncode == 0, run.output
    assert len(run.said("first step: policy and reference agree, largest margin 0.")) == 1
    losses = [values["train/loss"] for _, values in sorted(run.steps().items())]
    assert losses[0] == pytest.approx(0.66954, abs=1e-5)
    assert losses[-1] != losses[0]


@shares_runs
def test_the_first_step_is_looked_at_where_both_are_the_same(train_many: Callable, runs):
    """A reference that differs from the policy has no such line."""
    assert not runs["plain"].said("first step")
    run = train_many({"": OURS})[""]
    assert len(run.said("first step: policy and reference agree, largest margin 0.")) == 1


@shares_runs
@pytest.mark.parametrize(
    "flags, message",
    [
        (("--ds.ring_attn_size", "2"), "can't be combined with --ds.ring_attn_size, got 2"),
        (
            ("--ds.tensor_parallel_size", "2"),
            "can't be combined with --ds.tensor_parallel_size, got",
        ),
    ],
)
def test_refused(commands: Callable, flags: tuple[str, ...], message: str):
    ((code, output),) = commands([[*SHARED, "--ds.attn_implementation", "eager", *flags]])
    assert code == 2 and f"--focalpo.shared_prompts {message}" in " ".join(output.split())
