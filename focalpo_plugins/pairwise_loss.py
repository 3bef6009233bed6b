"""A pairwise loss: its parts, its options, and a trial of it before it trains."""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .errors import FocalPOError, InvalidValue, RunError
from .guards.messages import did_you_mean
from .loss import label_smoothed

# Points of the run at which a loss is tried before it trains.
_PROGRESS = (0.0, 0.5, 1.0)
_MUST = "must return {} for each pair, as a floating-point tensor (2,) for 2 margins, got {}"


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
            RuntimeError: a part of the loss can't be called as :class:`Register` describes it, or
                returns anything but a number for each pair.
        """
        for option, value in options.items():
            if option not in self.options:
                raise InvalidValue(
                    f"{option} is not an option of the loss {self.name!r}"
                    f"{did_you_mean(option, self.options)}"
                )
            check_json(option, value)
        bound = BoundLoss(self, {**self.options, **options})
        for progress in _PROGRESS:
            bound.at(progress).try_out()
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
        now = self.now

        def loss(z: Tensor) -> Tensor:
            return self.source.loss(z.clone(), **now)  # a package's may change it in place

        return label_smoothed(loss, margins, label_smoothing)

    def weight(self, margins: Tensor) -> Tensor | None:
        """The factor of the loss on DPO's gradient, ``(B,)``; None if the loss doesn't give it."""
        weight = self.source.weight
        return None if weight is None else weight(margins.clone(), **_accepted(weight, self.now))

    def reversal(self) -> float:
        """The margin below which the weight is negative; ``-inf`` if the loss doesn't give it."""
        reversal = self.source.reversal
        return -math.inf if reversal is None else reversal(**_accepted(reversal, self.now))

    def try_out(self) -> None:
        """Call each part with two margins, as a run does.

        Raises:
            ValueError: an option is out of range; the loss checks it.
            RuntimeError: a part can't be called, or would not train each pair.
        """
        self._try("at", lambda: self.now)
        if not isinstance(self.now, Mapping):
            raise self._refused("at", f"must return options by name, got {self.now!r}")
        # The margin at which a run with a reference starts, and one other.  They are on a CPU, in
        # float32 and with a graph, whatever the caller has set.
        margins = torch.tensor([0.0, 1.0], device="cpu", dtype=torch.float32)
        with torch.inference_mode(False), torch.enable_grad():
            start = margins.clone().requires_grad_()
            losses = self._try("loss", lambda: self(start))
            wrong = _wrong_in(losses) or _wrong_in_gradient(losses, start)
        if wrong:
            raise self._refused("loss", _MUST.format("a finite loss with a gradient", wrong))
        # The diagnostics are computed in float64, or in float32 if the device has no float64.
        for wide in (margins, margins.double()):
            weights = self._try("weight", functools.partial(self.weight, wide))
            if weights is not None and (wrong := _wrong_in(weights)):
                raise self._refused("weight", _MUST.format("a factor", wrong))
        self._try("reversal", self.reversal)

    def _try(self, part: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except FocalPOError:
            raise
        except TypeError as error:
            raise self._refused(part, f"can't be called with its options: {error}") from error

    def _refused(self, part: str, why: str) -> RunError:
        package = self.source.package
        return RunError(
            f"{part} of {self.name}, from the package {package}, {why}. Fix it in the package."
        )

    def shown(self) -> dict[str, Any]:
        """The options that messages show: all except those that are off."""
        # Compared by identity, because 0 equals False.
        return {name: o for name, o in self.options.items() if o is not False and o is not None}

    def describe(self) -> str:
        """For the start-up line: ``loss=focalpo gamma=0.05 ... loss_at_margin_0=0.6695``."""
        parts = [f"loss={self.name}", *(f"{name}={value}" for name, value in self.shown().items())]
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
            # FocalPO's allow_reversed changes no loss; None means the same as no record.
            if (self.name, name) != ("focalpo", "allow_reversed") and value is not None
        }
        record: dict[str, Any] = json.loads(json.dumps({"loss": self.name, **asked, **of_host}))
        return record


def check_json(what: str, value: object) -> None:
    """Refuse a value of an option that a checkpoint's record can't hold."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        raise InvalidValue(
            f"{what} must be a value that JSON can hold, got {value!r}: checkpoints record it"
        ) from None


def _wrong_in(returned: object) -> str:
    """What is wrong with the values of two margins; empty if nothing is."""
    if not isinstance(returned, Tensor):
        return f"{type(returned).__name__} {returned!r}"
    if returned.shape != (2,):
        return f"a tensor of shape {tuple(returned.shape)}"
    return "" if returned.is_floating_point() else f"a tensor of {returned.dtype}"


def _wrong_in_gradient(losses: Tensor, margins: Tensor) -> str:
    if not losses.requires_grad:
        return "a tensor without a gradient"
    (slopes,) = torch.autograd.grad(losses.sum(), margins)
    for what, values in (("losses", losses), ("gradients", slopes)):
        if not values.isfinite().all():
            return f"{what} that are not finite, {values.tolist()}"
    return ""


def _accepted(function: Callable[..., Any], options: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options that ``function`` names; all if it takes any, or has no signature."""
    if isinstance(function, torch.nn.Module):
        function = function.forward  # a module's __call__ takes anything
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some functions written in C have none
        return options
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return options
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return {name: value for name, value in options.items() if name in named}
