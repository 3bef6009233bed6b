"""FocalPO on margins without a reference: CPO's, SimPO's and ORPO's, as TRL computes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_trl
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_trl import GAMMA, PAIRS, SHORT
from transformers import T5Config, T5ForConditionalGeneration
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from focalpo_plugins import (
    FocalCPOConfig,
    FocalCPOTrainer,
    FocalORPOConfig,
    FocalORPOTrainer,
)
from focalpo_plugins.registry import get_loss
from focalpo_plugins.trl.reference_free import CPOLossMixin

CONFIGS = {
    CPOTrainer: CPOConfig,
    ORPOTrainer: ORPOConfig,
    FocalCPOTrainer: FocalCPOConfig,
    FocalORPOTrainer: FocalORPOConfig,
}
SIMPO = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.7, "cpo_alpha": 0.0}
# For each margin TRL's trainer, ours, and the arguments.
MARGINS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "cpo": (CPOTrainer, FocalCPOTrainer, {"beta": 0.3}),
    "simpo": (CPOTrainer, FocalCPOTrainer, SIMPO),
    "simpo, smoothed, with its SFT term": (
        CPOTrainer,
        FocalCPOTrainer,
        {**SIMPO, "label_smoothing": 0.1, "cpo_alpha": 0.5},
    ),
    "AlphaPO": (CPOTrainer, FocalCPOTrainer, {**SIMPO, "alpha": 0.2}),
    "orpo": (ORPOTrainer, FocalORPOTrainer, {"beta": 0.3}),
}


def trainer(cls: type, folder: Path, *, pairs: Any = None, held_out: Any = None, **arguments: Any):
    arguments = {**SHORT, "max_length": 64, **arguments}
    peft_config = arguments.pop("peft_config", None)
    policy = arguments.pop("policy", None)
    config = next(CONFIGS[base] for base in cls.__mro__ if base in CONFIGS)
    return cls(
        tiny_trl.model(0) if policy is None else policy,
        args=config(str(folder), **arguments),
        processing_class=tiny_trl.tokenizer(),
        train_dataset=Dataset.from_list(PAIRS if pairs is None else pairs),
        eval_dataset=None if held_out is None else Dataset.from_list(held_out),
        peft_config=peft_config,
    )


def logged(host: Any, *names: str) -> list[list[float]]:
    return [[entry[name] for name in names] for entry in host.state.log_history if "loss" in entry]


def losses(host: Any) -> list[list[float]]:
    return logged(host, "loss", "grad_norm")


@pytest.mark.releases
@pytest.mark.parametrize("margin", MARGINS)
def test_gamma_zero_is_the_hosts_own_to_the_last_bit(margin: str, tmp_path: Path):
    theirs, ours, arguments = MARGINS[margin]
    found = []
    for cls, more in ((theirs, {}), (ours, {"focalpo_gamma": 0.0})):
        host = trainer(cls, tmp_path, held_out=PAIRS[:5], **arguments, **more)
        host.train()
        found.append((losses(host), host.evaluate()["eval_loss"]))
    assert found[0] == found[1]
    assert len(found[0][0]) == 3


def encoder_decoder() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 43,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 1,
        "num_heads": 2,
    }
    return T5ForConditionalGeneration(
        T5Config(
            **sizes, dropout_rate=0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0
        )
    )


@pytest.mark.parametrize("margin", ["cpo", "simpo", "orpo"])
def test_an_encoder_decoder(margin: str, tmp_path: Path):
    """The host's own loss to the last bit at gamma 0, another loss at another gamma; the same
    faults of its data, which have other columns, are refused. No answer is cut by `max_length`,
    shorter here."""
    theirs, ours, arguments = MARGINS[margin]
    arguments = {**arguments, "max_completion_length": 16, "max_length": 2}
    found = []
    for cls, more in (
        (theirs, {}),
        (ours, {"focalpo_gamma": 0.0}),
        (ours, {"focalpo_gamma": GAMMA}),
    ):
        host = trainer(cls, tmp_path, policy=encoder_decoder(), **arguments, **more)
        host.train()
        found.append(losses(host))
    assert found[0] == found[1] != found[2]
    alike = [{**pair, "rejected": pair["chosen"]} for pair in PAIRS]
    with pytest.raises(ValueError, match="8 of 8 pairs have identical answers"):
        trainer(ours, tmp_path, policy=encoder_decoder(), pairs=alike, **arguments)
    with pytest.raises(
        ValueError, match="shared_prompts can't be combined with an encoder, got 't5'"
    ):
        trainer(ours, tmp_path, policy=encoder_decoder(), **arguments, focalpo_shared_prompts=True)


def margins_and_nll(host: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The margins ``(B,)`` as their papers write them, and the chosen answers' mean negative
    log-likelihood, in float64 from the logits on."""
    sums, counts, nll = [], [], []
    for side in ("chosen", "rejected"):
        ids, labels = batch[f"{side}_input_ids"], batch[f"{side}_labels"]
        with torch.no_grad():
            logits = host.model(ids, attention_mask=batch[f"{side}_attention_mask"]).logits
        found = logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        trained = labels[:, 1:] != -100
        sums.append((found * trained).sum(1))
        counts.append(trained.sum(1))
        if side == "chosen":
            real = batch["chosen_attention_mask"][:, 1:].bool()
            nll = [-found[trained].mean(), -found[real].mean()]
    means = [total / count for total, count in zip(sums, counts, strict=True)]
    if isinstance(host, ORPOTrainer):
        odds = [mean - torch.log1p(-mean.exp()) for mean in means]
        return odds[0] - odds[1], nll[1]  # of prompt and answer
    if host.loss_type == "simpo":
        return host.beta * (means[0] - means[1]) - host.simpo_gamma, nll[0]
    return host.beta * (sums[0] - sums[1]), nll[0]


@pytest.mark.releases
@pytest.mark.parametrize("margin", ["cpo", "simpo", "orpo"])
def test_the_loss_is_the_papers_of_that_margin(margin: str, tmp_path: Path):
    """``-p**gamma log p`` with p = sigmoid(z); CPO adds its SFT term once; ORPO is its own loss
    plus beta times ours."""
    _, ours, arguments = MARGINS[margin]
    host = trainer(ours, tmp_path, focalpo_gamma=GAMMA, **arguments)
    batch = next(iter(host.get_train_dataloader()))
    z, nll = margins_and_nll(host, batch)
    log_p = -torch.log1p(torch.exp(-z))
    loss = (-(log_p * GAMMA).exp() * log_p).mean()
    expected = {"cpo": loss + nll, "simpo": loss, "orpo": nll + 0.3 * loss}[margin]
    found = host.compute_loss(host.model, batch)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    # The logged values come from the same margins.
    host.log(logs := {"loss": 0.0})
    assert logs["focalpo/p"] == pytest.approx(z.sigmoid().mean().item(), rel=1e-5)
    assert z.abs().min() > 1e-3


@pytest.mark.releases
def test_a_likelihood_beside_simpo_is_said(tmp_path: Path, capsys):
    """TRL's cpo_alpha is 1.0 unless it is set; CPO's own loss has the term."""
    said = (
        "focalpo_plugins: the loss adds 1 x the chosen answer's negative log-likelihood (cpo_alpha"
    )
    without = {key: value for key, value in SIMPO.items() if key != "cpo_alpha"}
    for arguments, times in ((without, 1), (SIMPO, 0), ({"beta": 0.3}, 0)):
        host = trainer(FocalCPOTrainer, tmp_path, **arguments)
        host.train()
        found = capsys.readouterr().err
        assert found.count(said) == times
        assert found.count("For SimPO itself set cpo_alpha to 0.") == times


def test_the_second_log_sigmoid_counts_only_where_it_is_multiplied(tmp_path, add_loss):
    """TRL calls for -z even without smoothing, and multiplies by 0: an infinite loss would make the
    product NaN."""
    seen = []
    training = False  # not yet: a loss is tried first

    def once(margins):
        seen.append(margins.detach())
        return margins.square() / (0 if training and len(seen) > 1 else 1)

    add_loss("once", once)
    host = trainer(FocalCPOTrainer, tmp_path, **SIMPO, focalpo_pairwise_loss="once")
    batch = next(iter(host.get_train_dataloader()))
    seen.clear()
    training = True
    assert host.compute_loss(host.model, batch).isfinite()
    assert len(seen) == 1


@pytest.mark.parametrize("margin", ["cpo", "simpo", "orpo"])
def test_each_pair_is_counted_once(margin: str, tmp_path: Path):
    """11 pairs, 4 a batch, 3 accumulated: 4 + 4 + 3, and 5 held out by 3."""
    _, ours, arguments = MARGINS[margin]
    pairs = [PAIRS[i % 8] for i in range(11)]
    host = trainer(
        ours, tmp_path, pairs=pairs, held_out=PAIRS[:5], **arguments, max_steps=1,
        gradient_accumulation_steps=3, per_device_eval_batch_size=3,
    )  # fmt: skip
    seen: dict[str, list[float]] = {"train": [], "eval": []}
    count = host._count

    def watched(margins: torch.Tensor) -> None:
        count(margins)
        training = host.model.training
        pairs = host._run._windows[training].sums[0]
        seen["train" if training else "eval"].append(pairs.item())

    host._count = watched
    host.train()
    host.evaluate()
    assert seen == {"train": [4, 8, 11], "eval": [3, 5]}


@pytest.mark.parametrize("margin", ["simpo", "orpo"])
def test_a_margin_that_is_not_finite_stops_before_the_weights_change(margin: str, tmp_path: Path):
    _, ours, arguments = MARGINS[margin]
    host = trainer(ours, tmp_path, **arguments)
    with torch.no_grad():
        host.model.lm_head.weight[7] = torch.nan
    before = [weight.clone() for weight in host.model.parameters()]
    with pytest.raises(FloatingPointError, match="focalpo: reward margins are not finite, step 1"):
        host.train()
    after = list(host.model.parameters())
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after, strict=True)
    )


@pytest.mark.parametrize("margin", ["cpo", "simpo", "orpo"])
def test_shared_prompts(margin: str, tmp_path: Path):
    _, ours, arguments = MARGINS[margin]
    found = []
    for shared in (False, True):
        host = trainer(ours, tmp_path, **arguments, focalpo_shared_prompts=shared)
        host.train()
        found.append(losses(host))
    for plain, own in zip(*found, strict=True):
        assert own == pytest.approx(plain, rel=2e-5)
    saved = [saved for (saved,) in logged(host, "focalpo/tokens_saved")]
    assert all(0 < share < 1 for share in saved)


def test_an_adapter(tmp_path: Path):
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=True, lora_dropout=0.0)
    found = []
    for cls, more in ((CPOTrainer, {}), (FocalCPOTrainer, {"focalpo_gamma": 0.0})):
        torch.manual_seed(0)
        host = trainer(cls, tmp_path, **SIMPO, **more, peft_config=lora)
        host.train()
        found.append(losses(host))
    assert found[0] == found[1]


class Twice(CPOTrainer):
    """A TRL that has moved its loss."""

    def cpo_loss(self, *logps):
        super().cpo_loss(*logps)
        return super().cpo_loss(*logps)


class Around(CPOTrainer):
    """A TRL that no longer calls the method."""

    def get_batch_loss_metrics(self, model, batch, train_eval="train"):
        return torch.zeros((), requires_grad=True), {}


@pytest.mark.parametrize(
    "host, message",
    [
        (
            Twice,
            "called logsigmoid 4 times for loss_type 'simpo', but focalpo_plugins .* expects 2: its",
        ),
        (Around, "it called the loss 0 times for 1 batch. .* Install trl 0.29.0 to 1.16.0"),
    ],
)
def test_a_trl_that_has_moved_its_loss_is_stopped(host: type, message: str, tmp_path: Path):
    class Ours(CPOLossMixin, host):
        pass

    built = trainer(Ours, tmp_path, **SIMPO)
    built.set_loss(get_loss("focalpo").bind())
    with pytest.raises(RuntimeError, match=message):
        built.train()


def test_no_loss_yet(tmp_path: Path):
    class Ours(CPOLossMixin, CPOTrainer):
        pass

    with pytest.raises(
        RuntimeError, match=r"has no pairwise loss yet, and would train CPO: call set_loss\(\)"
    ):
        trainer(Ours, tmp_path, **SIMPO).train()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"loss_type": "hinge"},
            "^loss_type must be one of sigmoid, simpo, got 'hinge': it has no",
        ),
        ({"loss_type": "ipo"}, "^loss_type must be one of sigmoid, simpo, got 'ipo'"),
        ({"beta": -1.0}, "^beta must be a finite number above 0, got -1.0"),
        ({"label_smoothing": 0.5}, "^label_smoothing must be at least 0 and below 0.5, got 0.5"),
        ({"cpo_alpha": float("nan")}, "^cpo_alpha must be a finite number of at least 0, got nan"),
        ({"focalpo_gamma": 2.0}, "^focalpo_gamma must be below 1/ln 2"),
        ({"focalpo_gamma_end": -1.0}, "^focalpo_gamma_end must be a finite number of at least 0"),
    ],
)
def test_refused(arguments: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        trainer(FocalCPOTrainer, tmp_path, **{**SIMPO, **arguments})


@pytest.mark.releases
@pytest.mark.parametrize(
    "cls, config", [(FocalCPOTrainer, FocalCPOConfig), (FocalORPOTrainer, FocalORPOConfig)]
)
def test_batches_of_different_sizes(cls: type, config: type, tmp_path: Path):
    """transformers has the value from 5.17 on, and trains pairs of short batches with more weight."""
    args = config(str(tmp_path), use_cpu=True, bf16=False)
    args.train_sampling_strategy = "batch_rebalance"
    with pytest.raises(ValueError, match="^train_sampling_strategy must be another one, got"):
        cls(tiny_trl.model(0), args=args)


@pytest.mark.parametrize(
    "cls, config, needed",
    [
        (FocalCPOTrainer, CPOConfig, "FocalCPOConfig"),
        (FocalORPOTrainer, ORPOConfig, "FocalORPOConfig"),
    ],
)
def test_a_plain_config_has_no_gamma(cls: type, config: type, needed: str, tmp_path: Path):
    args = config(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(TypeError, match=f"^args must be a {needed}, got {config.__name__}"):
        cls(tiny_trl.model(0), args=args)


def test_data_that_nothing_can_be_learnt_from(tmp_path: Path):
    alike = [{**pair, "rejected": pair["chosen"]} for pair in PAIRS]
    with pytest.raises(ValueError, match="8 of 8 pairs have identical answers"):
        trainer(FocalORPOTrainer, tmp_path, pairs=alike)
    with pytest.raises(ValueError, match="train_dataset must hold a pair, got none"):
        trainer(FocalORPOTrainer, tmp_path, pairs=[])


def test_a_token_without_an_embedding(tmp_path: Path):
    """The tokenizer has a 44th token, and the policy 43 embeddings."""
    tokenizer = tiny_trl.tokenizer()
    tokenizer.add_tokens(["<new>"])
    pairs = [{**pair, "rejected": f"{pair['rejected']} <new>"} for pair in PAIRS]
    with pytest.raises(
        ValueError, match="^the policy must have an embedding for each token of the"
    ):
        FocalCPOTrainer(
            tiny_trl.model(0),
            args=FocalCPOConfig(str(tmp_path), **SHORT, **SIMPO, max_length=64),
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(pairs),
        )


def test_the_start_up_line_names_the_margin(tmp_path: Path, capsys):
    host = trainer(FocalCPOTrainer, tmp_path, **SIMPO)
    host.train()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "active" in line]
    assert "margin=simpo beta=2.0 simpo_gamma=0.7 cpo_alpha=0.0 label_smoothing=0.0" in line
    assert "first step" not in line


def test_the_closing_line_has_the_loss_of_the_held_out_data(tmp_path: Path, capsys):
    """Not the likelihood that TRL logs beside it."""
    host = trainer(
        FocalCPOTrainer, tmp_path, beta=0.3, held_out=PAIRS, eval_strategy="steps", eval_steps=3
    )
    host.train()
    (found,) = (entry for entry in host.state.log_history if "eval_loss" in entry)
    assert found["eval_nll_loss"] != found["eval_loss"]
    assert f"; held out: loss {found['eval_loss']:.3f}, " in capsys.readouterr().err


def test_a_checkpoint_of_another_margin_is_refused(tmp_path: Path):
    host = trainer(FocalCPOTrainer, tmp_path, **SIMPO, save_strategy="steps", save_steps=1)
    host.train()
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    record = state["stateful_callbacks"]["_Record"]["args"]["record"]
    assert record["margin"] == "simpo"
    assert record["simpo_gamma"] == 0.7
    for changed, message in (
        ({"loss_type": "sigmoid"}, "focalpo_margin was 'simpo', got 'cpo'"),
        ({"simpo_gamma": 0.1}, "simpo_gamma was 0.7, got 0.1"),
        ({"cpo_alpha": 1.0}, "cpo_alpha was 0.0, got 1.0"),
        ({"alpha": 0.2}, "alpha was 0.0, got 0.2"),
        ({"label_smoothing": 0.1}, "label_smoothing was 0.0, got 0.1"),
        ({"max_length": 32}, "max_length was 64, got 32"),
    ):
        other = trainer(FocalCPOTrainer, tmp_path, **{**SIMPO, **changed})
        with pytest.raises(ValueError, match=message):
            other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
