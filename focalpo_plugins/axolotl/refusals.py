"""Checks that refuse a config before Axolotl validates it.

Nothing here imports TRL or more of Axolotl than its schema: ``axolotl train`` checks the config
before it starts the launcher.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from axolotl.utils.schemas.config import AxolotlInputConfig
from axolotl.utils.schemas.enums import RLType

from ..balanced import MEAN_OF_TOKENS
from ..errors import InvalidValue, conflict
from ..guards.messages import did_you_mean, named
from ..guards.sources import check_files
from ..loss import check_beta, check_label_smoothing, check_weights
from ..registry import get_loss, losses
from ..yaml_keys import BALANCED, FUSED, MARGIN, SHARED, as_number
from . import MARGINS, RL_AS_WRITTEN, TRAINERS
from .keys import KEYS, fused_key, margin
from .sources import listed

_OF_HOST = tuple(rl.value for rl in RLType)


def check(cfg: Any) -> None:
    """Refuse keys that can't be trained with, or that would be dropped.

    Args:
        cfg: a config as the user wrote it, whatever it trains.

    Raises:
        ValueError: the message names the key.
    """
    name, trainer = cfg.get("rl"), cfg.get("trainer_cls")
    check_rl(name)
    _check_keys(cfg, name)
    if trainer and (trainer in TRAINERS or name in losses()):
        raise InvalidValue(
            f"trainer_cls must be unset, got {trainer!r} under rl: {name}: losses of "
            "focalpo_plugins bring their own trainer. Remove trainer_cls and set rl: focalpo."
        )
    if name is not None and name in losses():
        loss = get_loss(name)
        own = [f"rl: {name}"] if name in _OF_HOST else []
        KEYS.check_names(loss, AxolotlInputConfig.model_fields, own)
        KEYS.check_common(cfg.get)
        _check_margin(cfg)
        KEYS.bind(loss, cfg.get)
        _check_terms(cfg)
        _check_switches(cfg)
        _check_balanced(cfg)
        _check_sampling(cfg)
        _check_ranks(cfg)
        check_files(listed(cfg))


def check_rl(name: Any) -> None:
    """Refuse a value of ``rl`` that neither Axolotl nor this package has."""
    known = [*_OF_HOST, *losses()]
    if name is not None and name not in known:
        near = did_you_mean(str(name), known)
        raise InvalidValue(f"rl must be one of {', '.join(known)}, got {name!r}{near}")


def _check_keys(cfg: Any, rl: Any) -> None:
    """Refuse our keys if they are misspelt or belong to another loss than the config trains."""
    ours, name = KEYS.all(), rl if rl in losses() else None
    of_user = [key for key in cfg if key not in AxolotlInputConfig.model_fields]
    for key in of_user:
        # Without the `no` and dashes of a command-line option that Axolotl's parser didn't see.
        word = re.sub(r"\W", "_", str(key).lower()).removeprefix("no").strip("_")
        if key == RL_AS_WRITTEN and cfg.get("trainer_cls") in TRAINERS:
            raise InvalidValue(
                f"{key} must go with rl: {MARGINS[margin(cfg)][0]}, got {cfg[key]!r} under "
                f"rl: {rl}: this config was loaded before, as rl: {cfg[key]}. Load the config as "
                "it was written."
            )
        begins = f"{word}_".startswith(("focalpo_", f"{name or 'focalpo'}_"))
        # Axolotl drops an unknown key without a word.
        near = name is not None and KEYS.misspelt(word, AxolotlInputConfig.model_fields)
        if key not in ours and (begins or near):
            raise InvalidValue(f"unknown key {key}, got {cfg[key]!r}{did_you_mean(word, ours)}")
    given = {key: cfg[key] for key in of_user if key in ours and cfg[key] is not None}
    KEYS.check_owners(given, name, f"under rl: {rl}")


# Axolotl's keys that are part of one margin, and do nothing or something else with the others.
_OF_MARGIN = {
    "simpo_gamma": ("simpo",),
    "cpo_alpha": ("simpo", "cpo"),
    "orpo_alpha": ("orpo",),
}
_OF_REFERENCE = ("precompute_ref_log_probs", "rl_adapter_ref_model")


def _check_margin(cfg: Any) -> None:
    """Refuse keys that contradict the chosen margin."""
    chosen = margin(cfg)
    if not isinstance(cfg.get("trl") or {}, dict):
        raise InvalidValue(f"trl must be a mapping such as {{beta: 0.1}}, got {cfg['trl']!r}.")
    for key, margins in _OF_MARGIN.items():
        if cfg.get(key) is not None and chosen not in margins:
            raise InvalidValue(
                f"{key} belongs to {MARGIN}: {' or '.join(margins)}, got {cfg[key]!r} with "
                f"{MARGIN}: {chosen}. Set {MARGIN}, or remove {key}."
            )
    if chosen == "dpo":
        multiple = cfg.get("pad_to_multiple_of")
        if multiple and "pad_to_multiple_of" in AxolotlInputConfig.model_fields:
            raise InvalidValue(
                f"pad_to_multiple_of must be unset under rl: {cfg['rl']}, got {multiple!r}: "
                "Axolotl then pads columns that TRL doesn't have, and the first step fails, also "
                "with rl: dpo. Remove it."
            )
        return
    if chosen == "simpo" and not isinstance(as_number(cfg.get("simpo_gamma")), float):
        raise InvalidValue(
            f"simpo_gamma must be a number with {MARGIN}: simpo, got {cfg.get('simpo_gamma')!r}: "
            "it is the target margin. Set it; SimPO's authors use 0.3 (Llama-3) and 0.8 (Mistral) "
            "times rl_beta."
        )
    _check_orpo_alpha(cfg)
    of_dpo = [key for key in cfg if str(key).startswith("dpo_") or key in _OF_REFERENCE]
    why = dict.fromkeys(
        of_dpo, "it belongs to DPO's trainer and reference, which that margin doesn't use"
    )
    why[FUSED] = "the fused path computes only DPO's log-probabilities"
    for key, reason in why.items():
        if cfg.get(key):
            raise conflict(key, f"{MARGIN}: {chosen}", cfg[key], reason, f"Remove {key}")


def _check_orpo_alpha(cfg: Any) -> None:
    weight = cfg.get("orpo_alpha")
    if weight is None:
        return
    try:
        check_beta(as_number(weight))
    except ValueError:
        raise InvalidValue(
            f"orpo_alpha must be a finite number above 0, got {weight!r}: it is ORPO's lambda, and "
            "its authors use 0.1."
        ) from None
    if cfg.get("rl_beta") is not None or (cfg.get("trl") or {}).get("beta") is not None:
        raise InvalidValue(
            f"orpo_alpha can't be combined with rl_beta or trl.beta, got {weight!r}: both are "
            "ORPO's lambda, and Axolotl would use the other. Remove one of the two."
        )


def _check_terms(cfg: Any) -> None:
    """Check Axolotl's own keys that go into the loss."""
    betas = {"rl_": cfg.get("rl_beta"), "trl.": (cfg.get("trl") or {}).get("beta")}
    for prefix, beta in betas.items():
        if beta is not None:
            with named(prefix):
                check_beta(as_number(beta))
    if None not in betas.values() and len({as_number(beta) for beta in betas.values()}) > 1:
        raise InvalidValue(
            f"rl_beta must equal trl.beta, got {betas['rl_']!r} and {betas['trl.']!r}: Axolotl "
            "trains with trl.beta. Remove one of them."
        )
    smoothing = cfg.get("dpo_label_smoothing")
    if smoothing is not None:
        with named("dpo_"):
            check_label_smoothing(as_number(smoothing))
    if cfg.get("cpo_alpha") is not None:
        check_weights("cpo_alpha", as_number(cfg["cpo_alpha"]))
    if isinstance(weights := cfg.get("dpo_loss_weights"), list):  # else Axolotl refuses them
        check_weights("dpo_loss_weights", *map(as_number, weights))


def _set_to_other_than(*values: Any) -> Callable[[Any], bool]:
    def conflicts(value: Any) -> bool:
        as_numbers = [*map(as_number, value)] if isinstance(value, list) else as_number(value)
        return value is not None and as_numbers not in values

    return conflicts


# For each of the two switches, the keys that it can't be combined with, by their values.  With
# rl: dpo Axolotl replaces a model's attention, or its whole forward, by the ones named here.
_CONFLICTS: Mapping[str, Mapping[str, Callable[[Any], bool]]] = {
    FUSED: {
        "dpo_loss_type": _set_to_other_than("sigmoid", ["sigmoid"]),
        "dpo_loss_weights": _set_to_other_than([1.0]),
        "dpo_use_weighting": _set_to_other_than(False),
        "tensor_parallel_size": _set_to_other_than(0, 1),
    },
    SHARED: {
        "xformers_attention": bool,
        "sage_attention": bool,
        "flex_attention": bool,
        "s2_attention": bool,
        "torch_compile": bool,
        "deepcompile": bool,
        "attn_implementation": ("xformers", "sage", "fp8", "flex_attention", "s2").__contains__,
        "tensor_parallel_size": _set_to_other_than(0, 1),
    },
}
_WHY_CONFLICT = {
    FUSED: "the fused path does not compute it",
    SHARED: "it has to know which tokens each layer's attention sees",
}


def _check_switches(cfg: Any) -> None:
    if cfg.get("dpo_use_liger_kernel") and find_spec("liger_kernel") is None:
        raise InvalidValue(
            "dpo_use_liger_kernel needs the package liger-kernel, which is not installed. Install "
            f"it, or set {FUSED} instead, which needs no package."
        )
    for switch, asked in ((FUSED, fused_key(cfg)), (SHARED, SHARED if cfg.get(SHARED) else None)):
        for key, conflicts in _CONFLICTS[switch].items():
            if asked is not None and conflicts(cfg.get(key)):
                fix = f"Set {asked} to false, or remove {key}"
                raise conflict(asked, key, cfg[key], _WHY_CONFLICT[switch], fix)


def _check_balanced(cfg: Any) -> None:
    """Refuse terms of the loss that depend on which pairs share a micro-batch."""
    if not cfg.get(BALANCED):
        return
    chosen, alpha = margin(cfg), cfg.get("cpo_alpha")
    alpha = 1.0 if alpha is None else alpha  # TRL's default
    types = cfg.get("dpo_loss_type")
    types = types if isinstance(types, list) else [types]
    terms = {
        "dpo_loss_type": types if "sft" in types else None,
        "cpo_alpha": alpha if chosen in _OF_MARGIN["cpo_alpha"] and as_number(alpha) != 0 else None,
        MARGIN: chosen if chosen == "orpo" else None,
    }
    fixes = {"dpo_loss_type": "remove sft", "cpo_alpha": "set cpo_alpha to 0"}
    for key, value in terms.items():
        if value is not None:
            fix = f"Set {BALANCED} to false"
            fix += f", or {fixes[key]}" if key in fixes else ""
            raise conflict(BALANCED, key, value, f"a term of this loss {MEAN_OF_TOKENS}", fix)


def _check_sampling(cfg: Any) -> None:
    """Refuse an order of the pairs that transformers supports, but Axolotl doesn't."""
    key = "train_sampling_strategy"
    if key not in AxolotlInputConfig.model_fields and cfg.get(key) not in (None, "random"):
        raise InvalidValue(
            f"{key} must be unset, got {cfg[key]!r}: Axolotl doesn't have this key, and would draw "
            f"the pairs in random order. Remove it; {BALANCED} deals them by length."
        )


def _check_ranks(cfg: Any) -> None:
    for key in ("context_parallel_size", "sequence_parallel_degree"):
        if as_number(cfg.get(key)) not in (None, 0, 1):
            raise InvalidValue(
                f"{key} must be 1 under rl: {cfg['rl']}, got {cfg[key]!r}: Axolotl would give each "
                "rank only a part of each sequence, but a margin needs whole sequences. Remove it; "
                f"{FUSED} and ZeRO-3 also save memory."
            )


def check_adapter(cfg: Any) -> None:
    """Refuse an adapter to continue from, which Axolotl doesn't load for DPO's trainer.

    This isn't part of the validation: ``axolotl merge-lora`` gets the adapter by the same key.
    """
    folder = cfg.get("lora_model_dir")
    if folder and margin(cfg) == "dpo" and not cfg.get("merge_lora"):
        raise InvalidValue(
            f"lora_model_dir must be unset under rl: {cfg[RL_AS_WRITTEN]}, got {folder!r}: Axolotl "
            "doesn't load it here, and would train a new adapter on base_model. Merge it first, "
            f"with the YAML that trained it: `axolotl merge-lora SFT.yml --lora-model-dir {folder} "
            "--output-dir OUT`. Then set base_model to OUT/merged, and remove lora_model_dir."
        )


# Axolotl reads these keys for supervised fine-tuning, and under no value of `rl`.
_OF_SFT = (
    "auto_find_batch_size",
    "center_rewards_coefficient",
    "curriculum_sampling",
    "dataloader_drop_last",
    "do_causal_lm_eval",
    "early_stopping_patience",
    "eval_table_size",
    "group_by_length",
    "jagged_restart_steps",
    "lisa_step_interval",
    "load_best_model_at_end",
    "loss_watchdog_threshold",
    "lr_quadratic_warmup",
    "neftune_noise_alpha",
    "pad_to_sequence_len",
    "relora",
    "sample_packing_sequentially",
    "train_on_inputs",
)


def ignored(cfg: Any) -> str | None:
    """A warning about keys that Axolotl accepts, but doesn't use for preference pairs."""
    given = [key for key in _OF_SFT if cfg.get(key)]
    if not given:
        return None
    them = "them" if len(given) > 1 else "it"
    return (
        f"Axolotl ignores {', '.join(given)} when it trains preference pairs: it reads {them} only "
        f"for supervised fine-tuning. Remove {them}."
    )
