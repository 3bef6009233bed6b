"""The Axolotl plugin: turns ``rl: focalpo`` into Axolotl's DPO with our trainer, or refuses.

Axolotl knows no ``rl`` but its own, so the plugin rewrites the raw YAML before it is validated,
to ``rl: dpo`` with our ``trainer_cls``, and notes the loss in ``focalpo_loss``.  All its state is
in the config, which is what reaches Ray's workers; there it is registered a second time.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.utils.schemas.enums import RLType

from ..loss import check_beta, check_label_smoothing
from ..pairs import check_file
from ..registry import BoundLoss, PairwiseLoss, did_you_mean, get_loss, losses, named
from . import ALLOW_CHANGED, ALLOW_DATA, FUSED, TRAINER


class FocalPOPlugin(BasePlugin):
    """``plugins: [focalpo_plugins.axolotl.FocalPOPlugin]``; needed only where autoload is off."""

    def get_input_args(self) -> str:
        return "focalpo_plugins.axolotl.args.FocalPOArgs"

    def register(self, cfg: Any) -> None:
        """Check the raw config and rewrite it.

        Raises:
            ValueError: the config asks for what can't be trained; the message names the key.
            RuntimeError: the installed TRL computes its loss elsewhere.
        """
        of_host = [rl.value for rl in RLType]
        known = [*of_host, *losses()]
        name, trainer = cfg.get("rl"), cfg.get("trainer_cls")
        if name is not None and name not in known:
            near = did_you_mean(str(name), known)
            raise ValueError(f"rl must be one of {', '.join(known)}, got {name!r}{near}.")
        if name == "dpo" and trainer == TRAINER and requested_loss(cfg) is not None:
            return  # rewritten before, in the process that started this one
        _check_keys(cfg, name)
        if trainer is not None and (trainer == TRAINER or name in losses()):
            raise ValueError(
                f"trainer_cls must be unset, got {trainer!r} under rl: {name}: a loss of ours "
                "brings its trainer. Remove trainer_cls and set rl: focalpo."
            )
        if name is None or name in of_host:
            return
        _check_values(cfg, get_loss(name))
        cfg["rl"] = "dpo"
        cfg["trainer_cls"] = TRAINER
        cfg["focalpo_loss"] = name

    def pre_model_load(self, cfg: Any) -> None:
        """Refuse another plugin's trainer, which Axolotl would take instead of ours."""
        if requested_loss(cfg) is None:
            return
        for name, plugin in PluginManager.get_instance().plugins.items():
            trainer = plugin.get_trainer_cls(cfg)
            if trainer is not None:
                raise ValueError(
                    f"plugins holds {name}, whose trainer {trainer.__name__} would run instead of "
                    f"the one that trains rl: {cfg.focalpo_loss}. Remove one of the two."
                )

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Make sure that the trainer is ours and has the loss that this config asks for.

        Raises:
            RuntimeError: Axolotl built another trainer.
        """
        loss = requested_loss(cfg)
        if loss is None:
            return
        from .trainer import AxolotlPairwiseTrainer

        if not isinstance(trainer, AxolotlPairwiseTrainer):
            raise RuntimeError(
                f"Axolotl built {type(trainer).__name__} where rl: {loss.name} needs "
                f"{AxolotlPairwiseTrainer.__name__}: it would have trained another loss. Remove "
                "what replaces the trainer (trainer_cls, another plugin)."
            )
        if trainer.pairwise_loss != loss:
            trainer.set_loss(loss)
        # Axolotl names the data in the model card for its own trainer class only.
        trainer.dataset_tags = [d["path"] for d in cfg.datasets if not Path(d["path"]).is_dir()]


def requested_loss(cfg: Any) -> BoundLoss | None:
    """The loss that a rewritten config asks for; None where it asks for none of ours."""
    name = cfg.get("focalpo_loss")
    return None if name is None else _bind(cfg, get_loss(name))


def fused_key(cfg: Any) -> str | None:
    """The key that asks for the fused path; None where none does."""
    return next((key for key in (FUSED, "dpo_use_liger_kernel") if cfg.get(key)), None)


def _bind(cfg: Any, loss: PairwiseLoss) -> BoundLoss:
    given = {}
    for option, default in loss.options.items():
        value = cfg.get(f"{loss.name}_{option}")
        if value is not None:
            given[option] = _as_number(value) if isinstance(default, float) else value
    with named(f"{loss.name}_"):
        return loss.bind(**given)


def _check_keys(cfg: Any, rl: str) -> None:
    of_loss = {
        f"{loss.name}_{option}": loss.name for loss in losses().values() for option in loss.options
    }
    of_any = rl if rl in losses() else "focalpo"
    of_loss |= {FUSED: of_any, ALLOW_CHANGED: of_any, ALLOW_DATA: of_any}
    for key in cfg:
        if str(key).startswith("focalpo_") and key not in of_loss:
            raise ValueError(
                f"{key} is no key of focalpo_plugins, got {cfg[key]!r}{did_you_mean(key, of_loss)}."
            )
        if key in of_loss and cfg[key] is not None and of_loss[key] != rl:
            raise ValueError(
                f"{key} belongs to rl: {of_loss[key]}, got {cfg[key]!r} under rl: {rl}. Set "
                f"rl: {of_loss[key]}, or remove {key}."
            )


def _check_values(cfg: Any, loss: PairwiseLoss) -> None:
    from ..trl import check_host, check_loss_types

    check_host()
    _bind(cfg, loss)

    of_trl = cfg.get("trl") or {}
    if not isinstance(of_trl, dict):
        raise ValueError(f"trl must be a mapping such as {{beta: 0.1}}, got {of_trl!r}.")
    betas = {"rl_": cfg.get("rl_beta"), "trl.": of_trl.get("beta")}
    for prefix, beta in betas.items():
        if beta is not None:
            with named(prefix):
                check_beta(_as_number(beta))
    if None not in betas.values() and len({_as_number(beta) for beta in betas.values()}) > 1:
        raise ValueError(
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
    for key in (FUSED, ALLOW_CHANGED, ALLOW_DATA):
        if cfg.get(key) not in (None, True, False):
            raise ValueError(f"{key} must be true or false, got {cfg[key]!r}.")
    if cfg.get("dpo_use_liger_kernel") and find_spec("liger_kernel") is None:
        raise ValueError(
            "dpo_use_liger_kernel needs the package liger-kernel, which is not installed. Install "
            f"it, or set {FUSED} in its place, which needs nothing."
        )
    for key in ("context_parallel_size", "sequence_parallel_degree"):
        if cfg.get(key) not in (None, 0, 1):
            raise ValueError(
                f"{key} must be 1 under rl: {loss.name}, got {cfg[key]!r}: Axolotl gives each rank "
                "a part of a sequence and its logits, and a margin is of whole sequences. Remove "
                f"it; {FUSED} and ZeRO-3 save memory too."
            )
    fused = fused_key(cfg)
    if fused is not None:
        _check_fused(cfg, fused)
    for key in ("datasets", "test_datasets"):
        listed = cfg.get(key)
        for number, dataset in enumerate(listed if isinstance(listed, list) else []):
            if isinstance(dataset, dict) and isinstance(dataset.get("path"), str):
                check_file(Path(dataset["path"]), f"{key}[{number}].path")


def _check_fused(cfg: Any, fused: str) -> None:
    alone = {"dpo_loss_type": (None, "sigmoid", ["sigmoid"]), "dpo_loss_weights": (None, [1.0])}
    others = {"dpo_use_weighting": (None, False), "tensor_parallel_size": (None, 1)}
    for key, fine in {**alone, **others}.items():
        if cfg.get(key) not in fine:
            raise ValueError(
                f"{fused} can't be combined with {key}, got {cfg[key]!r}: the fused path has no "
                f"part for it. Set {fused} to false, or remove {key}."
            )


def _as_number(value: Any) -> Any:
    """``value`` as a float where it reads as one: YAML takes ``5e-2`` for a string."""
    try:
        return value if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return value
