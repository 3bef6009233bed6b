"""The pairwise losses that are installed: FocalPO's own and those of other packages."""

from __future__ import annotations

import functools
import inspect
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any, NoReturn

import pluggy
import torch
from torch import Tensor

from . import hookspecs
from .errors import InvalidValue, RunError
from .guards.messages import did_you_mean, one_line
from .hookspecs import Register
from .loss import (
    check_gamma,
    focalpo_loss,
    focalpo_weight,
    gamma_at,
    label_smoothed,
    reversal_margin,
)
from .options import OF_ANY_LOSS, OF_FOCALPO

GROUP = "focalpo_plugins"

# Names that mean something else in a host, so no loss can have them.
RESERVED_NAMES = frozenset(
    {
        # Axolotl: other values of `rl`, and the first words of its own keys
        *("dpo", "ebft", "gdpo", "grpo", "ipo", "kto", "orpo", "simpo", "sft", "reward_model"),
        *("adapter", "base", "dataset", "datasets", "deepspeed", "fsdp", "lora", "peft", "plugins"),
        *("rl", "trainer", "trl", "vllm"),
        # our own flag in OpenRLHF, whose other flags are compared when ours are added
        "loss",
        # the first words of what the hosts log
        *("entropy", "eval", "logits", "logps", "rewards", "test", "train"),
    }
)
# Names of keys or flags that each of our losses has in a host, so no option can have them.
RESERVED_OPTIONS = frozenset({*OF_ANY_LOSS, "loss", "pairwise_loss", "rl"})

# Points of the run at which a loss is tried before it trains.
_PROGRESS = (0.0, 0.5, 1.0)

#: :func:`add` registers losses here.
manager = pluggy.PluginManager("focalpo_plugins")
manager.add_hookspecs(hookspecs)
_losses: dict[str, PairwiseLoss] = {}


@dataclass(frozen=True)
class PairwiseLoss:
    """A registered loss; see :class:`Register` for its parts."""

    name: str
    loss: Callable[..., Tensor]
    weight: Callable[..., Tensor] | None = None
    reversal: Callable[..., float] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    help: Mapping[str, str] = field(default_factory=dict)
    at: Callable[..., Mapping[str, Any]] | None = None
    #: The package that registered it, by the name of its entry point.
    package: str = "focalpo_plugins"

    def bind(self, **options: Any) -> BoundLoss:
        """The loss with its options set; options that are not given have their defaults.

        Raises:
            ValueError: an option is unknown, out of range, or a value that JSON can't hold.
            RuntimeError: the loss or its weight returns anything but a number for each pair.
        """
        for option, value in options.items():
            if option not in self.options:
                raise InvalidValue(
                    f"{option} is no option of the loss {self.name!r}"
                    f"{did_you_mean(option, self.options)}"
                )
            _check_json(option, value)
        bound = BoundLoss(self, {**self.options, **options})
        for progress in _PROGRESS:
            # The loss checks its own ranges, before anything is trained.
            _check_returned(bound.at(progress))
        return bound


@dataclass(frozen=True)
class BoundLoss:
    """A registered loss with its options set.

    Attributes:
        progress: the current point of the run, from 0 to 1.
    """

    source: PairwiseLoss
    options: Mapping[str, Any]
    progress: float = 0.0

    @property
    def name(self) -> str:
        return self.source.name

    def at(self, progress: float) -> BoundLoss:
        """The loss at a point of the run; the same object if it doesn't change over the run."""
        return self if self.source.at is None else replace(self, progress=progress)

    @property
    def now(self) -> Mapping[str, Any]:
        """The options that the loss is called with."""
        at = self.source.at
        return self.options if at is None else at(self.progress, **self.options)

    def moving(self) -> dict[str, float]:
        """The numbers among :attr:`now` that change over the run."""
        points = [self.at(progress).now for progress in _PROGRESS]
        now = self.now.items() if self.source.at is not None else ()
        return {
            name: value
            for name, value in now
            if isinstance(value, float | int) and any(point[name] != value for point in points)
        }

    def __call__(self, margins: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Per-pair losses, of the shape ``(B,)`` and the dtype of ``margins``."""
        loss = functools.partial(self.source.loss, **self.now)
        return label_smoothed(loss, margins, label_smoothing)

    def weight(self, margins: Tensor) -> Tensor | None:
        """The factor of the loss on DPO's gradient, ``(B,)``; None if the loss doesn't give it."""
        weight = self.source.weight
        if weight is None:
            return None
        return weight(margins, **_accepted(weight, self.now))

    def reversal(self) -> float:
        """The margin below which the weight is negative; ``-inf`` if the loss doesn't give it."""
        reversal = self.source.reversal
        return -math.inf if reversal is None else reversal(**_accepted(reversal, self.now))

    def said(self) -> dict[str, Any]:
        """The options that messages show: all except those that are off."""
        # Compared by identity, because 0 equals False.
        return {name: o for name, o in self.options.items() if o is not False and o is not None}

    def describe(self) -> str:
        """For the start-up line: ``loss=focalpo gamma=0.05 ... loss_at_margin_0=0.6695``."""
        parts = [f"loss={self.name}", *(f"{name}={value}" for name, value in self.said().items())]
        if self.source.reversal is not None:
            stars = [f"{self.at(progress).reversal():.2f}" for progress in (0.0, 1.0)]
            parts.append("z*=" + "..".join(dict.fromkeys(stars)))
        parts.append(f"loss_at_margin_0={self(torch.zeros(1)).item():.4f}")
        return " ".join(parts)

    def record(self, separator: str, **of_host: Any) -> dict[str, Any]:
        """What a checkpoint records about its training, by the key that asks for it.

        The values are as JSON returns them.

        Args:
            separator: the text between the loss's name and an option in the host's keys.
            of_host: the host's own values that go into the loss.
        """
        asked = {
            f"{self.name}{separator}{name}": value
            for name, value in self.options.items()
            # FocalPO's only accepts a gamma and changes no loss; None means the same as no record.
            if (self.name, name) != ("focalpo", "allow_reversed") and value is not None
        }
        record: dict[str, Any] = json.loads(json.dumps({"loss": self.name, **asked, **of_host}))
        return record


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
        ValueError: there is none; the message lists the known losses.
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
        variant: str,
        allow_reversed: bool,
    ) -> Mapping[str, Any]:
        if gamma_end is not None:
            check_gamma(gamma_end, variant, allow_reversed=allow_reversed, name="gamma_end")
            check_gamma(gamma, variant, allow_reversed=allow_reversed)
        return {
            "gamma": gamma_at(progress, gamma, gamma_end, gamma_schedule),
            "variant": variant,
            "allow_reversed": allow_reversed,
        }


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
    """Refuse a loss that breaks a rule of :class:`Register`."""
    _check_word("name", loss.name, RESERVED_NAMES)
    if loss.name != loss.name.lower():
        raise InvalidValue(f"name must be an identifier in lower case, got {loss.name!r}")
    if loss.name in others:
        raise InvalidValue(
            f"name must be new, got {loss.name!r}, which is registered already by the package "
            f"{others[loss.name].package}"
        )
    taken = dict.fromkeys((f"focalpo_{option}" for option in RESERVED_OPTIONS), "focalpo")
    taken |= {
        f"{other.name}_{option}": other.name
        for other in others.values()
        for option in other.options
    }
    for option, default in loss.options.items():
        _check_word(f"an option of {loss.name}", option, RESERVED_OPTIONS)
        _check_json(f"the default of {loss.name}'s option {option}", default)
        key = f"{loss.name}_{option}"
        if key in taken:
            raise InvalidValue(
                f"an option of {loss.name} must make a key that is new, got {option!r}: {key} "
                f"belongs to the loss {taken[key]}"
            )
    for option in loss.help:
        if option not in loss.options:
            raise InvalidValue(
                f"help of {loss.name} must name its options, got {option!r}"
                f"{did_you_mean(option, loss.options)}"
            )
    if loss.at is not None:
        _check_call(loss, "at", "progress", loss.options)
        for progress in _PROGRESS:
            found = loss.at(progress, **loss.options)
            if not isinstance(found, Mapping):
                raise InvalidValue(
                    f"at of {loss.name} must give options by name, got {found!r}: a dict such as "
                    "{'slope': 1.0}"
                )
    now = BoundLoss(loss, loss.options).now
    _check_call(loss, "loss", "margins", now)
    if loss.weight is not None:
        _check_call(loss, "weight", "margins", _accepted(loss.weight, now))
    if loss.reversal is not None:
        _check_call(loss, "reversal", "", _accepted(loss.reversal, now))


def _check_returned(loss: BoundLoss) -> None:
    """Refuse a loss that would not train each pair, as :class:`Register` describes it."""
    # One pair at the margin at which a run with a reference starts, and another.  On a CPU, in
    # float32 and with a graph, whatever the caller has set.
    plain = {"device": "cpu", "dtype": torch.float32}
    with torch.inference_mode(False), torch.enable_grad():
        margins = torch.tensor([0.0, 1.0], **plain, requires_grad=True)  # type: ignore[arg-type]
        losses = loss(margins.clone())  # which the loss may change in place, as a step's
        wrong = _wrong_in(losses)
        if not wrong and not losses.requires_grad:
            wrong = "a tensor without a gradient"
        if not wrong:
            slopes = torch.autograd.grad(losses.sum(), margins)[0]
            for what, values in (("losses", losses), ("gradients", slopes)):
                if not values.isfinite().all():
                    wrong = wrong or f"{what} that are not finite, {values.tolist()}"
    if wrong:
        _refuse(loss, "loss", "a finite loss with a gradient", wrong)
    # The diagnostics are computed in float64, or in float32 if the device has no float64.
    for dtype in (torch.float32, torch.float64):
        weights = loss.weight(torch.tensor([0.0, 1.0], device="cpu", dtype=dtype))
        if weights is not None and (wrong := _wrong_in(weights)):
            _refuse(loss, "weight", "a factor", wrong)


def _wrong_in(returned: object) -> str:
    """What is wrong with the values of two margins; empty if nothing is."""
    if not isinstance(returned, Tensor):
        return f"{type(returned).__name__} {returned!r}"
    if returned.shape != (2,):
        return f"a tensor of shape {tuple(returned.shape)}"
    return "" if returned.is_floating_point() else f"a tensor of {returned.dtype}"


def _refuse(loss: BoundLoss, part: str, expected: str, wrong: str) -> NoReturn:
    raise RunError(
        f"{part} of {loss.name}, from the package {loss.source.package}, must return {expected} "
        f"for each pair, as a floating-point tensor (2,) for 2 margins, got {wrong}. Fix it "
        "in the package."
    )


def _check_call(loss: PairwiseLoss, part: str, first: str, options: Mapping[str, Any]) -> None:
    """Refuse a function that can't be called with ``first`` and the options."""
    signature = _signature(getattr(loss, part))
    if signature is None:
        return
    positional = [first] if first else []
    try:
        signature.bind(*positional, **options)
    except TypeError as error:
        called = ", ".join([*positional, *(f"{option}=..." for option in options)])
        raise InvalidValue(
            f"{part} of {loss.name} can't be called as {part}({called}): {error}"
        ) from None


def _check_word(what: str, word: object, reserved: Iterable[str]) -> None:
    if not isinstance(word, str) or not re.fullmatch(r"[a-zA-Z][a-zA-Z0-9]*(_[a-zA-Z0-9]+)*", word):
        kind = "an identifier in lower case" if what == "name" else "an identifier"
        raise InvalidValue(
            f"{what} must be {kind}, without outer or double underscores, got {word!r}"
        )
    if word in reserved:
        raise InvalidValue(
            f"{what} must be none that a host uses, got {word!r}; they are "
            f"{', '.join(sorted(reserved))}"
        )


def _check_json(what: str, value: object) -> None:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        raise InvalidValue(
            f"{what} must be a value that JSON can hold, got {value!r}: a checkpoint says what it "
            "was trained with"
        ) from None


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    """The function's signature; None if it has none, as some functions written in C."""
    if isinstance(function, torch.nn.Module):
        function = function.forward  # a module's __call__ takes anything
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def _accepted(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that ``function`` names; all if it takes any, or has no signature."""
    signature = _signature(function)
    if signature is None:
        return dict(options)
    parameters = signature.parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(options)
    by_name = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return {name: value for name, value in options.items() if name in by_name}


add("focalpo_plugins", _FocalPO)
