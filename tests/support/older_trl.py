"""TRL 0.24, which other hosts pin, lacks names that ``FocalPOTrainer`` needs: the names that don't
need them load separately, and the loss can be replaced in ``DPOTrainer.dpo_loss``."""

from importlib import import_module

from trl import DPOTrainer

import focalpo_plugins.hf_trainer
import focalpo_plugins.trl

for name in ("arguments", "config", "conversations", "data", "exchange", "pairwise", "parts"):
    import_module(f"focalpo_plugins.trl.{name}")
import_module("focalpo_plugins.trl.shared_step")

focalpo_plugins.trl.check_host(DPOTrainer, "dpo_loss")
try:
    focalpo_plugins.trl.check_host()
except RuntimeError as error:
    assert "does not know where trl 0.24.0 computes its DPO loss" in str(error), error
else:
    raise AssertionError("its DPOTrainer has no _compute_loss, and was taken")
