"""What a trainer of TRL will train on, read off the trainer itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from ..balanced import Geometry
from ..compute.fused_loss import LOGITS_AT_ONCE
from ..hf_batches import order_of
from ..plan import (
    NO_LIMIT,
    ModelState,
    Pair,
    Plan,
    Tokens,
    adam_bytes,
    epoch_steps,
    precision,
    run_steps,
    sharding,
    windows,
)
from .data import SEQUENCES, labelled_pairs


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
        precision=precision(args.bf16, args.fp16),
        state=state,
        balanced_batches=trainer._balanced_key is not None,
        shared_prompts=trainer._sharing is not None,
        fused=state.logits_at_once is not None,
    )
    rows = len(trainer.train_dataset)
    return replace(with_data(bare, trainer), tokenizer=trainer.processing_class, rows=rows)


def with_data(bare: Plan, trainer: Any) -> Plan:
    """The plan with what a trainer has made of its data, and what it says when it starts."""
    of_dpo = bare.margin == "dpo"
    ours = getattr(trainer, "pairwise_loss", None)
    return replace(
        with_steps(bare, trainer),
        loss=ours,
        beta=trainer.beta,
        label_smoothing=getattr(trainer, "label_smoothing", 0.0),
        max_length=getattr(trainer.data_collator if of_dpo else trainer, "max_length", None),
        warnings=[*bare.warnings, *([] if ours is None else trainer._notes())],
        pairs=(
            _pairs(trainer.train_dataset, trainer.data_collator)
            if of_dpo
            else _pairs_of_cpo(trainer)
        ),
    )


def with_steps(bare: Plan, trainer: Any) -> Plan:
    """The plan with the steps of a trainer's run, and the pairs of each as the trainer draws them.

    Args:
        trainer: a ``transformers.Trainer``, built with the run's data.
    """
    pairs, args, geometry = len(trainer.train_dataset), trainer.args, _geometry(bare, trainer.args)
    drop_last = args.dataloader_drop_last
    of_epoch = epoch_steps(
        pairs, geometry.each, geometry.accumulation, geometry.ranks, drop_last=drop_last
    )
    steps = run_steps(args, of_epoch)
    order, unknown = order_of(trainer.get_train_dataloader())
    return replace(
        bare,
        micro_batch=geometry.each,
        accumulation=geometry.accumulation,
        notes=[*bare.notes, *unknown],
        kept=pairs,
        epoch_steps=of_epoch,
        steps=steps,
        windows=windows(order, geometry, drop_last, steps),
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
    limit, trainer.max_length = trainer.max_length, NO_LIMIT
    try:
        for row in trainer.train_dataset:
            whole = trainer.tokenize_row(row)
            yield from labelled_pairs([(row, [len(whole[name]) for name in SEQUENCES])])
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
    master = bool(zero_stage) and weight_bytes == 2
    optimizer, trained_bytes = getattr(args.optim, "value", args.optim), trained[0].dtype.itemsize
    return ModelState(
        config=model.config,
        lora=next(iter(adapters.values()), None),
        weight_bytes=weight_bytes,
        four_bit=bool(getattr(model, "is_loaded_in_4bit", False)),
        optimizer_bytes=adam_bytes(optimizer, trained_bytes, master=master),
        zero_stage=zero_stage,
        offloaded=offloaded,
        reference=getattr(trainer, "ref_model", None) is not None,
        logits_at_once=LOGITS_AT_ONCE if getattr(trainer, "_fused", False) else None,
        adapter_bytes=trained_bytes if adapters else None,
    )
