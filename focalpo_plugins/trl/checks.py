"""Checks of TRL, and of a trainer's arguments before the trainer is built."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NoReturn

import torch
from accelerate import ParallelismConfig
from accelerate.utils import is_peft_model, parse_flag_from_env
from datasets import Dataset
from pyarrow.compute import list_flatten
from pyarrow.compute import max as max_of
from pyarrow.types import is_large_string, is_string
from torch import nn
from transformers import AutoConfig, ProcessorMixin, TrainingArguments
from trl import DPOConfig, DPOTrainer

from ..backbone import check_layers
from ..compute import output_layer
from ..compute.output_layer import Head, check_config
from ..errors import InvalidValue
from ..guards.pairs import FIRST
from ..loss import check_beta, check_label_smoothing
from ..run import Host
from .seam import check_loss_types


def given_to(trainer: type, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A trainer's arguments by name.

    Classes between our trainer and TRL's may take more arguments by name, but none by position.
    """
    names = list(inspect.signature(trainer.__init__).parameters)[1:]  # type: ignore[misc]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def check_data(given: Mapping[str, Any], host: Host) -> None:
    """Raise ``ValueError`` for training data without a pair, and for rows with an empty cell."""
    train_dataset = given.get("train_dataset")
    if train_dataset is not None and next(iter(train_dataset), None) is None:
        raise InvalidValue(
            "train_dataset must hold a pair, got none: it was empty, or every pair of it was "
            f"dropped as too long. Look at the data, or raise {host.key('max_length')}."
        )
    evaluated = given.get("eval_dataset")
    sets = {"train_dataset": train_dataset, "eval_dataset": evaluated}
    if isinstance(evaluated, Mapping):
        sets |= {f"eval_dataset[{name!r}]": dataset for name, dataset in evaluated.items()}
    for name, dataset in sets.items():
        for column in ("prompt", "chosen", "rejected"):
            if isinstance(dataset, Dataset) and column in dataset.column_names:
                _check_cells(dataset, column, name)


def _check_cells(dataset: Dataset, column: str, name: str) -> None:
    """Refuse a column without a value in some row, on which TRL stops with an obscure error."""
    stored = dataset.data.column(column)
    is_text = is_string(stored.type) or is_large_string(stored.type)
    # A prompt may be missing in all rows: TRL's CPO and ORPO then take it out of the answers.
    if not stored.null_count or (column == "prompt" and not is_text):
        return
    cells = dataset.select_columns([column]).with_format("arrow")[:].column(column)
    row = cells.is_null().index(True).as_py()
    if row >= 0:  # else the empty cells are in rows that were not selected
        raise InvalidValue(
            f"{name} must have prompt and answers in every row, got row {row} (the first is 0) "
            f"with nothing in the column {column!r}. Fill it, or remove the row. In a CSV, words "
            "such as None, NA and null are read as nothing."
        )


def check_arguments(args: DPOConfig, key: str | None = None) -> str | None:
    """Check TRL's arguments, and return the key that asks for the fused path.

    Args:
        key: a key outside of ``args`` that asks for the fused path.

    Returns:
        The key; None for TRL's plain path, or for the fused path of its own that TRL has from 1.14
        on.

    Raises:
        ValueError: they ask for something that a pairwise loss can't be combined with.
    """
    check_beta(args.beta)
    check_label_smoothing(args.label_smoothing)
    check_parallelism(args)
    types = [args.loss_type] if isinstance(args.loss_type, str) else list(args.loss_type)
    check_loss_types(types)
    divergence = str(getattr(args.f_divergence_type, "value", args.f_divergence_type))
    if divergence != "reverse_kl":
        raise InvalidValue(
            f"f_divergence_type must be reverse_kl, got {divergence!r}: with another divergence "
            "the log-sigmoid's argument is no difference of log-ratios. Remove it."
        )
    if not hasattr(DPOTrainer, "_compute_loss_liger"):
        return None
    asking = ("focalpo_fused", "use_liger_kernel")
    key = key or next((name for name in asking if getattr(args, name, False)), None)
    if key is None:
        return None
    if hasattr(DPOTrainer, "_truncate_inputs"):
        raise InvalidValue(
            f"{key} needs trl 1.0 or a later one, got trl {version('trl')}: it cuts sequences in "
            f"the step itself. Install a later one, or remove {key}."
        )
    if args.use_liger_kernel and find_spec("liger_kernel") is None:
        raise InvalidValue(
            "use_liger_kernel needs the package liger-kernel, which is not installed. Install it, "
            "or set focalpo_fused in its place, which needs nothing."
        )
    _check_fused_arguments(args, types, key)
    return key


def check_parallelism(args: TrainingArguments) -> None:
    config = getattr(args, "parallelism_config", None)
    if config is None and parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        config = ParallelismConfig()  # what accelerate's own config file asks for
    for name in ("cp_size", "sp_size"):
        size = getattr(config, name, 1)
        if size not in (None, 1):
            raise InvalidValue(
                f"parallelism_config.{name} must be 1, got {size!r}: each rank then has a part of "
                "a sequence and its logits, and a margin is of whole sequences. Remove it; "
                "focalpo_fused and ZeRO-3 save memory too."
            )


def _check_fused_arguments(args: DPOConfig, types: Sequence[str], key: str) -> None:
    if list(types) != ["sigmoid"]:
        refuse("loss_type", list(types), key, "set loss_type to 'sigmoid'")
    if args.loss_weights not in (None, [1.0]):
        refuse("loss_weights", args.loss_weights, key, "remove loss_weights")
    if args.ld_alpha is not None:
        refuse("ld_alpha", args.ld_alpha, key, "remove ld_alpha")
    if args.use_weighting:
        refuse("use_weighting", args.use_weighting, key, "set use_weighting to False")


def check_fused_parts(given: Mapping[str, Any], args: Any, key: str) -> None:
    """Refuse what the fused path would leave out, as far as it is known.

    Called with a trainer's arguments before it loads or prepares anything, and again with the parts
    of the built trainer.

    Args:
        given: a trainer's arguments by name; only ``model``, ``peft_config``, ``processing_class``
            and ``compute_metrics`` are read.
        args: TRL's arguments.
        key: the key that asked for the fused path.

    Raises:
        ValueError: the fused path would compute another loss, or has nothing to return.
    """
    if given.get("compute_metrics") is not None:
        metrics = given["compute_metrics"]
        refuse("compute_metrics", metrics, key, "remove compute_metrics, which needs all logits")
    if isinstance(given.get("processing_class"), ProcessorMixin):
        kind = type(given["processing_class"]).__name__
        refuse("a vision model", kind, key, "")
    model = given.get("model")
    if args.n_gpu > 1 and not _has_device_map(model, args):
        raise InvalidValue(
            f"{key} can't be combined with torch's DataParallel, got one process for {args.n_gpu} "
            "GPUs: each GPU would compute the whole batch. Start a process for each GPU, with "
            f"`torchrun --nproc_per_node {args.n_gpu}` or `accelerate launch`, or set "
            "CUDA_VISIBLE_DEVICES to one GPU."
        )
    if given.get("peft_config") is not None:
        check_adapter(given["peft_config"], key)
    loaded = isinstance(model, nn.Module)
    config = head_of(model, key).model.config if loaded else _config_of(model)
    if loaded and is_peft_model(model):
        check_forward_of_adapters(model, key)
    if config is None:
        return
    check_config(config, key)
    experts = getattr(config.get_text_config(), "output_router_logits", None) is not None
    if experts and args.router_aux_loss_coef:
        name = "router_aux_loss_coef"
        instead = f"set {name} to 0.0, a field of TRL's DPOConfig that Axolotl has no key for"
        refuse(name, args.router_aux_loss_coef, key, instead)


def check_shared_parts(given: Mapping[str, Any], args: Any, key: str) -> None:
    """Refuse what shared prompts can't be combined with, as far as it is known.

    Args:
        given: a trainer's arguments by name; only ``model``, ``peft_config`` and
            ``processing_class`` are read.
        args: TRL's arguments.
        key: the key that asked for shared prompts.

    Raises:
        ValueError: shared prompts would compute something else.
    """
    if isinstance(given.get("processing_class"), ProcessorMixin):
        kind = type(given["processing_class"]).__name__
        _refuse_shared("a vision model", kind, key, "images are no tokens of a pair")
    if args.torch_compile:
        _refuse_shared("torch_compile", True, key, "each batch would be a graph of its own")
    model: Any = given.get("model")
    if args.n_gpu > 1 and not _has_device_map(model, args):
        _refuse_shared(
            "torch's DataParallel", f"one process for {args.n_gpu} GPUs", key,
            f"start a process for each, with `torchrun --nproc_per_node {args.n_gpu}`",
        )  # fmt: skip
    size = getattr(getattr(args, "parallelism_config", None), "tp_size", 1)
    if size not in (None, 1):
        name = "parallelism_config.tp_size"
        _refuse_shared(name, size, key, "each rank has a part of the heads")
    if args.neftune_noise_alpha:
        why = "its noise depends on the batch's shape, which a row doesn't have"
        _refuse_shared("neftune_noise_alpha", args.neftune_noise_alpha, key, why)
    adapters = [given.get("peft_config"), *getattr(model, "peft_config", {}).values()]
    for adapter in adapters:
        if hasattr(adapter, "num_virtual_tokens"):
            _refuse_shared("prompt learning", type(adapter).__name__, key, "its prompt is no token")
    loaded = isinstance(model, nn.Module)
    if loaded and is_peft_model(model):
        check_forward_of_adapters(model, key)
    config: Any = model.config if loaded else _config_of(model)
    if config is None:
        return
    if config.is_encoder_decoder:
        _refuse_shared("an encoder", config.model_type, key, "its tokens see each other both ways")
    asks = getattr(config.get_text_config(), "output_router_logits", None)
    # TRL's CPO and ORPO read only the model's config.
    coefficient = asks and getattr(config, "router_aux_loss_coef", 0)
    coefficient = getattr(args, "router_aux_loss_coef", coefficient)
    if asks is not None and coefficient:
        _refuse_shared(
            "router_aux_loss_coef", coefficient, key,
            "the routers would see a row, and count it as the padded batch; 0.0 switches it off",
        )  # fmt: skip
    if not loaded:
        asked: Any = args.model_init_kwargs or {}
        check_layers(config, key, asked.get("attn_implementation"))


def _refuse_shared(name: str, value: Any, key: str, why: str) -> NoReturn:
    raise InvalidValue(
        f"{key} can't be combined with {name}, got {value!r}: {why}. Set {key} to false."
    )


def check_adapter(config: Any, key: str) -> None:
    """Raise ``ValueError`` for PEFT's config of an adapter that the fused path would bypass."""
    from peft import PromptLearningConfig

    if isinstance(config, PromptLearningConfig):
        raise InvalidValue(
            f"{key} can't be combined with prompt learning, got {type(config).__name__}: the "
            f"fused path goes around the model that adds the prompt. Set {key} to false, or train "
            "another adapter, such as LoRA."
        )
    names = getattr(config, "target_modules", None)
    if not isinstance(names, str) and "lm_head" in (names or ()):
        _refuse_adapted_head(key)


class _Stop(Exception):
    """Ends a forward pass of PEFT's at the backbone."""


def check_forward_of_adapters(model: Any, key: str) -> None:
    """Refuse adapters for which PEFT's own forward does more than call the model.

    aLoRA and X-LoRA hook into the layers for one forward pass, and read the batch for that; prompt
    learning changes the inputs.  ``key`` goes around that forward, or gives the layers another
    batch than it saw.  So PEFT's forward runs here, up to the model's backbone, and what it has
    done by then is compared.  Plain LoRA does nothing.

    Args:
        model: PEFT's model.
        key: the key that asked for the fused path or for shared prompts.

    Raises:
        ValueError: the adapters act there.
    """
    backbone = model.get_base_model().base_model
    ids = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    before, seen = _hooks(model), []

    def look(module: Any, args: Any, given: dict[str, Any]) -> NoReturn:
        same = given.get("input_ids") is ids and given.get("past_key_values") is None
        seen.append(same and _hooks(model) == before + 1)  # ours
        raise _Stop

    handle = backbone.register_forward_pre_hook(look, with_kwargs=True, prepend=True)
    try:
        # PEFT's forward, and not what accelerate or DeepSpeed has put around it.
        type(model).forward(model, input_ids=ids, attention_mask=torch.ones_like(ids))
    except _Stop:
        pass
    finally:
        handle.remove()
    if seen != [True]:
        kinds = sorted({type(config).__name__ for config in model.peft_config.values()})
        raise InvalidValue(
            f"{key} can't be combined with adapters that act in PEFT's own forward, as aLoRA, "
            f"X-LoRA and prompt learning do, got {', '.join(kinds)}: it would go around them. Set "
            f"{key} to false, or train another adapter, such as plain LoRA."
        )


def _hooks(model: nn.Module) -> int:
    """Number of forward hooks on the model's modules."""
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def _refuse_adapted_head(key: str) -> NoReturn:
    raise InvalidValue(
        f"{key} can't be combined with an adapter on the output layer, got 'lm_head' among the "
        f"adapter's target modules: the fused path would not train it. Set {key} to false, or "
        "remove it from them."
    )


def _check_adapters(model: Any, key: str) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for config in model.peft_config.values():
        check_adapter(config, key)
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        _refuse_adapted_head(key)


def head_of(model: Any, key: str) -> Head:
    """Backbone and output layer of ``model``, which may have PEFT's adapters.

    Raises:
        ValueError: the fused path would compute other log-probs than the model.
    """
    if is_peft_model(model):
        _check_adapters(model, key)
        model = model.base_model.model
    return output_layer.head_of(model, key)


def _config_of(model: Any) -> Any:
    """A model's config, by folder or hub name; None if transformers alone can't read it.

    The host then reports the error.
    """
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError, TypeError):
        return None


def embeddings_of(model: Any) -> int | None:
    """The number of a model's input embeddings; ``model`` may be its folder or hub name.

    None if that isn't known.
    """
    if isinstance(model, nn.Module):
        layer: Any = model.get_input_embeddings()  # type: ignore[operator]
        return getattr(layer, "num_embeddings", None)
    config: Any = _config_of(model)
    return None if config is None else getattr(config.get_text_config(), "vocab_size", None)


def largest_id(dataset: Any, columns: Sequence[str]) -> int:
    """The largest token id in the columns; if the data are streamed, in the first rows."""
    if isinstance(dataset, Dataset):
        batches = dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=1000)
        found = (max_of(list_flatten(rows[name])).as_py() for rows in batches for name in columns)
    else:
        rows = dataset.take(FIRST)
        found = (max(row[name], default=-1) for row in rows for name in columns)
    return max((id for id in found if id is not None), default=-1)


def _has_device_map(model: Any, args: DPOConfig) -> bool:
    """Whether a model's layers are, or will be, spread over GPUs.

    Then transformers decides, and the built trainer is checked again.
    """
    if isinstance(model, nn.Module):
        return bool(getattr(model, "hf_device_map", None))
    asked: Any = args.model_init_kwargs or {}
    return bool(asked.get("device_map"))


def refuse(name: str, value: Any, key: str, instead: str) -> NoReturn:
    """Raise ``ValueError``: ``key``, the fused path, can't be combined with ``name``.

    Args:
        instead: another solution, besides setting ``key`` to false.
    """
    raise InvalidValue(
        f"{key} can't be combined with {name}, got {value!r}: the fused path does not compute it. "
        f"Set {key} to false{f', or {instead}' * bool(instead)}."
    )
