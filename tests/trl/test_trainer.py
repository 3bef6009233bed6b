"""TRL's trainer with our loss, against TRL's own and against float64 worked out from the logits."""

from __future__ import annotations

import copy
import gc
import inspect
import json
import math
import re
import shutil
import weakref
from collections.abc import Callable
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from accelerate import ParallelismConfig
from datasets import Dataset
from peft import LoraConfig
from tiny_trl import (
    FUSED,
    GAMMA,
    PAIRS,
    SGD,
    batch,
    loss_and_grads,
    margins_of,
    model,
    on_disk,
    on_two_ranks,
    run_forked,
    trainer,
    without_triton,
)
from transformers import LlamaForCausalLM
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer

from focalpo_plugins import FocalPOConfig, FocalPOTrainer, focalpo_loss
from focalpo_plugins.registry import get_loss
from focalpo_plugins.trl import PairwiseLossMixin

pytestmark = pytest.mark.releases

# Loss types that this TRL has, by its own source, and fields of its config.
LOSS_TYPES = {*re.findall(r'loss_type == "(\w+)"', Path(dpo_trainer.__file__).read_text())}
OURS_IS_FUSED = hasattr(DPOTrainer, "_compute_loss_liger") and not hasattr(
    DPOTrainer, "_truncate_inputs"
)
EACH_PATH = [None, *(pytest.param(key, marks=pytest.mark.fused) for key in FUSED)]
FIELDS = {*DPOConfig.__dataclass_fields__, "model_kind", "peft_config", "reference"}


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


@pytest.mark.fused
@pytest.mark.parametrize("key", FUSED)
@pytest.mark.parametrize("smoothing", (0.0, 0.2))
@pytest.mark.parametrize(
    "variant, gamma",
    [("correct", GAMMA), ("correct_exact", GAMMA), ("incorrect", 1.0), ("correct", 0.0)],
)
def test_fused_equals_the_plain_path(tokenizer, tmp_path, variant, gamma, smoothing, key):
    options = {"focalpo_gamma": gamma, "focalpo_variant": variant, "label_smoothing": smoothing}
    plain = trainer(FocalPOTrainer, tokenizer, tmp_path, **options)
    fused = trainer(FocalPOTrainer, tokenizer, tmp_path, **options, **FUSED[key])
    inputs = batch(plain)
    expected, expected_grads = loss_and_grads(plain, inputs)
    loss, grads = loss_and_grads(fused, inputs)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert len(grads) == len(expected_grads) > 0
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-6)
    logs: list[dict[str, float]] = [{}, {}]
    for host, entry in zip((plain, fused), logs, strict=True):
        host.log(entry)
    assert len([name for name in logs[1] if name.startswith("focalpo/")]) >= 4
    # Everything that TRL's own fused path logs, with the plain path's values.
    sides = [f"{what}/{side}" for what in ("rewards", "logps", "logits") for side in SIDES]
    assert {"num_tokens", "rewards/accuracies", "rewards/margins", *sides} <= {*logs[1]}
    for name, value in logs[1].items():
        assert value == pytest.approx(logs[0][name], rel=1e-4, abs=1e-6), name


SIDES = ("chosen", "rejected")
LORA = LoraConfig(r=4, init_lora_weights=False)
# What else each is trained with.
FUSED_WITH: dict[str, dict[str, Any]] = {
    "nothing": {},
    "another reference": {"reference": "another"},
    "precomputed": {"precompute_ref_log_probs": True},
    "precomputed from another": {"reference": "another", "precompute_ref_log_probs": True},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "lora": {"peft_config": LORA},
    "lora, precomputed": {"peft_config": LORA, "precompute_ref_log_probs": True},
    "lora beside a trained head": {
        "peft_config": LoraConfig(r=4, init_lora_weights=False, modules_to_save=["lm_head"])
    },
    "an adapter trained before": {"policy": "adapted"},
    "an adapter trained before, precomputed": {
        "policy": "adapted",
        "precompute_ref_log_probs": True,
    },
    "tied embeddings": {"tied": True},
    "synchronised": {
        "reference": "another",
        "sync_ref_model": True,
        "ref_model_sync_steps": 1,
        "ref_model_mixup_alpha": 0.5,
    },
    "bf16": {"bf16": True, "reference": "another"},
}


def history(tokenizer, folder: Path, feature: str, **more: Any) -> tuple[FocalPOTrainer, list]:
    """Three steps and an evaluation after each; without another reference, the earlier policy."""
    from peft import get_peft_model

    arguments = {"reference": None, **FUSED_WITH[feature], **more}
    torch.manual_seed(0)
    policy = model(0, tied=arguments.pop("tied", False))
    if arguments.get("peft_config") is None and arguments["reference"] is None:
        arguments["reference"] = copy.deepcopy(policy)
    if arguments.pop("policy", None) == "adapted":
        policy, arguments["reference"] = get_peft_model(policy, LORA), None
    host = trainer(
        FocalPOTrainer,
        tokenizer,
        folder,
        policy=policy,
        eval_dataset=Dataset.from_list(PAIRS[:3]),
        eval_strategy="steps",
        eval_steps=1,
        focalpo_gamma=GAMMA,
        **arguments,
    )
    host.train()
    return host, [entry for entry in host.state.log_history if "train_runtime" not in entry]


@pytest.mark.fused
@pytest.mark.parametrize("feature", FUSED_WITH)
def test_fused_trains_as_the_plain_path(tokenizer, tmp_path, feature):
    """Every value that both paths log, in training and evaluation, step for step."""
    _, plain = history(tokenizer, tmp_path / "plain", feature)
    host, fused = history(tokenizer, tmp_path / "fused", feature, focalpo_fused=True)
    assert len(fused) == len(plain) == 6
    # Under bf16 the plain path rounds the logits' gradients at other places.
    rel = 2e-2 if feature == "bf16" else 1e-4
    compared = set()
    for ours, theirs in zip(fused, plain, strict=True):
        names = {name for name in ours.keys() & theirs.keys() if "runtime" not in name}
        for name in {name for name in names if "per_second" not in name}:
            assert ours[name] == pytest.approx(theirs[name], rel=rel, abs=rel), name
            compared.add(name)
    assert {"loss", "grad_norm", "rewards/margins", "eval_loss", "eval_focalpo/p"} <= compared
    if "precompute" in str(FUSED_WITH[feature]):
        assert host.ref_model is None


@pytest.mark.parametrize("key", [None, pytest.param("focalpo_fused", marks=pytest.mark.fused)])
def test_a_compiled_model_trains_as_it_is(tokenizer, tmp_path, key: str | None):
    """`torch_compile` compiles the model; our part of the step is computed the same way."""
    ours = {key: True} if key else {}

    def losses(**arguments: Any) -> list[float]:
        host = trainer(FocalPOTrainer, tokenizer, tmp_path, focalpo_gamma=0.5, **ours, **arguments)
        host.train()
        return [entry["loss"] for entry in host.state.log_history if "loss" in entry]

    compiled = losses(torch_compile=True, torch_compile_backend="aot_eager")
    assert compiled == pytest.approx(losses(), rel=1e-5)
    assert len(set(compiled)) == 3


@pytest.mark.fused
def test_gamma_zero_fused_is_the_hosts_plain_dpo(tokenizer, tmp_path):
    histories = []
    for cls, more in (
        (DPOTrainer, {}),
        (FocalPOTrainer, {"focalpo_gamma": 0.0, "focalpo_fused": True}),
    ):
        torch.manual_seed(0)
        host = trainer(cls, tokenizer, tmp_path, policy=model(0), **more)
        host.train()
        entries = [entry for entry in host.state.log_history if "loss" in entry]
        histories.append([(e["loss"], e["grad_norm"], e["rewards/margins"]) for e in entries])
    assert len(histories[0]) == 3
    for ours, theirs in zip(histories[1], histories[0], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.fused
def test_liger_trains(tokenizer, tmp_path, monkeypatch):
    """The host puts in Liger's layers, and the arguments keep their values."""
    from transformers import trainer as host_module

    applied = []
    apply = host_module.apply_liger_kernel
    monkeypatch.setattr(
        host_module, "apply_liger_kernel", lambda *of: (applied.append(of), apply(*of))
    )
    host = trainer(
        FocalPOTrainer, tokenizer, tmp_path, policy=model(0), reference=model(0), **without_triton()
    )
    host.train()
    losses = [entry["loss"] for entry in host.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(2**-0.05 * math.log(2), rel=1e-6)
    assert losses[-1] < losses[0]
    assert applied == [(host.model, without_triton()["liger_kernel_config"])]
    assert host.args.use_liger_kernel is True


@pytest.mark.parametrize(
    "feature", ["precomputed", "precomputed from another", "lora, precomputed"]
)
@pytest.mark.parametrize("key", EACH_PATH)
def test_precomputed_needs_no_reference(tokenizer, tmp_path, key, feature):
    """Real forward passes of any backbone in three steps and three evaluations: one each, instead
    of two each without precomputing; the given reference is freed."""
    from transformers import LlamaModel
    from transformers.utils import logging

    ran = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, given: ran.append(module) if isinstance(module, LlamaModel) else None
    )
    logging.disable_progress_bar()
    counts = {}
    try:
        for precomputed in (True, False):
            more = dict(FUSED[key]) if key else {}
            host, _ = history(
                tokenizer,
                tmp_path / str(precomputed),
                feature,
                **more,
                precompute_ref_log_probs=precomputed,
                max_steps=1,
            )
            ran.clear()
            host.compute_loss(host.model, batch(host))
            counts[precomputed] = len(ran)
            if precomputed:
                assert host.ref_model is None
                assert all(model is host.model for model in map(unwrap, host.accelerator._models))
    finally:
        hook.remove()
    assert counts == {True: 1, False: 2}


def unwrap(network: torch.nn.Module) -> torch.nn.Module:
    return getattr(network, "module", network)


class Frees(FocalPOTrainer):
    """Like Axolotl's trainer, which has all its data in its config."""

    _keeps_reference = False


def test_a_freed_reference_is_gone(tokenizer, tmp_path):
    """The reference is freed from memory if the caller keeps none; the policy doesn't replace it later."""
    reference = model(1)
    alive = weakref.ref(reference)
    host = trainer(Frees, tokenizer, tmp_path, reference=reference, precompute_ref_log_probs=True)
    del reference
    gc.collect()
    assert alive() is None
    host.train()
    with pytest.raises(ValueError, match="^eval_dataset must be given to Frees, got one"):
        host.evaluate(Dataset.from_list(PAIRS[:3]))


@pytest.mark.parametrize(
    "path",
    [
        pytest.param({}, id="plain"),
        pytest.param({"focalpo_fused": True}, id="fused", marks=pytest.mark.fused),
    ],
)
@pytest.mark.skipif(
    "evaluate" not in vars(DPOTrainer), reason="this TRL's evaluate() prepares no data"
)
def test_new_data_is_evaluated_by_the_reference_that_was_given(tokenizer, tmp_path, path):
    """Before and after training, with the losses of TRL's own DPO, which keeps the reference."""
    losses = []
    for cls, more in ((DPOTrainer, {}), (FocalPOTrainer, {"focalpo_gamma": 0.0, **path})):
        host = trainer(cls, tokenizer, tmp_path, precompute_ref_log_probs=True, **more)
        torch.manual_seed(0)
        found = []
        for _ in range(2):
            held_out = on_disk(Dataset.from_list(PAIRS[2:7]), tmp_path)
            found.append(host.evaluate(held_out)["eval_loss"])
            host.train()
        losses.append(found)
    assert host.ref_model is None
    assert losses[0][0] != losses[0][1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def with_prompt_learning() -> Any:
    from peft import PromptTuningConfig

    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)


@pytest.mark.fused
@pytest.mark.parametrize("key", FUSED)
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"loss_type": ["sigmoid_norm"]}, "can't be combined with loss_type, got ['sigmoid_norm']"),
        ({"loss_type": ["robust"]}, "can't be combined with loss_type, got ['robust']"),
        ({"loss_type": ["sigmoid", "sft"]}, "can't be combined with loss_type, got"),
        ({"ld_alpha": 0.5}, "can't be combined with ld_alpha, got 0.5: the fused path does not"),
        ({"use_weighting": True}, "can't be combined with use_weighting, got True"),
        ({"loss_weights": [2.0]}, "can't be combined with loss_weights, got [2.0]"),
        (
            {"peft_config": LoraConfig(target_modules=["lm_head"]), "reference": None},
            "can't be combined with an adapter on the output layer, got 'lm_head'",
        ),
        (
            {"peft_config": with_prompt_learning(), "reference": None},
            "can't be combined with prompt learning, got PromptTuningConfig",
        ),
        (
            {"kind": "mixtral"},
            "can't be combined with router_aux_loss_coef, got 0.001: the fused path does not compute "
            "it. Set {key} to false, or set router_aux_loss_coef to 0.0, a field of TRL's",
        ),
        ({"compute_metrics": dict}, "can't be combined with compute_metrics, got <class 'dict'>"),
        ({"kind": "gemma2"}, "a model whose final_logit_softcapping is set, got 30.0"),
    ],
    ids=str,
)
def test_fused_refuses_what_it_would_drop(tokenizer, tmp_path, arguments, message, key):
    """Refused before data are tokenized and a reference computes anything: the data here can't be.
    TRL itself refuses some of these only for Liger's path."""
    arguments = dict(arguments)
    policy = model(0, arguments.pop("kind", "llama"))
    more = {"policy": policy, "pairs": Dataset.from_dict({"prompt": ["w1"], "label": [True]})}
    with pytest.raises(ValueError) as error:
        trainer(FocalPOTrainer, tokenizer, tmp_path, **more, **FUSED[key], **arguments)
    assert str(error.value).startswith(f"{key} ")
    assert message.format(key=key) in str(error.value)
    assert str(error.value).count(f"Set {key} to false") == 1


@pytest.mark.fused
@pytest.mark.parametrize("given", ["a config", "a model"])
def test_fused_refuses_adapters_that_act_in_pefts_forward(tokenizer, tmp_path, given):
    """aLoRA adds to the tokens from its invocation on, which PEFT's forward looks for in the batch: the
    fused path would train nothing."""
    from peft import get_peft_model

    alora = LoraConfig(
        target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[3, 4]
    )
    more = {"peft_config": alora}
    if given == "a model":
        more = {"policy": get_peft_model(model(0), alora)}
    with pytest.raises(
        ValueError, match="^focalpo_fused can't be combined with adapters that act in"
    ):
        trainer(FocalPOTrainer, tokenizer, tmp_path, reference=None, focalpo_fused=True, **more)


@pytest.mark.fused
@pytest.mark.parametrize("kind", ["mixtral", "gemma2"])
def test_fused_reads_the_config_of_a_model_that_is_named(tokenizer, tmp_path, kind):
    """It is refused without loading its weights, which don't exist."""
    model(0, kind).config.save_pretrained(tmp_path / "named")
    with pytest.raises(ValueError, match="^focalpo_fused can't be combined with "):
        trainer(
            FocalPOTrainer,
            tokenizer,
            tmp_path,
            policy=str(tmp_path / "named"),
            reference=None,
            focalpo_fused=True,
        )


@pytest.mark.fused
def test_fused_with_experts_and_no_auxiliary_loss(tokenizer, tmp_path):
    """The remedy that the refusal names."""
    host = trainer(
        FocalPOTrainer,
        tokenizer,
        tmp_path,
        policy=model(0, "mixtral"),
        reference=model(1, "mixtral"),
        focalpo_fused=True,
        router_aux_loss_coef=0.0,
    )
    host.train()
    assert host.state.global_step == 3


@pytest.mark.fused
def test_fused_in_one_process_for_several_gpus(tokenizer, tmp_path):
    """`python train.py` on two GPUs: transformers replicates the model by DataParallel. The plain
    path trains this way."""
    for fused in (True, False):
        args = FocalPOConfig(
            str(tmp_path), use_cpu=True, bf16=False, report_to="none", focalpo_fused=fused
        )
        args._n_gpu = 2
        given = {"train_dataset": Dataset.from_list(PAIRS), "processing_class": tokenizer}
        if fused:
            with pytest.raises(
                ValueError, match="^focalpo_fused can't be combined with torch's Dat.*torchrun"
            ):
                FocalPOTrainer("no/such-model", args=args, **given)
        else:
            host = FocalPOTrainer(model(0), model(1), args=args, **given)
            assert isinstance(host._wrap_model(host.model), torch.nn.DataParallel)


class Halved(LlamaForCausalLM):
    """A model that changes its logits without a setting that says so."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / 2
        return output


@pytest.mark.fused
def test_fused_compares_the_output_layer_with_the_model(tokenizer, tmp_path):
    policy = Halved(model(0).config)
    host = trainer(FocalPOTrainer, tokenizer, tmp_path, policy=policy, focalpo_fused=True)
    with pytest.raises(
        ValueError, match="^focalpo_fused can't be used with Halved: its logits differ by "
    ):
        host.train()


def test_whose_path_the_key_asks_for(tokenizer, tmp_path):
    """Depending on this TRL: a method for Liger's loss, which ours replaces; before 1.0, sequences
    cut inside the step, where it is refused; from 1.14 on its own fused path, by its own key, with
    its own F.logsigmoid, which is then ours."""
    of_liger = hasattr(DPOTrainer, "_compute_loss_liger")
    too_old = hasattr(DPOTrainer, "_truncate_inputs")
    assert of_liger or not too_old
    if too_old:
        with pytest.raises(ValueError, match=r"focalpo_fused needs trl 1\.0 or later, got trl"):
            trainer(FocalPOTrainer, tokenizer, tmp_path, focalpo_fused=True)
        return
    host = trainer(FocalPOTrainer, tokenizer, tmp_path, focalpo_fused=True)
    assert host._fused is of_liger
    said = f"focalpo_fused changes nothing: TRL {trl.__version__} has a fused path of its own"
    assert [note.startswith(said) for note in host._notes()] == [True] * (not of_liger)
    z = margins_of(host, inputs := batch(host))
    loss = host.compute_loss(host.model, inputs)
    assert loss.item() == pytest.approx(focalpo_loss(z).mean().item(), rel=1e-5)


@pytest.mark.fused
def test_fused_returns_no_outputs(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="^focalpo_fused can't be combined with compute_metrics"):
        trainer(
            FocalPOTrainer, tokenizer, tmp_path, focalpo_fused=True, compute_metrics=lambda _: {}
        )
    host = trainer(FocalPOTrainer, tokenizer, tmp_path, focalpo_fused=True)
    with pytest.raises(RuntimeError, match=r"^focalpo_fused can't be combined with predict\(\), "):
        host.predict(host.train_dataset)


WITHOUT_LIGER = """
import sys
sys.modules["liger_kernel"] = None  # as if it were not installed
from pathlib import Path
import tiny_trl as t
words, folder = t.tokenizer(), Path(sys.argv[1])
host = t.trainer(t.FocalPOTrainer, words, folder, focalpo_fused=True)
host.train()
print("trained", len([entry for entry in host.state.log_history if "loss" in entry]))
t.trainer(t.FocalPOTrainer, words, folder, use_liger_kernel=True)
"""


@pytest.mark.fused
@pytest.mark.xdist_group("forked")
def test_fused_needs_no_liger(tmp_path):
    _, stdout, stderr = run_forked(WITHOUT_LIGER, tmp_path)
    assert "trained 3" in stdout, stderr
    assert (
        stderr.strip()
        .splitlines()[-1]
        .startswith(
            "focalpo_plugins.errors.InvalidValue: use_liger_kernel needs the package liger-kernel, "
            "which is not installed."
        )
    )


TWO_RANKS = """
import sys
from pathlib import Path
import torch
import tiny_trl as t
folder, keys = Path(sys.argv[1]), dict.fromkeys(sys.argv[2:], True)
host = t.trainer(
    t.FocalPOTrainer, t.tokenizer(), folder, **keys, focalpo_gamma=0.5,
    per_device_train_batch_size=2, ddp_backend="gloo", optim="sgd", learning_rate=0.1,
)
host.train()
assert torch.distributed.get_world_size() == 2
weights = torch.cat([p.detach().flatten() for p in host.model.parameters()])
torch.save(weights, folder / f"rank{host.args.process_index}.pt")
"""


@pytest.mark.fused
@pytest.mark.xdist_group("forked")
def test_fused_and_shared_on_two_ranks(tokenizer, tmp_path):
    """Under DDP the ranks also average their gradients on these paths: after three steps both have
    the weights of the plain path's run. SGD, because Adam makes as large a step from a gradient of
    only rounding as from any other."""
    weights = {}
    shared = "focalpo_shared_prompts"
    paths = {"plain": (), "fused": ("focalpo_fused",), "both": ("focalpo_fused", shared)}
    for path, keys in paths.items():
        folder = tmp_path / path
        folder.mkdir()
        on_two_ranks(TWO_RANKS, folder, *keys)
        ranks = [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]
        assert torch.equal(*ranks)
        weights[path] = ranks[0]
    start = torch.cat([p.detach().flatten() for p in model(0).parameters()])
    assert (weights["plain"] - start).abs().max() > 1e-2
    for path in ("fused", "both"):
        torch.testing.assert_close(weights[path], weights["plain"], rtol=1e-4, atol=1e-6)


SPLIT = """
import json, sys
from pathlib import Path
import torch
import tiny_trl as t
host = t.trainer(
    t.FocalPOTrainer, t.tokenizer(), Path(sys.argv[1]), focalpo_gamma=0.5,
    per_device_train_batch_size=2, ddp_backend="gloo", **t.SGD,
)
host.train()
if host.is_world_process_zero():
    print(json.dumps(host.state.log_history))
"""


def test_the_same_batch_however_it_is_split(tokenizer, tmp_path):
    """Four pairs at once, as two batches of two, and as two on each of two ranks: the same losses,
    gradient norms and diagnostics, to what float32 leaves of sums in another order.

    transformers 5.5 divides gradients by the number of accumulated batches twice, whatever the loss:
    there the host's own DPO gives the factor, and the steps after the first are others."""

    def steps(kind: type[DPOTrainer], batch: int, accumulated: int, **more: Any) -> list[dict]:
        host = trainer(
            kind, tokenizer, tmp_path, per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated, **SGD, **more,
        )  # fmt: skip
        host.train()
        return [entry for entry in host.state.log_history if "loss" in entry]

    whole, halves = (steps(FocalPOTrainer, *n, focalpo_gamma=0.5) for n in ((4, 1), (2, 2)))
    of_dpo = [steps(DPOTrainer, *n)[0]["grad_norm"] for n in ((4, 1), (2, 2))]
    factor = of_dpo[1] / of_dpo[0]
    said = on_two_ranks(SPLIT, tmp_path).splitlines()
    log = json.loads(next(line for line in said if line.startswith("[{")))
    ranks = [entry for entry in log if "loss" in entry]
    names = [n for n in whole[0] if n.startswith("focalpo/")]
    names += ["loss", "grad_norm", "rewards/margins", "rewards/accuracies"]
    assert len(names) >= 7 and len(whole) >= 3
    for others, scale in ((halves, factor), (ranks, 1.0)):
        same = scale == pytest.approx(1, rel=1e-4)
        assert same or scale == pytest.approx(1 / 2, rel=1e-4)
        for ours, other in list(zip(whole, others, strict=True))[: None if same else 1]:
            for name in {*names} & {*ours, *other}:
                expected = ours[name] * (scale if name == "grad_norm" else 1)
                assert other[name] == pytest.approx(expected, rel=1e-4, abs=1e-6), name


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


def test_host_is_restored_after_an_error(tokenizer, tmp_path, monkeypatch):
    host = trainer(FocalPOTrainer, tokenizer, tmp_path)
    loss = host.pairwise_loss
    broken = replace(loss.source, loss=lambda *_, **options: 1 / 0)
    monkeypatch.setattr(host._run, "asked", replace(loss, source=broken))
    with pytest.raises(ZeroDivisionError):
        host.compute_loss(host.model, batch(host))
    assert dpo_trainer.F is torch.nn.functional


@pytest.mark.parametrize("start", ["train", "evaluate", "predict"])
def test_startup_line(tokenizer, tmp_path, capsys, start):
    """Printed once, when something starts: a trainer may still be refused after it is built."""
    held_out = {"eval_dataset": Dataset.from_list(PAIRS[:3])}
    host = trainer(FocalPOTrainer, tokenizer, tmp_path, max_steps=1, **held_out)
    assert "active" not in capsys.readouterr().err
    host.predict(host.eval_dataset) if start == "predict" else getattr(host, start)()
    host.evaluate()
    (line,) = [
        line for line in capsys.readouterr().err.splitlines() if "focalpo_plugins: active" in line
    ]
    assert "loss=focalpo gamma=0.05 variant=correct z*=-20.00" in line
    assert (
        f"beta=0.3 trainer=FocalPOTrainer focalpo_plugins=0.2.0 trl={trl.__version__} torch="
        in line
    )


def test_model_card(tokenizer, tmp_path):
    trainer(FocalPOTrainer, tokenizer, tmp_path).create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "- focalpo\n" in card
    assert "2501.06645" in card


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


@pytest.fixture
def edited_trl(tmp_path):
    """A function that puts an edited copy of the installed TRL first on the path."""

    def edit(old: str, new: str) -> Path:
        copy = tmp_path / "edited"
        shutil.copytree(Path(trl.__file__).parent, copy / "trl")
        module = copy / "trl" / "trainer" / "dpo_trainer.py"
        source = module.read_text()
        assert old in source
        module.write_text(source.replace(old, new))
        return copy

    return edit


SCRIPT = """
import sys
from pathlib import Path
import tiny_trl as t
host = t.trainer(t.FocalPOTrainer, t.tokenizer(), Path(sys.argv[1]))
host.train()
print("trained", [entry["loss"] for entry in host.state.log_history if "loss" in entry])
"""


@pytest.mark.parametrize(
    "new, stops_at",
    [
        # The branch calls another function: other branches still have a log-sigmoid.
        ("-torch.log(torch.sigmoid(self.beta * delta_score))", "called logsigmoid 0 times"),
        (
            "-F.logsigmoid(self.beta * delta_score) + 0 * F.logsigmoid(delta_score)",
            "called logsigmoid 2 times",
        ),
    ],
)
@pytest.mark.xdist_group("forked")
def test_a_trl_that_moves_the_branch_is_stopped_at_the_first_step(
    edited_trl, tmp_path, new, stops_at
):
    copy = edited_trl("-F.logsigmoid(self.beta * delta_score)\n", new + "\n")
    code, stdout, stderr = run_forked(SCRIPT, tmp_path, path=copy)
    assert code != 0
    assert "trained" not in stdout
    raised = "focalpo_plugins.errors.RunError: "
    (message,) = [line for line in stderr.splitlines() if line.startswith(raised)]
    assert f"trl {trl.__version__} {stops_at}" in message
    assert "focalpo_plugins 0.2.0 expects 1" in message


@pytest.mark.xdist_group("forked")
def test_a_trl_that_goes_around_the_seam_is_stopped_at_the_first_step(edited_trl, tmp_path):
    """A way to compute a loss other than the two known ones: neither our log-sigmoid nor our fused
    loss is called."""
    copy = edited_trl(
        "            return self._compute_loss(model, inputs, return_outputs)\n",
        "            return model(input_ids=inputs['input_ids']).logits.mean()\n",
    )
    code, stdout, stderr = run_forked(SCRIPT, tmp_path, path=copy)
    assert code != 0
    assert "trained" not in stdout
    assert f"with trl {trl.__version__}: it called the loss 0 times for 1 batch" in stderr


@pytest.mark.xdist_group("forked")
def test_a_trl_without_the_seam_is_refused_before_training(edited_trl, tmp_path):
    """As TRL 0.28 and older do, the loss is computed in another method."""
    copy = edited_trl("    def _compute_loss(self, ", "    def _computes_loss(self, ")
    code, stdout, stderr = run_forked(SCRIPT, tmp_path, path=copy)
    assert code != 0
    assert "does not know where trl" in stderr.strip().splitlines()[-1]
    assert "trained" not in stdout
    assert "0%" not in stderr  # no progress bar: nothing was trained


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


@pytest.mark.parametrize("key", EACH_PATH)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_margins_that_are_not_finite(tokenizer, tmp_path, key, value):
    """The host's log-probs of the second pair of step 2 are not finite: the run stops there, with
    the weights of step 1, and names the row of the data; nothing is skipped."""
    policy = model(0)
    host = trainer(
        FocalPOTrainer, tokenizer, tmp_path, policy=policy, **(FUSED[key] if key else {})
    )
    steps, batches, collate = [], [], host.data_collator
    host.data_collator = lambda rows: batches.append(rows) or collate(rows)

    def lose(module, given, states):
        if torch.is_grad_enabled() and host.state.global_step == 1:
            steps.append(copy.deepcopy(policy.state_dict()))
            states.last_hidden_state[1] *= value
        return states

    policy.model.register_forward_hook(lose)
    with pytest.raises(FloatingPointError) as stopped:
        host.train()
    # 0 * inf is also NaN, and so is the log-softmax of infinite logits.
    row = [row["prompt_ids"] for row in host.train_dataset].index(batches[1][1]["prompt_ids"])
    assert str(stopped.value).startswith(
        f"focalpo: reward margins are not finite, step 2: rank 0, row {row} of the data (nan, "
    )
    assert [entry["step"] for entry in host.state.log_history] == [1]
    for name, weight in policy.state_dict().items():
        assert torch.equal(weight, steps[0][name]) and weight.isfinite().all()


def test_not_finite_in_evaluation(tokenizer, tmp_path):
    policy = model(0)
    with torch.no_grad():
        policy.lm_head.weight[5] = math.nan
    host = trainer(
        FocalPOTrainer,
        tokenizer,
        tmp_path,
        policy=policy,
        eval_dataset=Dataset.from_list(PAIRS),
        per_device_eval_batch_size=2,
    )
    with pytest.raises(FloatingPointError, match=r"evaluation after step 0: rank 0, rows 0, 1 of"):
        host.evaluate()


def test_resume_with_another_loss(tokenizer, tmp_path):
    """A checkpoint's trainer_state.json records what it was trained with."""
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer(FocalPOTrainer, tokenizer, tmp_path, **saving).train()
    again = {**saving, "max_steps": 3}
    for changed, message in (
        (
            {"focalpo_gamma": 0.5},
            "focalpo_gamma was 0.05, got 0.5: resuming would change the loss of the checkpoint",
        ),
        ({"beta": 0.1}, "^beta was 0.3, got 0.1: resuming would change the loss of the checkpoint"),
        ({"loss_type": ["sigmoid_norm"]}, r"loss_type was \['sigmoid'\], got \['sigmoid_norm'\]"),
    ):
        host = trainer(FocalPOTrainer, tokenizer, tmp_path, **{**again, **changed})
        with pytest.raises(ValueError, match=message):
            host.train(resume_from_checkpoint=True)
        assert host.state.global_step == 0
    host = trainer(
        FocalPOTrainer, tokenizer, tmp_path, **again, focalpo_gamma=0.5, focalpo_allow_changed=True
    )
    host.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert host.state.global_step == 3
    with pytest.raises(ValueError, match="focalpo_gamma was 0.5, got 0.05"):
        trainer(FocalPOTrainer, tokenizer, tmp_path, **again).train(resume_from_checkpoint=True)
    same = trainer(
        FocalPOTrainer, tokenizer, tmp_path, **{**again, "max_steps": 4}, focalpo_gamma=0.5
    )
    same.train(resume_from_checkpoint=True)
    assert same.state.global_step == 4


# For each of TRL's values that go into the loss: the checkpoint's run, and the resumed one.
CHANGED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "loss_weights": (
        {"loss_type": ["sigmoid", "sft"]}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 9]},
        r"loss_weights was [1.0, 1.0], got [1, 9]",
    ),
    "ld_alpha": ({}, {"ld_alpha": 0.2}, "ld_alpha was None, got 0.2"),
    "use_weighting": ({"use_weighting": True}, {}, "use_weighting was True, got False"),
    "sync_ref_model": (
        {"sync_ref_model": True, "ref_model_sync_steps": 1}, {},
        "ref_model_mixup_alpha was 0.6, got None; ref_model_sync_steps was 1, got None; "
        "sync_ref_model was True, got False",
    ),
    "max_length": ({"max_length": 64}, {"max_length": 4}, "max_length was 64, got 4"),
    "label_smoothing": ({}, {"label_smoothing": 0.1}, "label_smoothing was 0.0, got 0.1"),
}  # fmt: skip


@pytest.mark.parametrize("key", CHANGED)
def test_resume_with_another_value_of_the_hosts(tokenizer, tmp_path, key: str):
    """Refused before the first step; the same value in another spelling is accepted."""
    before, after, message = CHANGED[key]
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer(FocalPOTrainer, tokenizer, tmp_path, **saving, **before).train()
    host = trainer(FocalPOTrainer, tokenizer, tmp_path, **{**saving, "max_steps": 2}, **after)
    with pytest.raises(ValueError) as refused:
        host.train(resume_from_checkpoint=True)
    assert str(refused.value).startswith(f"{message}: resuming would change the loss of the check")
    assert host.state.global_step == 0
    same = {**before, "loss_weights": [1.0, 1.0]} if key == "loss_weights" else before
    host = trainer(FocalPOTrainer, tokenizer, tmp_path, **{**saving, "max_steps": 2}, **same)
    host.train(resume_from_checkpoint=True)
    assert host.state.global_step == 2


@pytest.mark.skipif(
    "router_aux_loss_coef" not in FIELDS, reason="this TRL's DPO has no loss of routers"
)
def test_resume_with_another_weight_of_the_routers(tokenizer, tmp_path):
    def build(coefficient: float, steps: int) -> FocalPOTrainer:
        return trainer(
            FocalPOTrainer, tokenizer, tmp_path, policy=model(0, "mixtral"),
            reference=model(1, "mixtral"), router_aux_loss_coef=coefficient, max_steps=steps,
            save_strategy="steps", save_steps=1,
        )  # fmt: skip

    build(0.3, 1).train()
    for other, now in ((0.1, 0.1), (0.0, None)):
        message = f"^router_aux_loss_coef was 0.3, got {now}: resuming would change the loss"
        with pytest.raises(ValueError, match=message):
            build(other, 2).train(resume_from_checkpoint=True)


def edited_state(checkpoint: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    edit(state)
    path.write_text(json.dumps(state))


def test_resume_of_an_earlier_releases_checkpoint(tokenizer, tmp_path, capsys):
    """Its record has only some of the values. A warning names the missing ones, which can't be
    compared; the others are compared as always."""
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer(FocalPOTrainer, tokenizer, tmp_path, **saving).train()

    def as_before(state: dict[str, Any]) -> None:
        args = state["stateful_callbacks"]["_Record"]["args"]
        args["record"] = {
            "loss": "focalpo", "focalpo_gamma": 0.05, "focalpo_variant": "correct",
            "margin": "dpo", "beta": 0.3, "label_smoothing": 0.0, "loss_type": ["sigmoid"],
        }  # fmt: skip

    edited_state(tmp_path / "checkpoint-1", as_before)
    again = {**saving, "max_steps": 2}
    with pytest.raises(ValueError, match="^beta was 0.3, got 0.1: "):
        trainer(FocalPOTrainer, tokenizer, tmp_path, **again, beta=0.1).train(True)
    with pytest.raises(ValueError, match="^focalpo_gamma_end was None, got 0.1: "):
        trainer(FocalPOTrainer, tokenizer, tmp_path, **again, focalpo_gamma_end=0.1).train(True)
    capsys.readouterr()
    host = trainer(FocalPOTrainer, tokenizer, tmp_path, **again, ld_alpha=0.5)
    host.train(resume_from_checkpoint=True)
    assert host.state.global_step == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "earlier release" in line]
    assert "did not record loss_weights, ld_alpha, use_weighting, router_aux_loss_coef, " in line
    # The new checkpoint's record is complete.
    with pytest.raises(ValueError, match="^ld_alpha was 0.5, got None: "):
        trainer(FocalPOTrainer, tokenizer, tmp_path, **{**saving, "max_steps": 3}).train(True)


@pytest.mark.parametrize("restored", [False, True])
def test_the_record_is_of_the_run_that_wrote_it(tokenizer, tmp_path, restored: bool):
    """Also if transformers restores callbacks from the checkpoint; the record is one of them."""
    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer(FocalPOTrainer, tokenizer, tmp_path, **saving, max_steps=1).train()
    host = trainer(
        FocalPOTrainer, tokenizer, tmp_path, **saving, max_steps=2, focalpo_gamma=0.5,
        focalpo_allow_changed=True, restore_callback_states_from_checkpoint=restored,
    )  # fmt: skip
    host.train(resume_from_checkpoint=True)
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["_Record"]["args"]["record"]["focalpo_gamma"] == 0.5
    with pytest.raises(ValueError, match="^focalpo_gamma was 0.5, got 0.05: "):
        trainer(FocalPOTrainer, tokenizer, tmp_path, **saving, max_steps=3).train(True)


def test_a_checkpoint_that_is_not_there(tokenizer, tmp_path):
    host = trainer(FocalPOTrainer, tokenizer, tmp_path)
    with pytest.raises(ValueError, match="^resume_from_checkpoint=True needs a checkpoint in outp"):
        host.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="^resume_from_checkpoint must be the folder of a checkpo"):
        host.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert host.state.global_step == 0


@pytest.mark.parametrize("text", ["[]", "{", '{"stateful_callbacks": {"_Record": {"args": null}}}'])
def test_a_checkpoint_whose_state_cannot_be_read(tokenizer, tmp_path, text: str):
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer(FocalPOTrainer, tokenizer, tmp_path, **saving).train()
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text(text)
    host = trainer(FocalPOTrainer, tokenizer, tmp_path, **{**saving, "max_steps": 2})
    with pytest.raises(
        ValueError, match="^resume_from_checkpoint must be a complete checkpoint, got"
    ):
        host.train(resume_from_checkpoint=True)


def test_a_folder_that_checkpoints_cannot_be_written_to(tokenizer, tmp_path):
    """A file has taken its place since the trainer was built, because TRL creates the folder."""
    folder = tmp_path / "out"
    saving = {"save_strategy": "steps", "save_steps": 1}
    host = trainer(FocalPOTrainer, tokenizer, folder, **saving)
    folder.rmdir()
    folder.touch()
    with pytest.raises(ValueError, match="output_dir must be a writable folder, got"):
        host.train()
    assert host.state.global_step == 0


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


def test_the_closing_line(tokenizer, tmp_path: Path, capsys):
    """Each number is in the log; without a checkpoint there is nothing to report on."""
    pairs = Dataset.from_list(PAIRS[:5])
    host = trainer(FocalPOTrainer, tokenizer, tmp_path, eval_dataset=pairs,
                   eval_strategy="steps", eval_steps=3)  # fmt: skip
    host.train()
    history = host.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    held_out = next(entry for entry in reversed(history) if "eval_loss" in entry)
    accuracy, margin = (held_out[f"eval_rewards/{name}"] for name in ("accuracies", "margins"))
    loss = held_out["eval_loss"]
    (line,) = [each for each in capsys.readouterr().err.splitlines() if ": done." in each]
    assert line == (
        f"focalpo_plugins: done. 3 steps; loss {losses[0]:.4f} at first, {losses[-1]:.4f} at last; "
        f"held out: loss {loss:.3f}, accuracy {accuracy:.3f}, margin {margin:.3f}; "
        "the model is not saved yet: "
        "trainer.save_model() saves it"
    )
    host = trainer(FocalPOTrainer, tokenizer, tmp_path, save_strategy="steps", save_steps=3)
    host.train()
    (line,) = [each for each in capsys.readouterr().err.splitlines() if ": done." in each]
    last = f"the last checkpoint is {tmp_path / 'checkpoint-3'}"
    assert line.endswith(f" at last; {last}; next: focalpo report {tmp_path}")
    # The folder holds the checkpoints of an earlier run, and this run saves none.
    trainer(FocalPOTrainer, tokenizer, tmp_path).train()
    (line,) = [each for each in capsys.readouterr().err.splitlines() if ": done." in each]
    assert line.endswith("; the model is not saved yet: trainer.save_model() saves it")


def test_the_closing_line_has_the_mean_of_the_last_tenth(tokenizer, tmp_path: Path, capsys):
    """The last tenth of 20 logged losses is two, whose mean is shown: the last batch may be a hard one."""
    host = trainer(FocalPOTrainer, tokenizer, tmp_path, max_steps=20, learning_rate=1e-3)
    host.train()
    losses = [entry["loss"] for entry in host.state.log_history if "loss" in entry]
    assert len(losses) == 20
    mean = f"{(losses[18] + losses[19]) / 2:.4f} at last (mean of the last 2 logged); "
    assert f"; loss {losses[0]:.4f} at first, {mean}" in capsys.readouterr().err


def test_the_closing_line_of_a_best_checkpoint(tokenizer, tmp_path: Path, capsys):
    """A learning rate that ruins the model after the first evaluation: the held-out numbers are
    those of the loaded checkpoint, not the last ones. Gamma goes from .4 to .2. The choice isn't
    made by TRL's own metrics, which TRL 0.29 adds only to the log."""
    host = trainer(
        FocalPOTrainer, tokenizer, tmp_path, eval_dataset=Dataset.from_list(PAIRS[:5]),
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_focalpo/p",
        greater_is_better=False, learning_rate=0.1, focalpo_gamma=0.4, focalpo_gamma_end=0.2,
    )  # fmt: skip
    host.train()
    evaluated = [entry for entry in host.state.log_history if "eval_loss" in entry]
    best = min(evaluated, key=lambda entry: entry["eval_focalpo/p"])
    assert best is not evaluated[-1]
    (line,) = [each for each in capsys.readouterr().err.splitlines() if ": done." in each]
    checkpoint = tmp_path / f"checkpoint-{best['step']}"
    accuracy, margin = (best[f"eval_rewards/{name}"] for name in ("accuracies", "margins"))
    assert " at first (gamma 0.4), " in line and " at last (gamma 0.2); " in line
    assert (
        f"; the model is now that of {checkpoint}, the best checkpoint; held out there: "
        f"loss {best['eval_loss']:.3f}, accuracy {accuracy:.3f}, margin {margin:.3f}; the last checkpoint is {tmp_path / 'checkpoint-3'}; "
    ) in line
