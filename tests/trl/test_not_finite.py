"""Margins that are not finite stop a run of TRL's trainer, in training and in evaluation."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from datasets import Dataset
from tiny_trl import (
    FUSED,
    PAIRS,
    model,
    trainer,
)
from trl_features import EACH_PATH

from focalpo_plugins import FocalPOTrainer

pytestmark = pytest.mark.releases


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
    # 0 * inf is NaN as well, and the log-softmax of logits that are infinite.
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
