"""What a LLaMA-Factory YAML will train on, read by LLaMA-Factory itself.

Arguments, template and data come from the calls that ``llamafactory-cli train`` makes; no model is
loaded.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InvalidValue
from ..guards import pairs, sources
from ..guards.faults import Policy
from ..guards.messages import explained
from ..plan import NO_LIMIT, ModelState, Plan, adam_bytes, precision, sharding, streamed
from ..trl.data import SEQUENCES, labelled_answers, labelled_pairs
from ..trl.dry_run import with_steps
from ..yaml_keys import ALLOW_DATA, BALANCED, SHARED
from .data import cut_prompts, listed, reason

# Keys that change how a run computes, not what: left out, as any machine must read the file.
_OFF = (
    "deepspeed", "fsdp", "fsdp_config", "bf16", "fp16", "tf32", "pure_bf16", "optim",
    "enable_liger_kernel", "use_unsloth", "use_unsloth_gc", "use_kt", "flash_attn", "plot_loss",
    "use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_swanlab", "use_muon",
)  # fmt: skip
_OF_OWN_OPTIMIZER = ("use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon")
# The host's own losses whose names don't reach TRL's dpo_loss.
_TRAINED_AS_DPO = ("hinge", "ipo", "kto_pair")


class _Run(NamedTuple):
    """LLaMA-Factory's arguments of a run, and what was left out of them."""

    model: Any
    data: Any
    training: Any
    finetuning: Any
    off: dict[str, Any]


def plan(config: Path, gpus: int, scratch: Path, shape: Path | None = None) -> Plan:
    """Read the YAML at ``config`` as ``llamafactory-cli train`` would.

    Args:
        gpus: number of ranks that the run is planned for.
        scratch: an empty folder, which replaces the YAML's ``output_dir``.
        shape: a folder with the config of a model, which replaces ``model_name_or_path``; then
            neither tokenizer nor data is read.

    Raises:
        ValueError: the YAML can't train pairs, or its data or its files on a hub can't be read.
            LLaMA-Factory's other errors pass through unchanged.
    """
    from omegaconf import OmegaConf

    written: Any = OmegaConf.to_container(OmegaConf.load(config))
    run: _Run | None = None

    def reason_of(error: Exception) -> str | None:
        if run is None:
            return None
        return reason(run.model, run.data, run.finetuning, error)

    with explained(reason_of):
        run = _read(written, scratch, shape)
        bare = _without_data(run, gpus)
        return bare if shape is not None else _with_data(bare, run)


def _read(written: dict[str, Any], scratch: Path, shape: Path | None) -> _Run:
    from llamafactory.hparams import get_train_args

    off = {key: written[key] for key in _OFF if written.get(key)}
    kept = {key: value for key, value in written.items() if key not in _OFF}
    kept |= {"output_dir": str(scratch), "report_to": "none"}
    if shape is not None:
        kept["model_name_or_path"] = str(shape)
    model, data, training, finetuning, _ = get_train_args(kept)
    if finetuning.stage != "dpo":
        raise InvalidValue(
            f"stage must be dpo, got {finetuning.stage!r}: there is nothing here that could be "
            "checked. Set stage: dpo and pref_loss: focalpo."
        )
    return _Run(model, data, training, finetuning, off)


def _without_data(run: _Run, gpus: int) -> Plan:
    """The plan as far as it follows from the arguments."""
    asked = getattr(run.finetuning, "focalpo", None)
    own, warnings = run.finetuning.pref_loss, []
    if asked is None and own in _TRAINED_AS_DPO and _drops_names():
        warnings.append(
            f"pref_loss: {own} trains plain DPO in LLaMA-Factory {version('llamafactory')} with "
            f"TRL {version('trl')}: the loss's name is not passed on."
        )
        own = "sigmoid"
    margin = asked.margin if asked else own if own in ("simpo", "orpo") else "dpo"
    # The logged loss includes pref_ftx's term, and LD-DPO's margins don't start at 0.
    plain = not run.finetuning.pref_ftx and run.finetuning.ld_alpha is None
    plain = plain and not (asked and run.finetuning.focalpo_continues)
    return Plan(
        host=f"LLaMA-Factory {version('llamafactory')} with TRL {version('trl')}",
        loss=asked and asked.loss,
        host_loss=own,
        margin=margin,
        terms=(("sigmoid", 1.0),) if plain else None,
        beta=run.finetuning.pref_beta,
        label_smoothing=run.finetuning.dpo_label_smoothing,
        max_length=run.data.cutoff_len,
        micro_batch=run.training.per_device_train_batch_size,
        accumulation=run.training.gradient_accumulation_steps,
        ranks=gpus,
        data_ranks=gpus,
        precision=_precision(run.off),
        state=_state(run),
        warnings=warnings,
        balanced_batches=asked is not None and BALANCED in asked.on,
        shared_prompts=asked is not None and SHARED in asked.on,
    )


def _drops_names() -> bool:
    """Whether the loss's name doesn't reach TRL's method: LLaMA-Factory gives it no argument."""
    from llamafactory.train.dpo.trainer import CustomDPOTrainer

    return "loss_type" in inspect.signature(CustomDPOTrainer.dpo_loss).parameters


def _with_data(bare: Plan, run: _Run) -> Plan:
    """The plan with what LLaMA-Factory makes of the data."""
    if run.data.streaming:
        raise streamed()
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.model import load_tokenizer

    module = load_tokenizer(run.model)
    tokenizer = module["tokenizer"]
    template = get_template_and_fix_tokenizer(tokenizer, run.data)
    given = _is_tokenized(run.data)
    if not given:
        run.data.tokenized_path = None  # where LLaMA-Factory would keep what it tokenizes
    dataset = _tokenized(run, run.data, template, module)
    limit = run.data.cutoff_len
    at_limit = any(limit in lengths for lengths in _lengths(dataset))
    whole = dataset
    if at_limit and not given:
        uncut = copy.copy(run.data)
        uncut.cutoff_len = NO_LIMIT
        whole = _tokenized(run, uncut, template, module)
    return replace(
        with_steps(bare, _trainer(run, dataset, tokenizer)),
        warnings=[*bare.warnings, *_faults(run, dataset, tokenizer, template)],
        tokenizer=tokenizer,
        rows=len(dataset) if given else _rows(run, len(dataset)),
        pairs=labelled_pairs(zip(dataset, _lengths(whole), strict=True)),
        formats=() if given else sources.described(listed(run.data)),
    )


def _faults(run: _Run, dataset: Any, tokenizer: Any, template: Any) -> list[str]:
    """Warnings about the rows, a sentence each; the command counts the faults of their answers."""
    limit, asked = run.data.cutoff_len, getattr(run.finetuning, "focalpo", None)
    found = cut_prompts(labelled_answers(dataset), tokenizer, template, limit, evaluation=False)
    if asked is None:
        return [*map(str, found)]
    policy = Policy(f"{ALLOW_DATA}: true", ALLOW_DATA in asked.on, say=False)
    cutting = pairs.Cutting("cutoff_len", limit)
    of_pairs = pairs.find(labelled_answers(dataset), tokenizer, cutting)
    return policy.foretell([*(fault for fault in of_pairs if fault.refused), *found])


def _is_tokenized(data: Any) -> bool:
    """Whether ``tokenized_path`` holds the data: LLaMA-Factory then reads nothing else."""
    from llamafactory.extras.misc import has_tokenized_data

    return data.tokenized_path is not None and has_tokenized_data(data.tokenized_path)


def _trainer(run: _Run, dataset: Any, tokenizer: Any) -> Any:
    """LLaMA-Factory's own trainer, which draws the pairs."""
    from llamafactory.train.dpo.trainer import CustomDPOTrainer

    from ..trl.stand_in import stand_in

    own = copy.copy(run.finetuning)
    own.focalpo = None
    return CustomDPOTrainer(
        model=stand_in(len(tokenizer)),
        ref_model=None,
        args=run.training,
        finetuning_args=own,
        processor=None,
        tokenizer=tokenizer,
        train_dataset=dataset,
        eval_dataset=dataset,  # transformers wants one if the run evaluates
    )


def _tokenized(run: _Run, data: Any, template: Any, module: Any) -> Any:
    from llamafactory.data import get_dataset

    return get_dataset(template, run.model, data, run.training, "rm", **module)["train_dataset"]


def _rows(run: _Run, kept: int) -> int:
    """The number of training rows before LLaMA-Factory dropped those that it can't use."""
    from llamafactory.data.data_utils import split_dataset
    from llamafactory.data.loader import _get_merged_dataset

    merged = _get_merged_dataset(run.data.dataset, run.model, run.data, run.training, "rm")
    return len(split_dataset(merged, None, run.data, seed=run.training.seed)[0]["train"])


def _lengths(dataset: Any) -> Iterator[list[int]]:
    """The lengths of each pair's sequences."""
    for row in dataset.select_columns([*SEQUENCES]):
        yield [len(row[name]) for name in SEQUENCES]


def _state(run: _Run) -> ModelState:
    from llamafactory.model import load_config

    args, off = run.finetuning, run.off
    asked = getattr(args, "focalpo", None)
    wide = _precision(off) == "fp32"
    zero_stage, offloaded = sharding(
        off.get("deepspeed"), off.get("fsdp") or off.get("fsdp_config")
    )
    full, pure = args.finetuning_type == "full", bool(off.get("pure_bf16"))
    own = [key for key in _OF_OWN_OPTIMIZER if off.get(key)]
    unknown = f"{own[0]}: true" if own else ""
    if args.finetuning_type not in ("full", "lora"):
        unknown = f"finetuning_type: {args.finetuning_type}"
    optimizer_bytes = adam_bytes(off.get("optim"), 2 if full and pure else 4, master=False)
    if full and not wide and not pure:
        # What is trained is held in float32: 4 bytes more of each weight and gradient, or of
        # ZeRO-3's own copy.
        optimizer_bytes += 4
    return ModelState(
        config=load_config(run.model),
        lora=_lora(args) if args.finetuning_type == "lora" else None,
        weight_bytes=4 if wide else 2,
        four_bit=run.model.quantization_bit == 4,
        optimizer_bytes=optimizer_bytes,
        zero_stage=zero_stage,
        unknown=unknown,
        reference=args.use_ref_model and (args.finetuning_type != "lora" or bool(args.ref_model)),
        reference_freed=asked is not None and asked.reference_folder is not None,
        offloaded=offloaded,
        adapter_bytes=None if full else 4,
    )


def _precision(off: dict[str, Any]) -> str:
    return precision(off.get("bf16") or off.get("pure_bf16"), off.get("fp16"))


def _lora(args: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        target_modules="all-linear" if args.lora_target == ["all"] else args.lora_target,
        modules_to_save=args.additional_target,
        task_type="CAUSAL_LM",
    )
