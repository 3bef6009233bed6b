"""What an ms-swift command will train on, read by ms-swift itself.

Arguments, tokenizer, template and data come from the calls that ``swift rlhf`` makes.  No weights
are loaded.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch

from ..errors import InvalidValue
from ..guards import pairs
from ..guards.faults import Policy
from ..guards.messages import explained
from ..guards.sources import described
from ..plan import (
    ModelState,
    Pair,
    Plan,
    adam_bytes,
    precision,
    run_steps,
    sharding,
    streamed,
    windows,
)
from ..trl.parts import config_of
from ..yaml_keys import ALLOW_DATA, BALANCED, SHARED, Asked
from .arguments import check_words
from .conversations import text_faults
from .data import explain, listed, nothing_left
from .keys import asked_types, requested, starts_as_reference, types_of
from .pairs import EncodedPairs

# What a machine without a GPU can build; the plan says what was asked for.
_OF_THIS_MACHINE = {
    "add_version": "false",
    "use_cpu": "true",
    "report_to": "none",
    "check_model": "false",
}
_BATCH = 16  # pairs a step, if neither batch nor accumulation is given


def plan(words: Sequence[str], gpus: int, scratch: Path, shape: Path | None = None) -> Plan:
    """Read the words after ``swift rlhf`` as that command would.

    Args:
        words: a YAML or the keys.
        gpus: number of ranks that the run is planned for.
        scratch: an empty folder, which replaces ``output_dir``.
        shape: a folder with the config of a model, which replaces ``model``; then neither tokenizer
            nor data is read.

    Raises:
        ValueError: the command can't train pairs, or its data can't be read.  ms-swift's other
            errors pass through unchanged.
    """
    args, deepspeed, accumulation = _arguments(list(words), scratch, shape)
    with explained(lambda error: explain(args, error)):
        asked = requested(args)
        bare = _without_data(args, asked, gpus, deepspeed, accumulation)
        return bare if shape is not None else _with_data(bare, args, asked)


def _arguments(
    words: list[str], scratch: Path, shape: Path | None
) -> tuple[Any, dict[str, Any], int | None]:
    """ms-swift's arguments, DeepSpeed's config, and the accumulation if it was given."""
    os.environ.setdefault("LOG_LEVEL", "ERROR")  # ms-swift's own
    from swift.arguments import RLHFArguments
    from swift.cli.main import parse_yaml_args
    from swift.utils import parse_args

    parse_yaml_args(words)
    os.environ.pop("SWIFT_CONFIG_FILE", None)  # by which a later run would copy the file
    check_words(words, RLHFArguments)
    words = list(chain.from_iterable(map(_in_one_form, words)))
    deepspeed = _take(words, "deepspeed")
    accumulation = _value(words, "gradient_accumulation_steps")
    given = {**_OF_THIS_MACHINE, "output_dir": str(scratch)}
    if shape is not None:
        given["model"] = str(shape)
        if _value(words, "model_type") is None:
            # ms-swift itself finds the type by the model's name.
            config = json.loads((shape / "config.json").read_text(encoding="utf-8"))
            given["model_type"] = config["model_type"]
    for key, value in given.items():
        words += [f"--{key}", value]  # the last one counts
    args, unknown = parse_args(RLHFArguments, words)
    if unknown:
        raise InvalidValue(f"unknown keys, which ms-swift would refuse: {' '.join(unknown)}.")
    if args.rlhf_type != "dpo":
        raise InvalidValue(
            f"rlhf_type must be dpo, got {args.rlhf_type!r}: there is nothing here that could be "
            "checked. Set rlhf_type to dpo and loss_type to focalpo."
        )
    return args, _config_of(deepspeed), None if accumulation is None else int(accumulation)


def _in_one_form(word: str) -> list[str]:
    """A key and its value as two words, if it is written ``--key=value``; a key with underlines."""
    if not word.startswith("--"):
        return [word]
    key, equals, value = word.partition("=")
    return [f"--{key[2:].replace('-', '_')}", *([value] if equals else [])]


def _take(words: list[str], key: str) -> str | None:
    """Remove a key with its values from the words, and return the last value."""
    value = _value(words, key)
    while f"--{key}" in words:
        at = words.index(f"--{key}")
        del words[at : at + 2]
    return value


def _value(words: Sequence[str], key: str) -> str | None:
    """The value of a key, which may be given more than once: the last one counts."""
    values = [value for name, value in pairwise(words) if name == f"--{key}"]
    return values[-1] if values else None


def _config_of(deepspeed: str | None) -> dict[str, Any]:
    """The config that ``deepspeed`` names: one of ms-swift's, a file, or the JSON itself."""
    import swift.arguments
    from swift.utils import json_parse_to_dict

    if deepspeed is None:
        return {}
    own = Path(swift.arguments.__file__).parents[1] / "config" / f"{deepspeed}.json"
    config: dict[str, Any] = json_parse_to_dict(str(own) if own.is_file() else deepspeed)
    return config


def _without_data(
    args: Any,
    asked: Asked | None,
    gpus: int,
    deepspeed: dict[str, Any],
    accumulation: int | None,
) -> Plan:
    """The plan as far as it follows from the arguments."""
    batch, notes = args.per_device_train_batch_size, []
    if not torch.cuda.is_available():
        notes.append("no GPU here: keys that need one were taken as on a machine that has them")
    types = types_of(args)
    return Plan(
        host=f"ms-swift {version('ms-swift')} with TRL {version('trl')}",
        loss=None if asked is None else asked.loss,
        host_loss=" ".join(types),
        terms=_terms(args, types),
        beta=args.beta,
        label_smoothing=args.label_smoothing,
        max_length=args.max_length,
        micro_batch=batch,
        accumulation=accumulation or max(1, math.ceil(_BATCH / batch / gpus)),
        ranks=gpus,
        data_ranks=max(1, gpus // (args.sequence_parallel_size or 1)),
        precision=precision(args.bf16, args.fp16),
        state=_state(args, asked, deepspeed),
        notes=notes,
        balanced_batches=asked is not None and BALANCED in asked.on,
        shared_prompts=asked is not None and SHARED in asked.on,
    )


def _terms(args: Any, types: Sequence[str]) -> list[tuple[str, float]] | None:
    """The losses that ms-swift adds up, with their weights.

    None if it adds more, or if the margins of the first step aren't 0.
    """
    if args.rpo_alpha is not None or not starts_as_reference(args):
        return None
    ours = asked_types(args)
    names = ["sigmoid" if name in ours else name for name in types]
    return list(zip(names, args.loss_weights or [1.0] * len(names), strict=True))


def _state(args: Any, asked: Asked | None, deepspeed: dict[str, Any]) -> ModelState:
    zero_stage, offloaded = sharding(deepspeed, args.fsdp)
    if "weights" in offloaded:
        offloaded |= {"reference"}
    lora = _lora(args)
    weight_bytes = 4 if args.torch_dtype == torch.float32 else 2
    adapter_bytes = 4 if lora is not None and not deepspeed else weight_bytes
    master = bool(deepspeed) and weight_bytes == 2
    return ModelState(
        config=config_of(args.model_info.model_dir),
        lora=lora,
        weight_bytes=weight_bytes,
        four_bit=args.quant_bits == 4,
        optimizer_bytes=adam_bytes(args.optim, adapter_bytes, master=master),
        zero_stage=zero_stage,
        reference=args.tuner_type == "full",
        reference_freed=asked is not None and asked.reference_folder is not None,
        offloaded=offloaded,
        adapter_bytes=adapter_bytes,
    )


def _lora(args: Any) -> Any:
    """PEFT's config of the adapters; None if the whole model is trained."""
    if args.tuner_type == "full":
        return None
    from peft import LoraConfig

    names = list(args.target_modules)
    targets = names[0] if names[:1] == ["all-linear"] else names
    return LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules=targets)


def _with_data(bare: Plan, args: Any, asked: Asked | None) -> Plan:
    """The plan with what ms-swift makes of the data."""
    from swift.pipelines.train.rlhf import SwiftRLHF

    if args.streaming:
        raise streamed()

    class WithoutModel(SwiftRLHF):  # type: ignore[misc]
        def _prepare_model_tokenizer(self, **kwargs: Any) -> None:
            self.model = None
            self.processor = self.args.get_model_processor(load_model=False)[1]

    run = WithoutModel(args)
    written = run._get_dataset()
    train, held_out = run._post_process_datasets(list(run._encode_dataset(*written)))
    if train is None or len(train) == 0:
        raise nothing_left(args, len(written[0] or ()))
    found = EncodedPairs(train, run.template)
    warnings = _faults(found, asked)
    if held_out is not None:
        of_held_out = EncodedPairs(held_out, run.template)
        warnings += map(str, text_faults(of_held_out, evaluation=True))
    order = _order(train, args.training_args, bare)
    epoch_steps = max(1, math.ceil(len(order) / bare.accumulation))
    steps = run_steps(args, epoch_steps)
    return replace(
        bare,
        warnings=[*bare.warnings, *warnings],
        tokenizer=run.template.tokenizer,
        rows=len(written[0]),
        kept=len(train),
        pairs=_pairs(found),
        formats=described(listed(args)),
        epoch_steps=epoch_steps,
        steps=steps,
        windows=windows(order, bare.geometry, args.dataloader_drop_last, steps, completed=False),
    )


def _faults(found: EncodedPairs, asked: Asked | None) -> list[str]:
    """Warnings about the rows, a sentence each; the command counts the faults of their answers."""
    faults, template = text_faults(found), found.template
    if asked is None:
        return [*map(str, faults)]
    policy = Policy(f"{ALLOW_DATA} true", ALLOW_DATA in asked.on, say=False)
    cutting = pairs.Cutting("max_length", template.max_length)
    of_pairs = pairs.find(found.tokenized(), template.tokenizer, cutting)
    return policy.foretell([*(fault for fault in of_pairs if fault.refused), *faults])


def _order(train: Any, args: Any, bare: Plan) -> Any:
    """The order of the pairs, which ms-swift draws from ``data_seed`` for each epoch.

    Args:
        args: what ms-swift's trainer gets of the arguments.
    """
    from swift.dataloader import BatchSamplerShard

    from .batches import AllRanks

    lengths = {"group_by_length": True, "lengths": train["lengths"]} if args.group_by_length else {}
    shard = BatchSamplerShard(
        len(train),
        batch_size=bare.micro_batch,
        shuffle=args.train_dataloader_shuffle,
        drop_last=args.dataloader_drop_last,
        data_seed=args.data_seed,
        **lengths,
    )
    return AllRanks(shard, bare.data_ranks)


def _pairs(found: EncodedPairs) -> Iterator[Pair]:
    template, limit = found.template, found.template.max_length
    for row in range(len(found.rows)):
        both = found.of(row)
        truncated = False
        if limit is not None and any(len(side.ids) >= limit for side in both):
            template.max_length = None
            try:
                truncated = [len(side.ids) for side in found.of(row)] != [
                    len(side.ids) for side in both
                ]
            finally:
                template.max_length = limit
        yield Pair(*both, truncated)
