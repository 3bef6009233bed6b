"""The pairwise losses that are installed: FocalPO's own and those of other packages."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Protocol

import pluggy
import torch
from torch import Tensor

from . import hookspecs
from .loss import focalpo_loss, focalpo_weight, label_smoothed, reversal_margin

GROUP = "focalpo_plugins"


class Register(Protocol):
    """What a ``register_losses`` hook is given to call."""

    def __call__(
        self,
        name: str,
        loss: Callable[..., Tensor],
        *,
        weight: Callable[..., Tensor] | None = None,
        reversal: Callable[..., float] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Add a loss.

        Args:
            name: what the user writes as ``rl: NAME``; a Python identifier in lower case.
            loss: ``loss(margins, **options)`` gives per-pair losses of the shape ``(B,)`` of the
                reward margins; it raises ``ValueError`` for an option out of range, with a message
                that begins with the option's name.
            weight: ``weight(margins, **options)``, what the loss multiplies DPO's gradient by.
                Without it the diagnostics ``NAME/weight`` and ``NAME/reversed`` are left out.
            reversal: ``reversal(**options)``, the margin below which the weight is negative.
            options: the options' names and default values; a host's key for the option ``o`` is
                ``NAME_o``.

        Raises:
            ValueError: the name is not an identifier in lower case, or is taken.
        """


@dataclass(frozen=True)
class PairwiseLoss:
    """A registered loss; see :class:`Register` for its parts."""

    name: str
    loss: Callable[..., Tensor]
    weight: Callable[..., Tensor] | None = None
    reversal: Callable[..., float] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def bind(self, **options: Any) -> BoundLoss:
        """The loss with its options set, those not given at their defaults.

        Raises:
            ValueError: an option is unknown or out of range.
        """
        for option in options:
            if option not in self.options:
                raise ValueError(
                    f"{option} is no option of the loss {self.name!r}"
                    f"{did_you_mean(option, self.options)}"
                )
        bound = BoundLoss(self, {**self.options, **options})
        bound(torch.zeros(1))  # the loss checks its own ranges, before anything is trained
        return bound


@dataclass(frozen=True)
class BoundLoss:
    """A registered loss with its options set."""

    source: PairwiseLoss
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.source.name

    def __call__(self, margins: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Per-pair losses, of the shape ``(B,)`` and the dtype of ``margins``."""
        loss = functools.partial(self.source.loss, **self.options)
        return label_smoothed(loss, margins, label_smoothing)

    def weight(self, margins: Tensor) -> Tensor | None:
        """What the loss multiplies DPO's gradient by, ``(B,)``; None where the loss doesn't say."""
        weight = self.source.weight
        if weight is None:
            return None
        return weight(margins, **_accepted(weight, self.options))

    def reversal(self) -> float:
        """The margin below which the weight is negative; ``-inf`` where the loss names none."""
        reversal = self.source.reversal
        return -math.inf if reversal is None else reversal(**_accepted(reversal, self.options))

    def describe(self) -> str:
        """For the start-up line: ``loss=focalpo gamma=0.05 ... loss_at_margin_0=0.6695``."""
        options = [f"{name}={value}" for name, value in self.options.items() if value is not False]
        parts = [f"loss={self.name}", *options]
        if self.source.reversal is not None:
            parts.append(f"z*={self.reversal():.2f}")
        parts.append(f"loss_at_margin_0={self(torch.zeros(1)).item():.4f}")
        return " ".join(parts)

    def record(self, separator: str, **of_host: Any) -> dict[str, Any]:
        """What a checkpoint says that it was trained with, by the key that asks for it.

        Args:
            separator: between the loss's name and an option, as the host's keys have it.
            of_host: the host's own values that go into the loss.
        """
        asked = {
            f"{self.name}{separator}{name}": value
            for name, value in self.options.items()
            if name != "allow_reversed"  # it lets a gamma through, and changes no loss
        }
        return {"loss": self.name, **asked, **of_host}


def losses() -> Mapping[str, PairwiseLoss]:
    """The installed losses by name, FocalPO first.

    A package whose hook fails is left out with one warning: runs that don't ask for its loss go on.
    """
    return _installed()[0]


def get_loss(name: str) -> PairwiseLoss:
    """The loss registered as ``name``.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    found, failed = _installed()
    if name not in found:
        raise ValueError(
            f"loss must be one of {', '.join(found)}, got {name!r}"
            f"{did_you_mean(name, found)}"
            + "".join(
                f" The package {package} failed to register: {why}." for package, why in failed
            )
        )
    return found[name]


@contextmanager
def named(prefix: str) -> Iterator[None]:
    """Put the user's prefix, ``focalpo_`` or ``--focalpo.``, before the message of a ValueError
    raised inside, which begins with the name of the value that is wrong."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a sentence: ``; did you mean 'gamma'?`` or, with nothing near, ``; known: a, b.``"""
    known = list(known)
    near = difflib.get_close_matches(word.lower(), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known) or 'none'}."


def check_unchanged(
    recorded: Mapping[str, Any] | None,
    asked: Mapping[str, Any],
    checkpoint: str,
    allow: str,
    written: Mapping[str, str],
) -> None:
    """Compare what a checkpoint was trained with and what is asked for.

    Args:
        recorded: by key, as saved with the checkpoint; None where nothing was.
        asked: by key, what this run would train.
        checkpoint: where it is, for the message.
        allow: what the user gives to go on all the same.
        written: the keys as the user writes them, where the host has another name for one.

    Raises:
        ValueError: they differ; half a run would be trained with one loss and half with another.
    """
    rest = f"give the values it was trained with, start without resuming, or give {allow}."
    if recorded is None:
        raise ValueError(
            f"the checkpoint {checkpoint} does not say that it was trained with a loss of "
            f"focalpo_plugins, got loss={asked['loss']!r} to go on with. Resume it with the loss "
            f"that began it, start without resuming, or give {allow}."
        )
    changed = [
        f"{written.get(key, key)} was {recorded.get(key)!r}, got {asked.get(key)!r}"
        for key in sorted({*recorded, *asked})
        if recorded.get(key) != asked.get(key)
    ]
    if changed:
        raise ValueError(f"{'; '.join(changed)}: so says the checkpoint {checkpoint}; {rest}")


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
            options={"gamma": 0.05, "variant": "correct", "allow_reversed": False},
        )


@functools.cache
def _installed() -> tuple[dict[str, PairwiseLoss], list[tuple[str, str]]]:
    manager = pluggy.PluginManager("focalpo_plugins")
    manager.add_hookspecs(hookspecs)
    found: dict[str, PairwiseLoss] = {}
    failed: list[tuple[str, str]] = []

    def register(name: str, loss: Callable[..., Tensor], **parts: Any) -> None:
        if not (name.isidentifier() and name == name.lower()):
            raise ValueError(f"name must be an identifier in lower case, got {name!r}")
        if name in found:
            raise ValueError(f"name must be new, got {name!r}, which is registered already")
        found[name] = PairwiseLoss(name, loss, **{k: v for k, v in parts.items() if v is not None})

    plugins: list[tuple[str, Callable[[], Any]]] = [("focalpo_plugins", _FocalPO)]
    plugins += [(point.name, point.load) for point in entry_points(group=GROUP)]
    for package, load in plugins:
        try:
            manager.register(load(), name=package)
            # One plugin at a time: pluggy would let the first that raises end the call for all.
            others = [plugin for name, plugin in manager.list_name_plugin() if name != package]
            manager.subset_hook_caller("register_losses", others)(register=register)
        except Exception as error:
            failed.append((package, f"{type(error).__name__}: {error}"))
            warnings.warn(
                f"focalpo_plugins: the package {package} failed to register its losses and is "
                f"left out ({type(error).__name__}: {error})",
                stacklevel=2,
            )
    return found, failed


def _accepted(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in parameters}
