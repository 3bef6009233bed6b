"""TRL's trainer on the fused path: it trains as on the plain one, and refuses what it would drop."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
import trl
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
    on_two_ranks,
    run_forked,
    trainer,
    without_triton,
)
from transformers import LlamaForCausalLM
from trl import DPOTrainer
from trl_features import FUSED_WITH, history

from focalpo_plugins import FocalPOConfig, FocalPOTrainer, focalpo_loss

pytestmark = pytest.mark.releases


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
