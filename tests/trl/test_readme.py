"""The statements of README and docs/ about TRL's trainer and its fused path that no other test
holds."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from page_commands import every_snippet
from tiny_trl import PAIRS, batch, loss_and_grads, margins_of, model, trainer
from transformers import (
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    ProcessorMixin,
    Qwen3Config,
)
from trl import DPOTrainer

from focalpo_plugins import FocalPOConfig, FocalPOTrainer
from focalpo_plugins.compute.fused_loss import IGNORED
from focalpo_plugins.compute.output_layer import check_config
from focalpo_plugins.trl import fused_step

PAGES = ("README.md", "docs/trl.md")


@pytest.mark.parametrize("page", PAGES)
def test_the_snippet(tokenizer, tmp_path, monkeypatch, capsys, page):
    """As it is, with a model's folder, pairs and a tokenizer; bf16, TRL's default, needs a GPU.  What
    else the page has is given a trainer."""
    monkeypatch.chdir(tmp_path)
    model(0).save_pretrained("tiny")
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    train, *others = [snippet.text for snippet in every_snippet() if snippet.page == page]
    assert "import FocalPOConfig, FocalPOTrainer" in train
    given = {"model": "tiny", "pairs": Dataset.from_list(PAIRS), "tokenizer": tokenizer}
    exec(train, given)
    assert (
        "gamma=0.05 variant=correct z*=-20.00 loss_at_margin_0=0.6695 beta=0.01 trainer=Focal"
        in (capsys.readouterr().err)
    )
    for snippet in others:
        exec(snippet, {"trainer": trainer(FocalPOTrainer, tokenizer, tmp_path)})
        said = capsys.readouterr().out
        assert " x 8 ranks (gpus)" in said and said.endswith("0 warnings, no errors\n")


@pytest.mark.parametrize(
    "types", [["sigmoid_norm"], ["sigmoid", "sigmoid_norm"], ["sigmoid_norm", "robust"]], ids=str
)
def test_the_logged_margin_is_that_of_the_first_loss(tokenizer, tmp_path, types):
    """After length normalisation if the first one is `sigmoid_norm`, and without it otherwise."""
    host = trainer(FocalPOTrainer, tokenizer, tmp_path, loss_type=types)
    inputs = batch(host)
    host.compute_loss(host.model, inputs)
    logs: dict[str, float] = {}
    host.log(logs)
    p = {norm: margins_of(host, inputs, norm).sigmoid().mean().item() for norm in (True, False)}
    assert abs(p[True] - p[False]) > 1e-3
    assert logs["focalpo/p"] == pytest.approx(p[types[0] == "sigmoid_norm"], rel=1e-5)


def test_trl_itself_drops_label_smoothing(tokenizer, tmp_path):
    """With the loss type `sigmoid`; test_trainer.py compares FocalPO's own with the formula."""
    losses = []
    for cls in (DPOTrainer, FocalPOTrainer):
        for smoothing in (0.0, 0.2):
            host = trainer(cls, tokenizer, tmp_path, label_smoothing=smoothing)
            losses.append(loss_and_grads(host, batch(host))[0].item())
    assert losses[0] == losses[1]
    assert abs(losses[2] - losses[3]) > 1e-3


@pytest.mark.fused
def test_what_the_fused_path_does_not_log(tokenizer, tmp_path):
    logs: list[dict[str, float]] = [{}, {}]
    for fused, entry in zip((False, True), logs, strict=True):
        host = trainer(FocalPOTrainer, tokenizer, tmp_path, focalpo_fused=fused)
        host.compute_loss(host.model, batch(host))
        host.log(entry)
    assert {*logs[0]} - {*logs[1]} == {"entropy", "mean_token_accuracy"}
    assert not {*logs[1]} - {*logs[0]}


@pytest.mark.fused
def test_the_fused_path_leaves_prompts_and_padding_out(tokenizer, tmp_path, monkeypatch):
    """Only the answers' tokens have a label; as many logits are held as by default."""
    given = []

    def spy(states, weight, labels, *more, **named):
        given.append((labels, named))
        return fused_pairwise_loss(states, weight, labels, *more, **named)

    fused_pairwise_loss = fused_step.fused_pairwise_loss
    monkeypatch.setattr(fused_step, "fused_pairwise_loss", spy)
    host = trainer(FocalPOTrainer, tokenizer, tmp_path, focalpo_fused=True)
    inputs = batch(host)
    host.compute_loss(host.model, inputs)
    ((labels, named),) = given
    answers = inputs["completion_mask"][:, 1:].bool()
    assert torch.equal(labels[:, :-1] != IGNORED, answers)
    assert (labels[:, -1] == IGNORED).all()
    assert 0 < answers.sum() < inputs["attention_mask"].sum() < inputs["input_ids"].numel()
    assert "logits_at_once" not in named


@pytest.mark.fused
@pytest.mark.parametrize(
    "config, name",
    [
        (Gemma2Config(), "final_logit_softcapping"),
        (CohereConfig(), "logit_scale"),
        (GraniteConfig(logits_scaling=8.0), "logits_scaling"),
    ],
    ids=lambda given: type(given).__name__,
)
def test_the_fused_path_refuses_models_that_change_their_logits(config, name):
    with pytest.raises(ValueError, match=f"^focalpo_fused can't be combined .* whose {name} is"):
        check_config(config, "focalpo_fused")


@pytest.mark.fused
@pytest.mark.parametrize(
    "kind", [LlamaConfig, MistralConfig, MixtralConfig, Qwen3Config, Phi3Config, Gemma3TextConfig]
)
def test_the_fused_path_takes_models_that_do_not(kind):
    check_config(kind(), "focalpo_fused")


@pytest.mark.fused
def test_the_fused_path_refuses_vision_models(tmp_path):
    """By their processor, before the model, which doesn't exist, is loaded."""
    processor = object.__new__(type("Eyes", (ProcessorMixin,), {}))
    args = FocalPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to="none", focalpo_fused=True
    )
    with pytest.raises(ValueError, match="can't be combined with a vision model, got 'Eyes'"):
        FocalPOTrainer("no/such-model", args=args, processing_class=processor)
