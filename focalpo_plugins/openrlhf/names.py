"""The two spellings of OpenRLHF's flags, and the flags given under the name of a loss."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from ..registry import get_loss

# The OpenRLHF flags that we read: their names in releases from 0.10.2 on, and before.
FLAT = {
    "model.model_name_or_path": "pretrain",
    "model.beta": "beta",
    "model.label_smoothing": "label_smoothing",
    "model.ipo_enable": "ipo",
    "model.aux_loss_coef": "aux_loss_coef",
    "model.nll_loss_coef": "nll_loss_coef",
    "ref.model_name_or_path": "ref_pretrain",
    "ref.offload": "ref_offload",
    "data.apply_chat_template": "apply_chat_template",
    "data.chosen_key": "chosen_key",
    "data.dataset": "dataset",
    "data.dataset_probs": "dataset_probs",
    "data.dataset_split": "dataset_split",
    "data.disable_fast_tokenizer": "disable_fast_tokenizer",
    "data.input_template": "input_template",
    "data.max_len": "max_len",
    "data.max_samples": "max_samples",
    "data.prompt_key": "prompt_key",
    "data.rejected_key": "rejected_key",
    "eval.dataset": "eval_dataset",
    "eval.split": "eval_split",
    "train.batch_size": "train_batch_size",
    "train.max_epochs": "max_epochs",
    "train.micro_batch_size": "micro_train_batch_size",
    "train.seed": "seed",
    "ds.adam_offload": "adam_offload",
    "ds.attn_implementation": "attn_implementation",
    "ds.load_in_4bit": "load_in_4bit",
    "ds.lora.alpha": "lora_alpha",
    "ds.lora.dropout": "lora_dropout",
    "ds.lora.rank": "lora_rank",
    "ds.lora.target_modules": "target_modules",
    "ds.packing_samples": "packing_samples",
    "ds.param_dtype": "param_dtype",
    "ds.ring_attn_size": "ring_attn_size",
    "ds.tensor_parallel_size": "ds_tensor_parallel_size",
    "ds.use_liger_kernel": "use_liger_kernel",
    "ds.zero_stage": "zero_stage",
    "ckpt.load_enable": "load_checkpoint",
    "ckpt.output_dir": "save_path",
    "ckpt.path": "ckpt_path",
    "ckpt.save_steps": "save_steps",
    "logger.logging_steps": "logging_steps",
    "logger.tensorboard_dir": "use_tensorboard",
}


def installed_flag(flag: str, values: Mapping[str, Any]) -> str:
    """``flag``, a key of :data:`FLAT`, as the installed OpenRLHF spells it.

    Args:
        values: the parsed command line, by the flags' names.
    """
    return flag if flag in values or FLAT[flag] not in values else FLAT[flag]


def nested_args(args: Any) -> Any:
    """OpenRLHF's arguments, nested by the names in the keys of :data:`FLAT`.

    The result is a copy if the arguments are flat, or are as the parser leaves them.
    """
    if hasattr(args, "model"):
        return args
    nested = Namespace()
    for flag, flat in FLAT.items():
        *prefixes, name = flag.split(".")
        within = nested
        for prefix in prefixes:
            if not hasattr(within, prefix):
                setattr(within, prefix, Namespace())
            within = getattr(within, prefix)
        setattr(within, name, getattr(args, flag if hasattr(args, flag) else flat))
    return nested


def given_options(args: Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """The flags under the name of ``args.loss``: options of the loss, and flags of the trainer.

    Args:
        args: OpenRLHF's arguments, with or without a namespace for each prefix.
    """
    prefix = f"{args.loss}."
    given = dict(vars(getattr(args, args.loss, Namespace())))
    given |= {k.removeprefix(prefix): v for k, v in vars(args).items() if k.startswith(prefix)}
    options = get_loss(args.loss).options
    of_loss = {name: value for name, value in given.items() if name in options}
    return of_loss, {name: value for name, value in given.items() if name not in options}


def versions() -> str:
    """``focalpo_plugins 0.2.0 with openrlhf 0.11.2``."""
    return f"focalpo_plugins {version('focalpo_plugins')} with openrlhf {version('openrlhf')}"
