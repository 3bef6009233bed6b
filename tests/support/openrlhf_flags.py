"""OpenRLHF's flags, which were flat before its release 0.10.2 and are dotted since."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

# Flags that the tests use but the package doesn't read, by their names before OpenRLHF 0.10.2.
OF_TESTS = {
    "adam.lr": "learning_rate",
    "data.apply_chat_template": "apply_chat_template",
    "eval.dataset": "eval_dataset",
    "eval.split": "eval_split",
    "logger.logging": "logging",
    "logger.tensorboard_dir": "use_tensorboard",
    "logger.wandb.run_name": "wandb_run_name",
    "model.nll_loss_coef": "nll_loss_coef",
    "model.aux_loss_coef": "aux_loss_coef",
    "ref.model_name_or_path": "ref_pretrain",
    "train.max_epochs": "max_epochs",
}


def of_host(words: Sequence[str]) -> list[str]:
    """Words of a command line, or of a message about one, with the flags as the installed OpenRLHF
    spells them; the tests use the newer names."""
    from focalpo_plugins.openrlhf.names import FLAT  # imports torch: not in the main process

    source = Path(find_spec("openrlhf").origin).parent / "cli" / "train_dpo.py"
    if '"--model.beta"' in source.read_text():
        return list(words)
    names = {f"--{new}": f"--{old}" for new, old in {**FLAT, **OF_TESTS}.items()}
    pattern = re.compile("|".join(re.escape(name) + r"(?![\w.])" for name in names))
    return [pattern.sub(lambda found: names[found[0]], str(word)) for word in words]
