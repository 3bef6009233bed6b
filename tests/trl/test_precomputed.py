"""TRL's own precomputed reference under our loss: no step needs a reference any more."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from datasets import Dataset
from tiny_trl import (
    FUSED,
    PAIRS,
    batch,
    model,
    on_disk,
    trainer,
)
from trl import DPOTrainer
from trl_features import EACH_PATH, history

from focalpo_plugins import FocalPOTrainer

pytestmark = pytest.mark.releases


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
    """From memory, where the caller keeps none; the policy doesn't replace it later."""
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
