"""The Axolotl plugin: turns ``rl: focalpo`` into Axolotl's DPO with our trainer, or refuses.

Axolotl accepts only its own values of ``rl``.  So its ``validate_config`` gets a copy of the config
with ``rl: dpo``, our ``trainer_cls``, and the loss in ``focalpo_rl``.  If ``focalpo_margin`` asks
for another margin, ``rl`` is ``simpo`` or ``orpo`` instead.  The user's own object is not changed.
Everything that the trainer needs is in the validated config, which reaches Ray's workers too.
"""

from __future__ import annotations

import copy
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import axolotl.utils.config
from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.utils.schemas.config import AxolotlInputConfig
from axolotl.utils.schemas.enums import RLType

from ..errors import InvalidValue, RunError
from ..guards import last_line
from ..guards.jsonl import broken_file, check_file
from ..guards.messages import did_you_mean, named, say
from ..loss import check_beta, check_label_smoothing
from ..registry import BoundLoss, PairwiseLoss, get_loss, losses
from . import (
    FUSED,
    MARGIN,
    MARGINS,
    OF_ANY,
    PLUGIN,
    REQUESTED,
    SHARED,
    SWITCHES,
    TRAINERS,
    data,
    flags,
)
from .autoload import patch


class FocalPOPlugin(BasePlugin):
    """``plugins: [focalpo_plugins.axolotl.FocalPOPlugin]``; needed only if the autoload is off."""

    #: The config of the trainer that Axolotl builds next.
    building: ClassVar[Any] = None

    def get_input_args(self) -> str | None:
        plugins = PluginManager.get_instance().plugins.values()
        first = next((plugin for plugin in plugins if isinstance(plugin, FocalPOPlugin)), self)
        # The keys can be declared only once, but the plugin may be listed under two names.
        return "focalpo_plugins.axolotl.args.FocalPOArgs" if self is first else None

    def register(self, cfg: Any) -> None:
        """Make ``validate_config``, which Axolotl calls next, accept our losses.

        The config is the user's own object, and is not changed.
        """
        patch(axolotl.utils.config)

    def get_trainer_cls(self, cfg: Any) -> None:
        """Keep the config: Axolotl calls this before it builds a trainer without the config."""
        FocalPOPlugin.building = cfg

    def pre_model_load(self, cfg: Any) -> None:
        """Refuse an adapter that Axolotl wouldn't load, and another plugin's trainer, which would
        run instead of this plugin's."""
        if requested_loss(cfg) is None:
            return
        check_adapter(cfg)
        for name, plugin in PluginManager.get_instance().plugins.items():
            trainer = plugin.get_trainer_cls(cfg)
            if trainer is not None:
                raise InvalidValue(
                    f"plugins holds {name}, whose trainer {trainer.__name__} would run instead of "
                    f"the one that trains rl: {cfg[REQUESTED]}. Remove one of the two."
                )

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Make sure that the trainer is ours and has the loss that this config asks for.

        Raises:
            RuntimeError: Axolotl built another trainer, or a trainer with another loss.
        """
        loss = requested_loss(cfg)
        if loss is None:
            return
        module, _, needed = MARGINS[margin(cfg)][1].rpartition(".")
        if not isinstance(trainer, getattr(import_module(module), needed)):
            raise RunError(
                f"Axolotl built {type(trainer).__name__} where rl: {loss.name} needs {needed}: it "
                "would have trained another loss. Remove what replaces the trainer (trainer_cls, "
                "another plugin)."
            )
        if trainer.pairwise_loss != loss:
            raise RunError(
                f"Axolotl built a trainer of {trainer.pairwise_loss} where {loss} was asked for."
            )
        dropped = ignored(cfg)
        if dropped is not None and trainer.accelerator.is_main_process:
            say(f"warning: {dropped}")
        # Axolotl adds the data to the model card only for its own trainer class.
        trainer.dataset_tags = [d["path"] for d in cfg.datasets if not Path(d["path"]).is_dir()]


def rewritten(cfg: Any) -> Any:
    """A copy that Axolotl can train, if the config asks for one of our losses; else the config.

    Ray's workers get a config that is already rewritten: it is checked and returned.

    Raises:
        ValueError: the config asks for something that can't be trained; the message names the key.
        RuntimeError: the installed TRL computes its loss elsewhere.
    """
    of_host = [rl.value for rl in RLType]
    known = [*of_host, *losses()]
    name, trainer = cfg.get("rl"), cfg.get("trainer_cls")
    ours = (isinstance(name, str) and name in losses()) or cfg.get(REQUESTED) is not None
    written = copy.deepcopy(cfg)  # validation puts its own objects into the config
    last_line.install(
        lambda error: (data.explain(written, error) or broken_file(error)) if ours else None
    )
    flags.check_arrived(cfg)
    if name is not None and name not in known:
        near = did_you_mean(str(name), known)
        raise InvalidValue(f"rl must be one of {', '.join(known)}, got {name!r}{near}")
    of_margins = {rl for rl, _ in MARGINS.values()}
    if name in of_margins and trainer in TRAINERS and requested_loss(cfg) is not None:
        _use_plugin(cfg)
        return cfg
    _check_keys(cfg, name)
    if trainer is not None and (trainer in TRAINERS or name in losses()):
        raise InvalidValue(
            f"trainer_cls must be unset, got {trainer!r} under rl: {name}: a loss of ours "
            "brings its trainer. Remove trainer_cls and set rl: focalpo."
        )
    if name is None or name not in losses():
        return cfg
    _check_names(get_loss(name), of_host)
    _check_values(cfg, get_loss(name))
    cfg = copy.deepcopy(cfg)
    cfg["rl"], cfg["trainer_cls"] = MARGINS[margin(cfg)]
    cfg[REQUESTED] = name
    _use_plugin(cfg)
    return cfg


def requested_loss(cfg: Any) -> BoundLoss | None:
    """Our loss that a rewritten config asks for; None if it asks for none."""
    name = cfg.get(REQUESTED)
    return None if name is None else _bind(cfg, get_loss(name))


def margin(cfg: Any) -> str:
    """The margin that our loss is computed from, as a key of :data:`MARGINS`."""
    return cfg.get(MARGIN) or "dpo"


# Axolotl reads these keys for supervised fine-tuning, and under no value of `rl`.
_OF_SFT = (
    "auto_find_batch_size",
    "curriculum_sampling",
    "dataloader_drop_last",
    "early_stopping_patience",
    "group_by_length",
    "jagged_restart_steps",
    "lisa_step_interval",
    "load_best_model_at_end",
    "lr_quadratic_warmup",
    "neftune_noise_alpha",
    "relora",
    "train_on_inputs",
)


def ignored(cfg: Any) -> str | None:
    """What to know of keys that Axolotl accepts and doesn't use for preference pairs."""
    given = [key for key in _OF_SFT if cfg.get(key)]
    if not given:
        return None
    return (
        f"Axolotl ignores {', '.join(given)} when it trains preference pairs: it reads "
        f"{'them' if len(given) > 1 else 'it'} only for supervised fine-tuning. Remove "
        f"{'them' if len(given) > 1 else 'it'}."
    )


def fused_key(cfg: Any) -> str | None:
    """The key that asks for the fused path; None if no key does."""
    return next((key for key in (FUSED, "dpo_use_liger_kernel") if cfg.get(key)), None)


def _bind(cfg: Any, loss: PairwiseLoss) -> BoundLoss:
    given = {}
    for option, default in loss.options.items():
        value = cfg.get(f"{loss.name}_{option}")
        if value is not None:
            # A default of None doesn't tell the option's type.
            number = default is None or isinstance(default, float)
            given[option] = _as_number(value) if number else value
    with named(f"{loss.name}_", loss.options, ": true"):
        return loss.bind(**given)


def _use_plugin(cfg: Any) -> None:
    """List the plugin in a config that we may change, and register it with Axolotl."""
    if PLUGIN not in (cfg.get("plugins") or []):
        cfg["plugins"] = [*(cfg.get("plugins") or []), PLUGIN]
    # Not PluginManager.register, which swallows errors: the run would continue without our loss.
    PluginManager.get_instance().plugins.setdefault(PLUGIN, FocalPOPlugin())


def _check_names(loss: PairwiseLoss, of_host: list[str]) -> None:
    """Refuse a loss whose names this release of Axolotl already uses."""
    taken = [f"{loss.name}_{option}" for option in loss.options]
    taken = [key for key in taken if key in AxolotlInputConfig.model_fields]
    if loss.name in of_host:
        taken.insert(0, f"rl: {loss.name}")
    if taken:
        raise InvalidValue(
            f"rl must be a loss that takes no name of Axolotl's own, got {loss.name!r}: the "
            f"package {loss.package} brings {', '.join(taken)}, which Axolotl has itself. The "
            "package has to rename it."
        )


def _check_keys(cfg: Any, rl: Any) -> None:
    of_loss = {
        f"{loss.name}_{option}": loss.name for loss in losses().values() for option in loss.options
    }
    of_any = rl if rl in losses() else "focalpo"
    of_loss |= dict.fromkeys(OF_ANY, of_any)
    of_host = AxolotlInputConfig.model_fields
    for key in cfg:
        if key in of_host:
            continue
        # Without the `no` and dashes of a command-line option that Axolotl's parser didn't see.
        word = re.sub(r"\W", "_", str(key).lower()).removeprefix("no").strip("_")
        if key == REQUESTED and cfg.get("trainer_cls") in TRAINERS:
            raise InvalidValue(
                f"{REQUESTED} must go with rl: {MARGINS[margin(cfg)][0]}, got {cfg[key]!r} under "
                f"rl: {rl}: this config was loaded before, as rl: {cfg[key]}. Load the config as "
                "it was written."
            )
        if key not in of_loss and f"{word}_".startswith(("focalpo_", f"{of_any}_")):
            near = did_you_mean(word, of_loss)
            raise InvalidValue(f"{key} is no key of focalpo_plugins, got {cfg[key]!r}{near}")
        if key in of_loss and cfg[key] is not None and of_loss[key] != rl:
            raise InvalidValue(
                f"{key} belongs to rl: {of_loss[key]}, got {cfg[key]!r} under rl: {rl}. Set "
                f"rl: {of_loss[key]}, or remove {key}."
            )


def _check_values(cfg: Any, loss: PairwiseLoss) -> None:
    from ..trl import check_host, check_loss_types

    chosen = cfg.get(MARGIN)
    if chosen not in (None, *MARGINS):
        raise InvalidValue(
            f"{MARGIN} must be one of {', '.join(MARGINS)}, got {chosen!r}"
            f"{did_you_mean(str(chosen), MARGINS)}"
        )
    if margin(cfg) == "dpo":
        check_host()
    else:
        from ..trl.reference_free import CPOLossMixin, ORPOLossMixin

        (ORPOLossMixin if margin(cfg) == "orpo" else CPOLossMixin).check_host()
    _bind(cfg, loss)

    of_trl = cfg.get("trl") or {}
    if not isinstance(of_trl, dict):
        raise InvalidValue(f"trl must be a mapping such as {{beta: 0.1}}, got {of_trl!r}.")
    _check_margin(cfg, margin(cfg))
    betas = {"rl_": cfg.get("rl_beta"), "trl.": of_trl.get("beta")}
    for prefix, beta in betas.items():
        if beta is not None:
            with named(prefix):
                check_beta(_as_number(beta))
    if None not in betas.values() and len({_as_number(beta) for beta in betas.values()}) > 1:
        raise InvalidValue(
            f"rl_beta must equal trl.beta, got {betas['rl_']!r} and {betas['trl.']!r}: Axolotl "
            "trains with trl.beta. Remove one of them."
        )

    types = cfg.get("dpo_loss_type")
    if types is not None:
        check_loss_types(types if isinstance(types, list) else [types], "dpo_loss_type")
    smoothing = cfg.get("dpo_label_smoothing")
    if smoothing is not None:
        with named("dpo_"):
            check_label_smoothing(_as_number(smoothing))
    for key in SWITCHES:
        if cfg.get(key) not in (None, True, False):
            raise InvalidValue(f"{key} must be true or false, got {cfg[key]!r}.")
    if cfg.get("dpo_use_liger_kernel") and find_spec("liger_kernel") is None:
        raise InvalidValue(
            "dpo_use_liger_kernel needs the package liger-kernel, which is not installed. Install "
            f"it, or set {FUSED} in its place, which needs nothing."
        )
    for key in ("context_parallel_size", "sequence_parallel_degree"):
        if cfg.get(key) not in (None, 0, 1):
            raise InvalidValue(
                f"{key} must be 1 under rl: {loss.name}, got {cfg[key]!r}: Axolotl gives each rank "
                "a part of a sequence and its logits, and a margin is of whole sequences. Remove "
                f"it; {FUSED} and ZeRO-3 save memory too."
            )
    fused = fused_key(cfg)
    if fused is not None:
        _check_fused(cfg, fused)
    if cfg.get(SHARED):
        _check_shared(cfg)
    for key in ("datasets", "test_datasets"):
        listed = cfg.get(key)
        for number, dataset in enumerate(listed if isinstance(listed, list) else []):
            if isinstance(dataset, dict) and isinstance(dataset.get("path"), str):
                check_file(Path(dataset["path"]), f"{key}[{number}].path")


# Axolotl's keys that are part of one margin, and do nothing or something else with the others.
_OF_MARGIN = {
    "simpo_gamma": ("simpo",),
    "cpo_alpha": ("simpo", "cpo"),
    "orpo_alpha": ("orpo",),
}
_OF_REFERENCE = ("precompute_ref_log_probs", "rl_adapter_ref_model")


def check_adapter(cfg: Any) -> None:
    """Refuse an adapter to continue from, which Axolotl doesn't load for DPO's trainer.

    Not a part of the validation: ``axolotl merge-lora`` gets the adapter by the same key.
    """
    folder = cfg.get("lora_model_dir")
    if folder and margin(cfg) == "dpo" and not cfg.get("merge_lora"):
        raise InvalidValue(
            f"lora_model_dir must be unset under rl: {cfg[REQUESTED]}, got {folder!r}: Axolotl "
            "doesn't load it here, and would train a new adapter on base_model. Merge it first, "
            f"with the YAML that trained it: `axolotl merge-lora SFT.yml --lora-model-dir {folder} "
            "--output-dir OUT`. Then set base_model to OUT/merged, and remove lora_model_dir."
        )


def _check_margin(cfg: Any, chosen: str) -> None:
    """Refuse keys that contradict the chosen margin."""
    for key, margins in _OF_MARGIN.items():
        if cfg.get(key) is not None and chosen not in margins:
            raise InvalidValue(
                f"{key} belongs to {MARGIN}: {' or '.join(margins)}, got {cfg[key]!r} with "
                f"{MARGIN}: {chosen}. Set {MARGIN}, or remove {key}."
            )
    if chosen == "dpo":
        return
    if chosen == "simpo" and not isinstance(_as_number(cfg.get("simpo_gamma")), float):
        raise InvalidValue(
            f"simpo_gamma must be a number with {MARGIN}: simpo, got {cfg.get('simpo_gamma')!r}: "
            "the target margin, 0.3 (Llama-3) and 0.8 (Mistral) times rl_beta in its authors' "
            "recipes. Set it."
        )
    weight = cfg.get("orpo_alpha")
    if weight is not None:
        try:
            check_beta(_as_number(weight))
        except ValueError:
            raise InvalidValue(
                f"orpo_alpha must be a finite number above 0, got {weight!r}: ORPO's lambda, 0.1 "
                "in its authors' recipe."
            ) from None
        if cfg.get("rl_beta") is not None or (cfg.get("trl") or {}).get("beta") is not None:
            raise InvalidValue(
                f"orpo_alpha must be given alone, got {weight!r} beside rl_beta or trl.beta: both "
                "are ORPO's lambda, and Axolotl would take the other. Remove one of the two."
            )
    of_dpo = [key for key in cfg if str(key).startswith("dpo_") or key in _OF_REFERENCE]
    for key in (*of_dpo, FUSED):
        if cfg.get(key):
            why = (
                "its path computes DPO's log-probabilities alone"
                if key == FUSED
                else "it is of DPO's trainer and its reference, which that margin doesn't have"
            )
            raise InvalidValue(
                f"{key} can't be combined with {MARGIN}: {chosen}, got {cfg[key]!r}: {why}. Remove "
                f"{key}."
            )


def _check_fused(cfg: Any, fused: str) -> None:
    alone = {"dpo_loss_type": (None, "sigmoid", ["sigmoid"]), "dpo_loss_weights": (None, [1.0])}
    others = {"dpo_use_weighting": (None, False), "tensor_parallel_size": (None, 1)}
    for key, fine in {**alone, **others}.items():
        if cfg.get(key) not in fine:
            raise InvalidValue(
                f"{fused} can't be combined with {key}, got {cfg[key]!r}: the fused path does not "
                f"compute it. Set {fused} to false, or remove {key}."
            )


# With rl: dpo Axolotl replaces a model's attention, or its whole forward, by these.
_OTHER_ATTENTION = ("xformers_attention", "sage_attention", "flex_attention", "s2_attention")
_OTHERS_NAMES = {"xformers", "sage", "fp8", "flex_attention", "s2"}


def _check_shared(cfg: Any) -> None:
    """Refuse keys of the config that shared prompts can't be combined with."""
    others = {key: cfg.get(key) for key in (*_OTHER_ATTENTION, "torch_compile", "deepcompile")}
    attention, size = cfg.get("attn_implementation"), cfg.get("tensor_parallel_size")
    others["attn_implementation"] = attention if attention in _OTHERS_NAMES else None
    others["tensor_parallel_size"] = None if size == 1 else size
    for key, value in others.items():
        if value:
            raise InvalidValue(
                f"{SHARED} can't be combined with {key}, got {value!r}: it has to know how each "
                f"layer's tokens see each other. Set {SHARED} to false, or remove {key}."
            )


def _as_number(value: Any) -> Any:
    """``value`` as a float if it can be read as one: YAML reads ``5e-2`` as a string."""
    try:
        return value if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return value
