"""TRL's trainer with our loss, against TRL's own and against float64 worked out from the logits."""

from __future__ import annotations

import inspect
import math
from dataclasses import fields, replace
from importlib import import_module
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_trl import (
    GAMMA,
    PAIRS,
    batch,
    loss_and_grads,
    margins_of,
    model,
    trainer,
)
from transformers import LlamaForCausalLM
from trl import DPOTrainer
from trl.trainer import dpo_trainer
from trl_features import FIELDS, LOSS_TYPES

from focalpo_plugins import FocalPOConfig, FocalPOTrainer, focalpo_loss
from focalpo_plugins.registry import get_loss

pytestmark = pytest.mark.releases


def in_this_trl(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that need nothing that this TRL lacks."""
    found = [
        case for case in cases if {*case} <= FIELDS and {*case.get("loss_type", ())} <= LOSS_TYPES
    ]
    assert len(found) >= len(cases) - 2
    return found


def by_formula(z: torch.Tensor) -> torch.Tensor:
    """Eq. 4 as written."""
    p = torch.sigmoid(z)
    return -(p**GAMMA) * torch.log(p)


@pytest.mark.parametrize(
    "arguments",
    in_this_trl(
        [
            {},
            {"label_smoothing": 0.2},
            {"loss_type": ["sigmoid_norm"]},
            {"loss_type": ["sigmoid_norm"], "label_smoothing": 0.2},
            {"loss_type": ["robust"], "label_smoothing": 0.2},
            {
                "loss_type": ["sigmoid", "robust"],
                "loss_weights": [0.7, 2.0],
                "label_smoothing": 0.2,
            },
        ]
    ),
    ids=str,
)
def test_loss_against_the_formula(tokenizer, tmp_path, arguments):
    """sigmoid: (1 - e) L(z) + e L(-z), though TRL itself drops e there.
    robust: ((1 - e) L(z) - e L(-z)) / (1 - 2e), TRL's own weighting of its two terms."""
    host = trainer(FocalPOTrainer, tokenizer, tmp_path, focalpo_gamma=GAMMA, **arguments)
    inputs = batch(host)
    types = arguments.get("loss_type", ["sigmoid"])
    e = arguments.get("label_smoothing", 0.0)
    expected = 0.0
    for loss_type, weight in zip(types, arguments.get("loss_weights", [1.0]), strict=True):
        z = margins_of(host, inputs, per_token=loss_type == "sigmoid_norm")
        if loss_type == "robust":
            losses = ((1 - e) * by_formula(z) - e * by_formula(-z)) / (1 - 2 * e)
        else:
            losses = (1 - e) * by_formula(z) + e * by_formula(-z)
        expected += weight * losses.mean().item()
    assert z.abs().max() > 0.05  # policy and reference differ
    assert loss_and_grads(host, inputs)[0].item() == pytest.approx(expected, rel=1e-5)


def test_sft_beside_sigmoid(tokenizer, tmp_path):
    """The sft term is TRL's own: TRL adds the same to our loss as to its own."""
    with_sft = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.4]}
    loss = {}
    for cls in (DPOTrainer, FocalPOTrainer):
        for name, arguments in (("alone", {}), ("sft", with_sft)):
            host = trainer(cls, tokenizer, tmp_path, **arguments)
            loss[cls, name] = loss_and_grads(host, batch(host))[0].item()
    added = loss[FocalPOTrainer, "sft"] - loss[FocalPOTrainer, "alone"]
    assert added > 0.5
    assert added == pytest.approx(loss[DPOTrainer, "sft"] - loss[DPOTrainer, "alone"], rel=1e-5)


HOST_FEATURES: list[dict[str, Any]] = [
    {},
    {"loss_type": ["sigmoid_norm"]},
    {"loss_type": ["robust"], "label_smoothing": 0.1},
    {"loss_type": ["sigmoid", "sft"]},
    {"ld_alpha": 0.5},
    {"use_weighting": True},
    {"precompute_ref_log_probs": True},
    {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5},
    {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    {"model_kind": "mixtral", "router_aux_loss_coef": 0.3},
    {"peft_config": LoraConfig(r=4, init_lora_weights=False), "reference": None},
]


@pytest.mark.parametrize("feature", in_this_trl(HOST_FEATURES), ids=str)
def test_gamma_zero_is_the_hosts_dpo_to_the_last_bit(tokenizer, tmp_path, feature):
    """Three steps with each of TRL's features around the loss: losses and gradient norms."""
    histories = []
    for cls in (DPOTrainer, FocalPOTrainer):
        arguments = dict(feature)
        kind = arguments.pop("model_kind", "llama")
        if cls is FocalPOTrainer:
            arguments["focalpo_gamma"] = 0.0
        if kind == "mixtral":
            arguments["reference"] = model(1, kind)
        torch.manual_seed(0)
        host = trainer(cls, tokenizer, tmp_path, policy=model(0, kind), **arguments)
        host.train()
        histories.append(
            [
                (entry["loss"], entry["grad_norm"])
                for entry in host.state.log_history
                if "loss" in entry
            ]
        )
    assert len(histories[0]) == 3
    assert histories[0] == histories[1]


@pytest.mark.parametrize("feature", in_this_trl(HOST_FEATURES), ids=str)
def test_gamma_changes_the_loss_with_every_feature(tokenizer, tmp_path, feature):
    """So that the test above can't pass because the loss is DPO's anyway."""
    arguments = dict(feature)
    kind = arguments.pop("model_kind", "llama")
    if kind == "mixtral":
        arguments["reference"] = model(1, kind)
    losses = []
    for gamma in (0.0, GAMMA):
        torch.manual_seed(0)
        policy = model(0, kind)
        host = trainer(
            FocalPOTrainer, tokenizer, tmp_path, policy=policy, focalpo_gamma=gamma, **arguments
        )
        losses.append(loss_and_grads(host, batch(host))[0].item())
    assert losses[1] < losses[0] - 0.01


def test_ref_adapter(tokenizer, tmp_path):
    """Training an existing adapter again: TRL keeps a copy named "ref", the margins start at 0 and
    the first loss is 2^-gamma ln 2."""
    from peft import get_peft_model

    policy = get_peft_model(model(0), LoraConfig(r=4, init_lora_weights=False))
    host = trainer(FocalPOTrainer, tokenizer, tmp_path, policy=policy, reference=None)
    assert "ref" in host.model.peft_config
    loss = loss_and_grads(host, batch(host))[0].item()
    assert loss == pytest.approx(2**-0.05 * math.log(2), rel=1e-6)


def test_diagnostics_in_train_and_eval_logs(tokenizer, tmp_path):
    """The same four pairs, whole or in two accumulation steps, give the same means; the held-out
    pairs' means carry the prefix eval_."""
    logged = []
    for split in ({}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}):
        host = trainer(
            FocalPOTrainer,
            tokenizer,
            tmp_path,
            focalpo_gamma=GAMMA,
            eval_dataset=Dataset.from_list(PAIRS[:3]),
            eval_strategy="steps",
            eval_steps=1,
            max_steps=1,
            **split,
        )
        first = margins_of(host, batch(host))
        host.train()
        logged.append({k: v for entry in host.state.log_history for k, v in entry.items()})
    assert {
        f"{prefix}focalpo/{name}"
        for prefix in ("", "eval_")
        for name in ("p", "weight", "reversed")
    } <= {*logged[0]}
    assert first.numel() == 2
    for name in ("p", "weight", "margin_correct", "margin_incorrect", "reversed"):
        assert logged[0].get(f"focalpo/{name}") == pytest.approx(
            logged[1].get(f"focalpo/{name}"), rel=1e-5
        )
    right = logged[0].get("focalpo/margin_correct")
    assert right is None or right > 0


def test_diagnostics_of_the_first_batch(tokenizer, tmp_path):
    host = trainer(FocalPOTrainer, tokenizer, tmp_path, focalpo_gamma=GAMMA, max_steps=1)
    torch.manual_seed(host.args.seed)
    inputs = batch(host)
    z = margins_of(host, inputs)
    host.compute_loss(host.model, inputs)
    logs: dict[str, float] = {}
    host.log(logs)
    p = torch.sigmoid(z)
    assert logs["focalpo/p"] == pytest.approx(p.mean().item(), rel=1e-5)
    weight = (p**GAMMA * (1 + GAMMA * torch.log(p))).mean().item()
    assert logs["focalpo/weight"] == pytest.approx(weight, rel=1e-5)
    for name, ranked in (("margin_correct", z > 0), ("margin_incorrect", z <= 0)):
        if ranked.any():
            assert logs[f"focalpo/{name}"] == pytest.approx(z[ranked].mean().item(), rel=1e-4)
        else:
            assert f"focalpo/{name}" not in logs


def test_the_fields_say_what_they_do():
    helps = {f.name: f.metadata["help"] for f in fields(FocalPOConfig) if "focalpo" in f.name}
    assert helps["focalpo_gamma"] == "Focusing parameter; 0 is DPO."
    assert all(text.endswith(".") for text in helps.values()) and len(helps) == 11


@pytest.mark.parametrize("part", ["Config", "Trainer"])
@pytest.mark.parametrize(
    "of, module", [("PO", "trl"), ("CPO", "trl.reference_free"), ("ORPO", "trl.reference_free")]
)
def test_public_names(of, module, part):
    """The package's top-level name is the TRL adapter's, with its documentation and arguments."""
    import focalpo_plugins

    name = f"Focal{of}{part}"
    assert name in focalpo_plugins.__all__
    adapter = import_module(f"focalpo_plugins.{module}")
    assert getattr(focalpo_plugins, name) is getattr(adapter, name)
    assert "Raises:" in getattr(focalpo_plugins, name).__doc__


def test_host_is_restored_after_an_error(tokenizer, tmp_path, monkeypatch):
    host = trainer(FocalPOTrainer, tokenizer, tmp_path)
    loss = host.pairwise_loss
    broken = replace(loss.source, loss=lambda *_, **options: 1 / 0)
    monkeypatch.setattr(host._run, "asked", replace(loss, source=broken))
    with pytest.raises(ZeroDivisionError):
        host.compute_loss(host.model, batch(host))
    assert dpo_trainer.F is torch.nn.functional


def test_takes_what_dpo_trainer_takes(tokenizer, tmp_path):
    """In TRL's order: model, reference, arguments, collator, training and evaluation data,
    tokenizer."""
    args = FocalPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=1)
    pairs = Dataset.from_list(PAIRS)
    host = FocalPOTrainer(model(0), model(1), args, None, pairs, pairs.select([0, 1]), tokenizer)
    assert len(host.train_dataset) == 8 and len(host.eval_dataset) == 2
    assert host.processing_class is tokenizer
    ours, theirs = (inspect.signature(cls.__init__) for cls in (FocalPOTrainer, DPOTrainer))
    assert list(ours.parameters) == list(theirs.parameters)


def test_the_default_output_folder(tokenizer, tmp_path, monkeypatch):
    """Named after model and method, as TRL names its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    policy = model(0)
    policy.save_pretrained(tmp_path / "tiny-llama")
    tokenizer.save_pretrained(tmp_path / "tiny-llama")
    for cls, name in ((DPOTrainer, "tiny-llama-DPO"), (FocalPOTrainer, "tiny-llama-FocalPO")):
        for given in ("tiny-llama", LlamaForCausalLM.from_pretrained(tmp_path / "tiny-llama")):
            host = cls(given, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer)
            assert host.args.output_dir == name


def test_gradients_against_the_core(tokenizer, tmp_path):
    """The gradient that reaches the policy is the core's slope at the host's margins, carried back
    through the same logits: TRL's DPO gradient of each pair times the core's weight."""
    from focalpo_plugins import focalpo_weight

    ours = trainer(
        FocalPOTrainer, tokenizer, tmp_path, focalpo_gamma=GAMMA, per_device_train_batch_size=1
    )
    dpo = trainer(DPOTrainer, tokenizer, tmp_path, per_device_train_batch_size=1)
    inputs = batch(ours)
    weight = focalpo_weight(margins_of(ours, inputs), GAMMA).item()
    _, grads = loss_and_grads(ours, inputs)
    _, dpo_grads = loss_and_grads(dpo, inputs)
    for grad, dpo_grad in zip(grads, dpo_grads, strict=True):
        torch.testing.assert_close(grad, weight * dpo_grad, rtol=1e-4, atol=1e-7)
    assert abs(weight - 1) > 0.1


def test_loss_value_is_the_cores(tokenizer, tmp_path):
    """The trainer's loss is the mean of the core's per-pair losses at the host's margins."""
    host = trainer(
        FocalPOTrainer, tokenizer, tmp_path, focalpo_variant="incorrect", focalpo_gamma=1.0
    )
    inputs = batch(host)
    expected = focalpo_loss(margins_of(host, inputs), 1.0, "incorrect").mean().item()
    assert loss_and_grads(host, inputs)[0].item() == pytest.approx(expected, rel=1e-5)
    assert get_loss("focalpo").bind(gamma=1.0, variant="incorrect")(
        margins_of(host, inputs)
    ).shape == (4,)
