"""Checks whether the parts of a trainer can be combined with this package's switches.

Each is called with a trainer's arguments before it loads or prepares anything, and again with the
parts of the built trainer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch
from accelerate.utils import is_peft_model
from torch import nn
from transformers import AutoConfig, ProcessorMixin
from trl import DPOConfig, DPOTrainer

from ..balanced import MEAN_OF_TOKENS
from ..compute import output_layer
from ..compute.output_layer import Head, check_config
from ..errors import InvalidValue, conflict
from ..sharing import check_layers, rope_depends_on_batch
from .arguments import not_fused


def check_fused_parts(given: Mapping[str, Any], args: Any, key: str) -> None:
    """Refuse parts that the fused path would leave out, as far as they are known.

    Args:
        given: a trainer's arguments by name; only ``model``, ``peft_config``, ``processing_class``
            and ``compute_metrics`` are read.
        args: TRL's arguments.
        key: the key that asked for the fused path.

    Raises:
        ValueError: the fused path would compute another loss, or has nothing to return.
    """
    metrics, tokenizer = given.get("compute_metrics"), given.get("processing_class")
    if metrics is not None:
        instead = "remove compute_metrics, which needs all logits"
        raise not_fused(key, "compute_metrics", metrics, instead)
    if isinstance(tokenizer, ProcessorMixin):
        raise not_fused(key, "a vision model", type(tokenizer).__name__)
    model = given.get("model")
    if _is_data_parallel(model, args):
        raise InvalidValue(
            f"{key} can't be combined with torch's DataParallel, got one process for {args.n_gpu} "
            "GPUs: each GPU would compute the whole batch. Start one process per GPU, with "
            f"`torchrun --nproc_per_node {args.n_gpu}` or `accelerate launch`, or set "
            "CUDA_VISIBLE_DEVICES to one GPU."
        )
    if given.get("peft_config") is not None:
        check_adapter(given["peft_config"], key)
    loaded = isinstance(model, nn.Module)
    config = head_of(model, key).model.config if loaded else config_of(model)
    if loaded and is_peft_model(model):
        check_forward_of_adapters(model, key)
    if config is None:
        return
    check_config(config, key)
    experts = getattr(config.get_text_config(), "output_router_logits", None) is not None
    if experts and args.router_aux_loss_coef:
        name = "router_aux_loss_coef"
        instead = f"set {name} to 0.0, a field of TRL's DPOConfig that Axolotl has no key for"
        raise not_fused(key, name, args.router_aux_loss_coef, instead)


def check_shared_parts(given: Mapping[str, Any], args: Any, key: str) -> None:
    """Refuse parts that shared prompts can't be combined with, as far as they are known.

    Args:
        given: a trainer's arguments by name; only ``model``, ``peft_config`` and
            ``processing_class`` are read.
        args: the trainer's arguments.
        key: the key that asked for shared prompts.

    Raises:
        ValueError: shared prompts would compute something else.
    """
    model: Any = given.get("model")
    loaded = isinstance(model, nn.Module)
    config: Any = model.config if loaded else config_of(model)
    _refuse(key, _not_shared(given, args, config))
    if loaded and is_peft_model(model):
        check_forward_of_adapters(model, key)
    if not loaded and config is not None:
        asked: Any = args.model_init_kwargs or {}
        check_layers(config, key, asked.get("attn_implementation"))


def check_balanced_parts(given: Mapping[str, Any], args: Any, key: str) -> None:
    """Refuse parts that make a pair's loss depend on its batch, as far as they are known.

    Args:
        given: a trainer's arguments by name; only ``model`` and ``processing_class`` are read.
        args: the trainer's arguments.
        key: the key that asked for balanced batches.

    Raises:
        ValueError: balanced batches would train something else.
    """
    model: Any = given.get("model")
    config: Any = model.config if isinstance(model, nn.Module) else config_of(model)
    _refuse(key, _not_balanced(given, args, config))


_Settings = Iterator[tuple[str, Any, str]]


def _refuse(key: str, settings: _Settings) -> None:
    for name, value, why in settings:
        if value:
            raise conflict(key, name, value, why, f"Set {key} to false")


def _not_balanced(given: Mapping[str, Any], args: Any, config: Any) -> _Settings:
    """Each setting that excludes balanced batches, its value if it is set, and why it does."""
    yield "a vision model", _vision(given), "the lengths of its pairs are not known in advance"
    types = getattr(args, "loss_type", None) or []
    types = [types] if isinstance(types, str) else list(types)
    yield "loss_type", types if "sft" in map(str, types) else None, f"sft {MEAN_OF_TOKENS}"
    alpha = getattr(args, "cpo_alpha", None)
    yield "cpo_alpha", alpha, f"its term {MEAN_OF_TOKENS}; 0.0 switches it off"
    noise = "its noise depends on the length that a batch is padded to"
    yield "neftune_noise_alpha", args.neftune_noise_alpha, noise
    # TRL 0.29 cuts DPO's padded batch.
    in_step = isinstance(args, DPOConfig) and hasattr(DPOTrainer, "_truncate_inputs")
    at_front = getattr(args, "truncation_mode", None) == "keep_end" and args.max_length
    cuts = "keep_end" if in_step and at_front else None
    yield "truncation_mode", cuts, "this TRL cuts a pair by the longest sequence of its batch"
    dispatched = args.accelerator_config.dispatch_batches
    yield "dispatch_batches", dispatched, "the first rank pads the batches of all ranks alike"
    if config is None:
        return
    yield "an encoder", _encoder(config), "the lengths of its pairs are not known in advance"
    balancing = "it is computed from all tokens of a micro-batch; 0.0 switches it off"
    yield "router_aux_loss_coef", _router_coefficient(args, config), balancing
    # Another host's own arguments may not tell.
    limit = getattr(args, "max_length", None)
    rope = rope_depends_on_batch(config, limit) and config.model_type
    yield "this model's RoPE", rope, "it depends on the longest sequence of a batch"


def _vision(given: Mapping[str, Any]) -> str | None:
    tokenizer = given.get("processing_class")
    return type(tokenizer).__name__ if isinstance(tokenizer, ProcessorMixin) else None


def _encoder(config: Any) -> str | None:
    return config.model_type if config.is_encoder_decoder else None


def _router_coefficient(args: Any, config: Any) -> Any:
    """The weight of the loss of a mixture of experts' routers; None if there are none."""
    asks = getattr(config.get_text_config(), "output_router_logits", None)
    if asks is None:
        return None
    # TRL's CPO and ORPO read only the model's config.
    of_model = asks and getattr(config, "router_aux_loss_coef", 0)
    return getattr(args, "router_aux_loss_coef", of_model)


def _not_shared(given: Mapping[str, Any], args: Any, config: Any) -> _Settings:
    """Each setting that excludes shared prompts, its value if it is set, and why it does."""
    model = given.get("model")
    yield "a vision model", _vision(given), "images can't be shared"
    yield "torch_compile", args.torch_compile, "each batch would be compiled anew"
    processes = f"one process for {args.n_gpu} GPUs" if _is_data_parallel(model, args) else None
    start = f"start one process per GPU, with `torchrun --nproc_per_node {args.n_gpu}`"
    yield "torch's DataParallel", processes, start
    size = getattr(getattr(args, "parallelism_config", None), "tp_size", None)
    split = size if size != 1 else None
    yield "parallelism_config.tp_size", split, "each rank has only a part of the heads"
    noise = "its noise depends on the batch's shape, which a row doesn't have"
    yield "neftune_noise_alpha", args.neftune_noise_alpha, noise
    for adapter in (given.get("peft_config"), *getattr(model, "peft_config", {}).values()):
        prompts = type(adapter).__name__ if hasattr(adapter, "num_virtual_tokens") else None
        yield "prompt learning", prompts, "its prompt has no token ids"
    if config is None:
        return
    yield "an encoder", _encoder(config), "its tokens see each other both ways"
    routers = "the routers would count a row's tokens instead of the padded batch's"
    coefficient = _router_coefficient(args, config)
    yield "router_aux_loss_coef", coefficient, f"{routers}; 0.0 switches it off"


def check_adapter(config: Any, key: str) -> None:
    """Raise ``ValueError`` for PEFT's config of an adapter that the fused path would bypass."""
    from peft import PromptLearningConfig

    if isinstance(config, PromptLearningConfig):
        raise InvalidValue(
            f"{key} can't be combined with prompt learning, got {type(config).__name__}: the "
            f"fused path bypasses the model that adds the prompt. Set {key} to false, or train "
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
    learning changes the inputs.  ``key`` bypasses that forward, or gives the layers a different
    batch.  So PEFT's forward runs here, up to the model's backbone, and its effects are checked.
    Plain LoRA has none.

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
            f"X-LoRA and prompt learning do, got {', '.join(kinds)}: it would bypass them. Set "
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


def config_of(model: Any) -> Any:
    """A model's config, by folder or hub name; None if transformers can't read it.

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
    config: Any = config_of(model)
    return None if config is None else getattr(config.get_text_config(), "vocab_size", None)


def _is_data_parallel(model: Any, args: Any) -> bool:
    """Whether torch's DataParallel would split each batch over this process's GPUs.

    It doesn't if a model's layers are, or will be, spread over them: transformers decides then, and
    the built trainer is checked again.
    """
    if isinstance(model, nn.Module):
        spread = getattr(model, "hf_device_map", None)
    else:
        spread = (args.model_init_kwargs or {}).get("device_map")
    return args.n_gpu > 1 and not spread
