"""What an Axolotl YAML will train on, as Axolotl itself reads it.

Config, data and trainer come from the calls that ``axolotl train`` makes.  Only the model is
replaced, by a tiny stand-in: what the trainer does to the data doesn't depend on the model.
"""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from ..errors import InvalidValue
from ..guards import hub
from ..guards.messages import explained
from ..guards.pairs import none_fits
from ..guards.sources import described
from ..plan import ModelState, Plan, adam_bytes, sharding
from ..registry import losses
from ..yaml_keys import BALANCED, FUSED, SHARED
from . import PLUGIN, RL_AS_WRITTEN
from .conversations import text_faults
from .data import explain, remote_names
from .sources import listed

# Assumed without a GPU: an A100's capabilities, the lowest ones that train in bf16.
_ASSUMED = {"bf16": True, "fp8": False, "tf32": True, "compute_capability": "sm_80"}
# Keys that change how a run computes, not what: off, so that any machine can build the stand-in.
_OFF_FOR_STAND_IN: dict[str, Any] = {
    "adapter": None,
    "bf16": False,
    "fp16": False,
    "tf32": False,
    "bfloat16": None,
    "float16": None,
    "deepspeed": None,
    "fsdp": None,
    "fsdp_config": None,
    "load_in_4bit": False,
    "load_in_8bit": False,
    "optimizer": "adamw_torch",
    "gradient_checkpointing": False,
    "torch_compile": False,
    "precompute_ref_log_probs": False,
    "dpo_use_liger_kernel": False,
    "dataloader_num_workers": 0,
    "dataloader_prefetch_factor": None,
    "use_wandb": False,
    "use_mlflow": False,
    "use_comet": False,
    "use_tensorboard": False,
}


def plan(config: Path, gpus: int, scratch: Path, shape: Path | None = None) -> Plan:
    """Read the config at ``config`` as ``axolotl train`` would.

    Args:
        gpus: number of ranks that the run is planned for.
        scratch: an empty folder, which replaces the config's ``output_dir``.
        shape: a folder with the config of a model, which replaces ``base_model``; then neither
            tokenizer nor data is read.

    Raises:
        ValueError: the config can't train pairs, or its data or its files on a hub can't be read.
            Axolotl's other errors pass through unchanged.
    """

    def reason(error: Exception) -> str | None:
        written = yaml.safe_load(config.read_text(encoding="utf-8"))
        return explain(written, error) or hub.explain(error, remote_names(written))

    with explained(reason):
        cfg, notes = _load_cfg(config, gpus, scratch, shape)
        _check(cfg)
        bare = _without_data(cfg, gpus, notes)
        return bare if shape is not None else _with_data(bare, cfg)


def _check(cfg: Any) -> None:
    """Refuse what a run would refuse later, and losses that can't be checked."""
    from .refusals import check_adapter

    if cfg.get(RL_AS_WRITTEN) is not None:
        check_adapter(cfg)
    elif cfg.rl not in ("dpo", "ipo"):
        raise InvalidValue(
            f"rl must be focalpo or another loss of preference pairs, got {_rl(cfg)!r}: `focalpo "
            "check` can't check it. Set rl: focalpo."
        )


def _rl(cfg: Any) -> Any:
    return getattr(cfg.rl, "value", cfg.rl)


def _without_data(cfg: Any, gpus: int, notes: list[str]) -> Plan:
    """The plan as far as it follows from the config."""
    from .keys import betas, margin, requested_loss
    from .refusals import ignored

    warnings = []
    if cfg.dpo_use_liger_kernel:
        warnings.append(
            "dpo_use_liger_kernel: the loss runs on the fused path of focalpo_plugins, with the "
            "values of the plain one; Axolotl also swaps in Liger's Triton layers, which can't be "
            "tried on a CPU. focalpo_fused switches on only the fused path."
        )
    split = (cfg.tensor_parallel_size or 1) * (cfg.context_parallel_size or 1)
    state = _state(cfg)
    return Plan(
        host=f"Axolotl {version('axolotl')} with TRL {version('trl')}",
        loss=requested_loss(cfg),
        host_loss=_rl(cfg),
        margin=margin(cfg),
        terms=_terms(cfg, state.config),
        beta=next(iter(betas(cfg).values()), 0.1),
        label_smoothing=cfg.dpo_label_smoothing or 0.0,
        max_length=cfg.sequence_len,
        micro_batch=cfg.micro_batch_size,
        accumulation=cfg.gradient_accumulation_steps,
        ranks=gpus,
        data_ranks=max(1, gpus // split),
        precision={torch.bfloat16: "bf16", torch.float16: "fp16"}.get(cfg.torch_dtype, "fp32"),
        state=state,
        warnings=[*warnings, *filter(None, [ignored(cfg)])],
        notes=notes,
        balanced_batches=bool(cfg.get(BALANCED)),
        shared_prompts=bool(cfg.get(SHARED)),
        fused=state.logits_at_once is not None,
    )


def _with_data(bare: Plan, cfg: Any) -> Plan:
    """The plan with the data as Axolotl's trainer prepares it."""
    from axolotl.common.datasets import load_preference_datasets
    from axolotl.loaders import load_tokenizer

    from ..trl.dry_run import with_data

    if cfg.batch_size:
        cfg.batch_size *= bare.data_ranks  # as Axolotl does on each rank, to count the steps
    tokenizer = load_tokenizer(cfg)
    data = load_preference_datasets(cfg=cfg)
    rows = _rows(cfg, tokenizer, data)
    if len(data.train_dataset) == 0:
        raise none_fits("datasets", rows, "sequence_len", cfg.sequence_len)
    trainer = _trainer(cfg, data, tokenizer)
    found = [*text_faults(cfg, tokenizer), *text_faults(cfg, tokenizer, evaluation=True)]
    plan = with_data(replace(bare, warnings=[*bare.warnings, *map(str, found)]), trainer)
    return replace(plan, tokenizer=tokenizer, rows=rows, formats=described(listed(cfg)))


def _rows(cfg: Any, tokenizer: Any, data: Any) -> int:
    """The number of training rows before Axolotl dropped or cut the ones that are too long."""
    from axolotl.utils.data import prepare_preference_datasets
    from axolotl.utils.dict import DictDefault

    if cfg.skip_prepare_dataset:
        return len(data.train_dataset)
    uncut = DictDefault({**cfg, "skip_prepare_dataset": True, "test_datasets": None})
    uncut["val_set_size"] = 0
    whole = prepare_preference_datasets(uncut, tokenizer)[0]
    held_out = data.eval_dataset
    split_off = len(held_out) if held_out is not None and not cfg.test_datasets else 0
    return len(whole) - split_off


def _terms(cfg: Any, config: Any) -> list[tuple[str, float]] | None:
    """The losses that TRL adds up, with their weights; None if it adds or multiplies more."""
    # The balancing loss of a mixture of experts is logged with the others.
    experts = hasattr(config.get_text_config(), "router_aux_loss_coef")
    if experts or cfg.dpo_use_weighting or cfg.rpo_alpha is not None:
        return None
    types = ["ipo"] if cfg.rl == "ipo" else cfg.dpo_loss_type or ["sigmoid"]
    types = types if isinstance(types, list) else [types]
    return list(zip(types, cfg.dpo_loss_weights or [1.0] * len(types), strict=True))


def _load_cfg(config: Path, gpus: int, scratch: Path, shape: Path | None) -> tuple[Any, list[str]]:
    os.environ.setdefault("AXOLOTL_LOG_LEVEL", "WARNING")
    import axolotl.utils.config as config_module
    from axolotl.cli import config as cli_config

    names = ("FOCALPO_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD")
    off = next((name for name in names if os.environ.get(name) == "0"), None)
    if off is not None:
        _check_listed(config, off)
    notes = []
    if not torch.cuda.is_available():
        notes.append(f"no GPU here: the config is checked as for {gpus} x A100")
        env = {"torch_version": str(torch.__version__).split("+", maxsplit=1)[0]}
        cli_config.gpu_capabilities = lambda: ({**_ASSUMED, "n_gpu": gpus}, env)
        config_module.is_torch_bf16_gpu_available = lambda: True  # for `bf16: auto`
    # Axolotl's own prepares this process for DeepSpeed or FSDP, and waits for the other ranks.
    cli_config.prepare_optim_env = lambda cfg: None
    changed = {"output_dir": str(scratch)}
    if shape is not None:
        changed |= dict.fromkeys(("base_model", "base_model_config"), str(shape))
    return cli_config.load_cfg(str(config), **changed), notes


def _check_listed(config: Path, off: str) -> None:
    """Refuse a config that asks for one of our losses if nothing would load the plugin."""
    written = yaml.safe_load(config.read_text(encoding="utf-8"))
    rl = written.get("rl") if isinstance(written, dict) else None
    if not isinstance(rl, str) or rl not in losses():
        return
    listed = written.get("plugins") or []
    if not any("FocalPOPlugin" in str(name) for name in listed):
        raise InvalidValue(
            f"plugins must list {PLUGIN} if {off}=0 turns the autoload off, got {listed!r}. "
            f"Add the lines `plugins:` and `  - {PLUGIN}`, or unset {off}."
        )


def _trainer(cfg: Any, data: Any, tokenizer: Any) -> Any:
    """The trainer that Axolotl builds, with its preparation of the data and its collator."""
    from axolotl.utils.dict import DictDefault
    from axolotl.utils.trainer import setup_trainer

    from ..trl.stand_in import stand_in
    from .keys import fused_key

    held_out = data.eval_dataset
    few = held_out.select(range(min(4, len(held_out)))) if held_out is not None else None
    # Liger's key asks for the fused path too, and for layers that a CPU can't run.
    changed = {**_OFF_FOR_STAND_IN, FUSED: fused_key(cfg) is not None, "torch_dtype": torch.float32}
    return setup_trainer(
        cfg=DictDefault({**cfg, **changed}),
        train_dataset=data.train_dataset,
        eval_dataset=few,
        model=stand_in(len(tokenizer), cfg.base_model),
        model_ref=stand_in(len(tokenizer), cfg.base_model),
        tokenizer=tokenizer,
        processor=None,
        total_num_steps=data.total_num_steps,
    )


def _state(cfg: Any) -> ModelState:
    from axolotl.loaders.utils import load_model_config

    from ..compute.fused_loss import LOGITS_AT_ONCE
    from ..compute.output_layer import check_config
    from .keys import fused_key

    weight_bytes = adapter_bytes = 4 if cfg.torch_dtype == torch.float32 else 2
    zero_stage, offloaded = sharding(cfg.deepspeed, cfg.fsdp or cfg.fsdp_config)
    master = bool(cfg.deepspeed) and weight_bytes == 2
    lora, model_config = None, load_model_config(cfg)
    if cfg.adapter:
        lora = _lora(cfg, model_config)
        # PEFT makes them float32; TRL makes those of a quantised model bf16, and DeepSpeed all.
        quantised = cfg.load_in_4bit or cfg.load_in_8bit
        if cfg.peft_autocast_adapter_dtype is not False and not (quantised or cfg.deepspeed):
            adapter_bytes = 4
    fused = fused_key(cfg) if cfg.get(RL_AS_WRITTEN) is not None else None
    if fused is not None:
        check_config(model_config, fused)
    return ModelState(
        config=model_config,
        lora=lora,
        weight_bytes=weight_bytes,
        four_bit=bool(cfg.load_in_4bit),
        optimizer_bytes=adam_bytes(cfg.optimizer, adapter_bytes, master=master),
        zero_stage=zero_stage,
        # With adapters there is no second model: TRL switches them off to get the reference.
        reference=not cfg.adapter and not cfg.precompute_ref_log_probs and cfg.rl != "orpo",
        # Axolotl also loads a reference for SimPO, and releases it.
        reference_freed=cfg.rl == "simpo",
        offloaded=offloaded,
        logits_at_once=LOGITS_AT_ONCE if fused else None,
        adapter_bytes=adapter_bytes,
        in_float32=_in_float32(cfg, model_config),
    )


def _in_float32(cfg: Any, model_config: Any) -> tuple[str, ...]:
    """What Axolotl holds in float32 beside narrower weights: the embeddings, norms and output layer
    of a model that is trained whole, unless its attention or a sharded run needs one dtype."""
    from axolotl.loaders.utils import get_linear_embedding_layers

    of_one_dtype = cfg.torch_dtype == torch.float32 or cfg.adapter or cfg.cut_cross_entropy
    of_one_dtype = of_one_dtype or cfg.deepspeed or cfg.fsdp or cfg.fsdp_config
    # The last two are of earlier releases, which have a key for each attention.
    if of_one_dtype or cfg.attn_needs_dtype_cast or cfg.flash_attention or cfg.flex_attention:
        return ()
    return (*get_linear_embedding_layers(model_config.model_type), "norm")


def _lora(cfg: Any, model_config: Any) -> Any:
    from axolotl.loaders.adapter import load_lora
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    return load_lora(model, cfg, config_only=True)[1]
