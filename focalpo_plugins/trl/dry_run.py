"""What a trainer of TRL will train on, read off the trainer itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from ..balanced import Geometry
from ..compute.fused_loss import LOGITS_AT_ONCE
from ..hf_batches import order_of
from ..plan import ModelState, Pair, Plan, Tokens, epoch_steps, sharding, windows

_NO_LIMIT = 10**9  # tokens


def plan(trainer: Any, gpus: int) -> Plan:
    """The plan of a run that a script is about to start with ``trainer.train()``.

    Args:
        trainer: a ``FocalPOTrainer``, ``FocalCPOTrainer`` or ``FocalORPOTrainer``.
        gpus: number of ranks that the run is planned for.
    """
    args, state = trainer.args, _state(trainer)
    bare = Plan(
        host=f"TRL {version('trl')}",
        loss=trainer.pairwise_loss,
        host_loss=type(trainer).__name__,
        margin=str(trainer._in_loss()["margin"]),
        terms=_terms(trainer),
        beta=trainer.beta,
        label_smoothing=0.0,
        max_length=args.max_length,
        micro_batch=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        ranks=gpus,
        data_ranks=gpus,
        precision="bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        state=state,
        balanced_batches=trainer._balanced_key is not None,
        shared_prompts=trainer._sharing is not None,
        fused=state.logits_at_once is not None,
    )
    rows = len(trainer.train_dataset)
    return replace(with_data(bare, trainer), tokenizer=trainer.processing_class, rows=rows)


def with_data(bare: Plan, trainer: Any) -> Plan:
    """The plan with what a trainer has made of its data, and what it says when it starts."""
    dataset, args, geometry = trainer.train_dataset, trainer.args, _geometry(bare, trainer.args)
    of_epoch = epoch_steps(
        len(dataset),
        geometry.each,
        geometry.accumulation,
        geometry.ranks,
        args.dataloader_drop_last,
    )
    of_run = math.ceil(args.num_train_epochs * of_epoch)
    steps = args.max_steps if args.max_steps > 0 else of_run
    of_dpo = bare.margin == "dpo"
    order, unknown = order_of(trainer.get_train_dataloader())
    ours = getattr(trainer, "pairwise_loss", None)
    return replace(
        bare,
        loss=ours,
        beta=trainer.beta,
        label_smoothing=getattr(trainer, "label_smoothing", 0.0),
        max_length=getattr(trainer.data_collator if of_dpo else trainer, "max_length", None),
        micro_batch=geometry.each,
        accumulation=geometry.accumulation,
        warnings=[*bare.warnings, *([] if ours is None else trainer._notes())],
        notes=[*bare.notes, *unknown],
        kept=len(dataset),
        pairs=_pairs(dataset, trainer.data_collator) if of_dpo else _pairs_of_cpo(trainer),
        epoch_steps=of_epoch,
        steps=steps,
        windows=windows(order, geometry, args.dataloader_drop_last, steps),
    )


def _geometry(bare: Plan, args: Any) -> Geometry:
    each = args.per_device_train_batch_size
    if args.accelerator_config.split_batches:  # then a batch is of all ranks
        each = max(1, each // bare.data_ranks)
    return Geometry(bare.data_ranks, each, args.gradient_accumulation_steps)


def _pairs(dataset: Any, collator: Any) -> Iterator[Pair]:
    columns = {"prompt_ids", "chosen_ids", "rejected_ids"}
    for row in dataset:
        batch = collator([{key: row[key] for key in columns}])
        sides = []
        for ids, attention, trained in zip(
            batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
        ):
            real = attention.bool()
            sides.append(Tokens(ids[real].tolist(), trained[real].bool().tolist()))
        answers = (row["chosen_ids"], row["rejected_ids"])
        # If `excess_length_strategy: truncate` cut a row, TRL adds an EOS and it is cut here again.
        cut = any(
            len(side.ids) < len(row["prompt_ids"]) + len(answer)
            for side, answer in zip(sides, answers, strict=True)
        )
        yield Pair(sides[0], sides[1], truncated=cut)


def _pairs_of_cpo(trainer: Any) -> Iterator[Pair]:
    """Pairs of a trainer without a reference, whose rows TRL has already tokenized and cut."""
    names = [
        f"{side}_{part}" for side in ("chosen", "rejected") for part in ("input_ids", "labels")
    ]
    limit, trainer.max_length = trainer.max_length, _NO_LIMIT
    try:
        for row in trainer.train_dataset:
            whole = trainer.tokenize_row(row)
            ids, labels, other_ids, other_labels = map(row.get, names)
            sides = [
                Tokens(list(side), [label != -100 for label in trained])
                for side, trained in ((ids, labels), (other_ids, other_labels))
            ]
            cut = any(len(row[name]) < len(whole[name]) for name in (names[0], names[2]))
            yield Pair(sides[0], sides[1], truncated=cut)
    finally:
        trainer.max_length = limit


def _terms(trainer: Any) -> list[tuple[str, float]] | None:
    """The losses that TRL adds up, with their weights; None if it adds or multiplies more."""
    more = ("use_weighting", "aux_loss_enabled")
    if any(getattr(trainer, name, False) for name in more) or not hasattr(trainer, "loss_types"):
        return None
    # A reference that isn't the model that the policy starts as gives other margins than 0.
    if not trainer._starts_as_reference:
        return None
    return list(zip(trainer.loss_types, trainer.loss_weights, strict=True))


def _state(trainer: Any) -> ModelState:
    """What a rank holds of the model, as it is loaded here."""
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    adapters = getattr(model, "peft_config", None) or {}
    weights = [each for name, each in model.named_parameters() if "lora_" not in name]
    weight_bytes = max(each.dtype.itemsize for each in weights if each.is_floating_point())
    trained = [each for each in model.parameters() if each.requires_grad]
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    of_deepspeed = None if plugin is None else plugin.deepspeed_config
    zero_stage, offloaded = sharding(of_deepspeed, trainer.is_fsdp_enabled)
    master = 4 if zero_stage and weight_bytes == 2 else 0
    optimizer = str(getattr(args.optim, "value", args.optim))
    each = 4 if master else trained[0].dtype.itemsize
    return ModelState(
        config=model.config,
        lora=next(iter(adapters.values()), None),
        weight_bytes=weight_bytes,
        four_bit=bool(getattr(model, "is_loaded_in_4bit", False)),
        optimizer_bytes=master + (2.0 if "8bit" in optimizer else 2.0 * each),
        zero_stage=zero_stage,
        offloaded=offloaded,
        reference=getattr(trainer, "ref_model", None) is not None,
        logits_at_once=LOGITS_AT_ONCE if getattr(trainer, "_fused", False) else None,
        adapter_bytes=trained[0].dtype.itemsize if adapters else None,
    )
