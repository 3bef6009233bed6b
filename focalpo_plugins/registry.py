"""The pairwise losses that are installed: FocalPO's own and those of other packages."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any

import pluggy
from torch import Tensor

from . import hookspecs
from .errors import InvalidValue
from .guards.messages import did_you_mean, one_line
from .hookspecs import Register
from .loss import check_gamma, focalpo_loss, focalpo_weight, gamma_at, reversal_margin
from .options import OF_ANY_LOSS, OF_FOCALPO
from .pairwise_loss import BoundLoss, PairwiseLoss, check_json

__all__ = ["RESERVED_NAMES", "BoundLoss", "PairwiseLoss", "add", "get_loss", "losses", "manager"]

GROUP = "focalpo_plugins"

# Names that mean something else in a host, so no loss can have them.
RESERVED_NAMES = frozenset(
    {
        # Axolotl: other values of `rl`, and the first words of its own keys
        *("dpo", "ebft", "gdpo", "grpo", "ipo", "kto", "orpo", "simpo", "sft", "reward_model"),
        *("adapter", "base", "dataset", "datasets", "deepspeed", "fsdp", "lora", "peft", "plugins"),
        *("rl", "trainer", "trl", "vllm"),
        # this package's own flag in OpenRLHF; OpenRLHF's flags are compared when it is added
        "loss",
        # the first words of the names that hosts log
        *("entropy", "eval", "logits", "logps", "rewards", "test", "train"),
    }
)
# Every loss has keys or flags with these names in a host, so no option can have them.
RESERVED_OPTIONS = frozenset({*OF_ANY_LOSS, "loss", "pairwise_loss", "rl"})

#: :func:`add` registers losses here.
manager = pluggy.PluginManager("focalpo_plugins")
manager.add_hookspecs(hookspecs)
_losses: dict[str, PairwiseLoss] = {}


def losses() -> Mapping[str, PairwiseLoss]:
    """The installed losses by name, FocalPO first.

    If anything in a package fails, the whole package is left out, with one warning: runs that don't
    ask for its losses continue.
    """
    _add_installed()
    return MappingProxyType(_losses)


def get_loss(name: str) -> PairwiseLoss:
    """The loss registered as ``name``.

    Raises:
        ValueError: there is no such loss; the message lists the known ones.
    """
    failed = _add_installed()
    if name not in _losses:
        raise InvalidValue(
            f"loss must be one of {', '.join(_losses)}, got {name!r}{did_you_mean(name, _losses)}"
            + "".join(
                f" The package {package} failed to register: {why}." for package, why in failed
            )
        )
    return _losses[name]


def add(package: str, plugin: Any) -> None:
    """Register the losses of a plugin: all losses of its ``register_losses``, or none.

    Args:
        package: the name of the plugin's package.
        plugin: a module or a class with the hook.

    Raises:
        ValueError: a loss breaks a rule of :class:`Register`, or there is no loss.
        Exception: any error that the plugin raises.
    """
    own: dict[str, PairwiseLoss] = {}

    def register(name: str, loss: Callable[..., Tensor], **parts: Any) -> None:
        given = {part: value for part, value in parts.items() if value is not None}
        registered = PairwiseLoss(name, loss, **given, package=package)
        _check(registered, {**_losses, **own})
        own[name] = registered

    manager.register(plugin, name=package)
    try:
        # One plugin at a time: in pluggy the first plugin that raises ends the call for all.
        others = [other for name, other in manager.list_name_plugin() if name != package]
        manager.subset_hook_caller("register_losses", others)(register=register)
        if not own:
            raise InvalidValue("it registers no loss; is its register_losses marked @hookimpl?")
    except BaseException:
        manager.unregister(name=package)
        raise
    _losses.update(own)


class _FocalPO:
    """FocalPO's own registration, through the hook that every other package uses."""

    @staticmethod
    @hookspecs.hookimpl
    def register_losses(register: Register) -> None:
        register(
            "focalpo",
            focalpo_loss,
            weight=focalpo_weight,
            reversal=reversal_margin,
            options={
                "gamma": 0.05,
                "gamma_end": None,
                "gamma_schedule": None,
                "variant": "correct",
                "allow_reversed": False,
            },
            help=OF_FOCALPO,
            at=_FocalPO.at,
        )

    @staticmethod
    def at(
        progress: float,
        *,
        gamma: float,
        gamma_end: float | None,
        gamma_schedule: str | None,
        **fixed: Any,
    ) -> Mapping[str, Any]:
        if gamma_end is not None:
            check_gamma(gamma_end, name="gamma_end", **fixed)
            check_gamma(gamma, **fixed)
        return {"gamma": gamma_at(progress, gamma, gamma_end, gamma_schedule), **fixed}


@functools.cache
def _add_installed() -> list[tuple[str, str]]:
    """Add the losses of other packages, once; return the packages that failed, and why."""
    failed = []
    # Not pluggy's load_setuptools_entrypoints: it stops at the first package that can't be loaded.
    for point in entry_points(group=GROUP):
        try:
            add(point.name, point.load())
        except Exception as error:
            failed.append((point.name, one_line(error).rstrip(".")))
            warnings.warn(
                f"focalpo_plugins: the package {point.name} failed to register its losses and is "
                f"left out ({one_line(error)})",
                stacklevel=2,
            )
    return failed


def _check(loss: PairwiseLoss, others: Mapping[str, PairwiseLoss]) -> None:
    """Refuse a loss whose names break a rule of :class:`Register`."""
    _check_word("name", "an identifier in lower case", loss.name, RESERVED_NAMES, "a-z")
    if loss.name in others:
        raise InvalidValue(
            f"name must be new, got {loss.name!r}: the package {others[loss.name].package} has "
            "registered it already"
        )
    taken = {
        f"{other.name}_{option}": other.name
        for other in others.values()
        for option in (*other.options, *RESERVED_OPTIONS)
    }
    for option, default in loss.options.items():
        _check_word(f"an option of {loss.name}", "an identifier", option, RESERVED_OPTIONS)
        check_json(f"the default of {loss.name}'s option {option}", default)
        key = f"{loss.name}_{option}"
        if key in taken:
            raise InvalidValue(
                f"an option of {loss.name} must give a new key, got {option!r}: {key} "
                f"belongs to the loss {taken[key]}"
            )
    for option in loss.help:
        if option not in loss.options:
            raise InvalidValue(
                f"help of {loss.name} must name its options, got {option!r}"
                f"{did_you_mean(option, loss.options)}"
            )


def _check_word(
    what: str, kind: str, word: object, reserved: Collection[str], letters: str = "a-zA-Z"
) -> None:
    pattern = f"[{letters}][{letters}0-9]*(_[{letters}0-9]+)*"
    if not isinstance(word, str) or not re.fullmatch(pattern, word):
        raise InvalidValue(
            f"{what} must be {kind}, without outer or double underscores, got {word!r}"
        )
    if word in reserved:
        raise InvalidValue(
            f"{what} must not be a name that a host uses, got {word!r}; these are "
            f"{', '.join(sorted(reserved))}"
        )


add("focalpo_plugins", _FocalPO)
