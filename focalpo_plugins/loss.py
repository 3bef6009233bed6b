r"""FocalPO as functions of the reward margin, and a thin module over them.

Everything here is per pair and independent of any trainer.  With the reward margin
``z = beta * (logratio_chosen - logratio_rejected)`` and ``p = sigmoid(z)``, DPO's loss is
``-log p``.  FocalPO (arXiv 2501.06645, section 3) multiplies it by a modulating factor:

==================  ====================  =========================================================
variant             modulating factor     in the paper
==================  ====================  =========================================================
``correct``         ``p**gamma``          Eq. 4, its default; focuses on pairs ranked right
``correct_exact``   ``(1 - p)**-gamma``   Eq. 3, which Eq. 4 approximates
``incorrect``       ``(1 - p)**gamma``    Fig. 1 and 4, gamma 1; focuses on pairs ranked wrong
==================  ====================  =========================================================

The arithmetic runs in float32 at least, in log space, and the result has the input's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import InvalidType, InvalidValue

VARIANTS = ("correct", "correct_exact", "incorrect")
#: How gamma goes from one value to another over a run, for :func:`gamma_at`.
SCHEDULES = ("constant", "linear", "cosine")

#: From this gamma on, ``correct`` pushes a pair with margin 0 the wrong way: every run starts
#: with margin 0, so it would train backwards from its first step.
REVERSAL_GAMMA = 1 / math.log(2)


def focalpo_loss(
    margins: Tensor,
    gamma: float = 0.05,
    variant: str = "correct",
    *,
    label_smoothing: float = 0.0,
    allow_reversed: bool = False,
) -> Tensor:
    r"""Per-pair FocalPO loss; the only change with respect to DPO is the modulating factor.

    .. math:: L(z) = -p^\gamma \log p, \qquad p = \sigma(z) \qquad\text{(Eq. 4)}

    Value and gradient are finite for every finite margin, and ``gamma=0`` gives
    ``-logsigmoid(margins)`` to the last bit, the gradient included.

    Args:
        margins: reward margins ``z``, any shape, usually ``(B,)``, floating dtype.  Beta is
            already in them.
        gamma: focusing parameter, the paper's 0.05 by default.
        variant: one of :data:`VARIANTS`.
        label_smoothing: assumed share ``e`` of flipped labels, ``0 <= e < 0.5``; the loss is
            ``(1 - e) L(z) + e L(-z)``, as in conservative DPO.
        allow_reversed: accept a gamma that :func:`check_gamma` refuses because the gradient
            would point the wrong way.

    Returns:
        Losses of the shape and dtype of ``margins``.

    Raises:
        TypeError: ``margins`` is not a floating-point tensor.
        ValueError: ``gamma``, ``variant`` or ``label_smoothing`` is out of range.
    """
    check_gamma(gamma, variant, allow_reversed=allow_reversed)
    _check_margins(margins)
    if gamma == 0:
        # DPO's own expression: no other one equals it in the last bit.
        return label_smoothed(lambda z: -F.logsigmoid(z), margins, label_smoothing)
    return label_smoothed(lambda z: _focalpo(z, float(gamma), variant), margins, label_smoothing)


def focalpo_weight(
    margins: Tensor,
    gamma: float = 0.05,
    variant: str = "correct",
    *,
    allow_reversed: bool = False,
) -> Tensor:
    r"""The factor by which the loss multiplies DPO's gradient, per pair.

    .. math:: w(z) = \frac{dL/dz}{-(1 - p)} = p^\gamma (1 + \gamma \log p)

    for ``correct`` (the bracket of Eq. 6 divided by Eq. 5's weight).  For ``(1 - p)**s``, with
    ``s = -gamma`` in ``correct_exact`` and ``s = gamma`` in ``incorrect``, it is
    ``(1 - p)**s * (1 - s * p * log(p) / (1 - p))``.

    A negative weight means that a step would push the pair towards the wrong order.  The weight
    of ``correct_exact`` grows like ``exp(gamma * z)`` and is ``inf`` if the dtype can't hold it;
    the gradient itself, ``-(1 - p) * w``, stays finite.

    Args:
        margins: reward margins ``z``, any shape, floating dtype.
        gamma: focusing parameter.
        variant: one of :data:`VARIANTS`.
        allow_reversed: as in :func:`focalpo_loss`.

    Returns:
        Weights of the shape and dtype of ``margins``.

    Raises:
        TypeError: ``margins`` is not a floating-point tensor.
        ValueError: ``gamma`` or ``variant`` is out of range.
    """
    check_gamma(gamma, variant, allow_reversed=allow_reversed)
    _check_margins(margins)
    z = _at_least_float32(margins)
    if variant == "correct":
        scaled = _scaled(F.logsigmoid(z), gamma)
        weight = torch.exp(scaled) * (1 + scaled)
    else:
        s = _exponent(gamma, variant)
        weight = torch.exp(s * F.logsigmoid(-z)) * (1 + s * _entropy_ratio(z))
    return weight.to(margins.dtype)


def reversal_margin(gamma: float, variant: str = "correct") -> float:
    r"""The margin ``z*`` below which the loss pushes a pair the wrong way.

    .. math:: z^* = \operatorname{logit}(e^{-1/\gamma}) = -\log(e^{1/\gamma} - 1)

    It is about ``-1 / gamma``: -20 at gamma 0.05, -0.54 at gamma 1, above 0 from
    :data:`REVERSAL_GAMMA` on.  ``-inf`` for gamma 0 and for the variants whose gradient never
    changes sign.

    Raises:
        ValueError: ``gamma`` or ``variant`` is out of range.
    """
    check_gamma(gamma, variant, allow_reversed=True)
    if variant != "correct" or gamma == 0:
        return -math.inf
    # log(e^x - 1) = x + log(1 - e^-x) does not overflow for the large x of a small gamma.
    return -1 / gamma - math.log(-math.expm1(-1 / gamma))


def label_smoothed(
    loss: Callable[[Tensor], Tensor], margins: Tensor, label_smoothing: float
) -> Tensor:
    """``(1 - e) * loss(z) + e * loss(-z)``, conservative DPO's label smoothing, for any pairwise
    loss of the margin ``z``.

    Raises:
        ValueError: ``label_smoothing`` is outside ``[0, 0.5)``.
    """
    check_label_smoothing(label_smoothing)
    if label_smoothing == 0:
        return loss(margins)
    return (1 - label_smoothing) * loss(margins) + label_smoothing * loss(-margins)


def gamma_at(
    progress: float, gamma: float, gamma_end: float | None = None, gamma_schedule: str | None = None
) -> float:
    r"""Gamma at a point of a run, as a function of only the progress ``t``.

    .. math::
        \gamma_t = \gamma_1 + (\gamma_0 - \gamma_1)\,(1 - t) \quad\text{(linear)}, \qquad
        \gamma_t = \gamma_1 + (\gamma_0 - \gamma_1)\,\tfrac{1 + \cos \pi t}{2}
        \quad\text{(cosine)}

    A falling gamma makes training ignore more misranked pairs at first.

    Args:
        progress: ``t``, 0 at the first step of a run and 1 at its last.
        gamma: ``gamma_0``, at the first step.
        gamma_end: ``gamma_1``, at the last step; None if gamma doesn't change.
        gamma_schedule: one of :data:`SCHEDULES`; by default ``linear`` with a ``gamma_end``, and
            ``constant`` without.

    Returns:
        Gamma; exactly ``gamma`` and ``gamma_end`` at the two ends.  This function doesn't check
        their range; :func:`check_gamma` does.

    Raises:
        ValueError: ``progress`` is outside 0 to 1, there is no such schedule, or ``gamma_end`` and
            ``gamma_schedule`` contradict each other.
    """
    if not _is_number(progress) or not 0 <= progress <= 1:
        raise InvalidValue(f"progress must be from 0 to 1, got {progress!r}.")
    moves = gamma_end is not None
    schedule = gamma_schedule or ("linear" if moves else "constant")
    if schedule not in SCHEDULES:
        raise InvalidValue(
            f"gamma_schedule must be one of {', '.join(SCHEDULES)}, got {gamma_schedule!r}."
        )
    if moves and schedule == "constant":
        raise InvalidValue(
            f"gamma_schedule must be linear or cosine with gamma_end, got {gamma_schedule!r} with "
            f"gamma_end={gamma_end!r}: set it to linear, or remove gamma_end."
        )
    if not moves and schedule != "constant":
        raise InvalidValue(
            f"gamma_schedule {gamma_schedule!r} needs gamma_end, got none: set it, or remove "
            "gamma_schedule."
        )
    if gamma_end is None or progress == 0:
        return gamma
    if progress == 1:
        return gamma_end
    left = 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return gamma_end + (gamma - gamma_end) * left


def check_gamma(
    gamma: float, variant: str = "correct", *, allow_reversed: bool = False, name: str = "gamma"
) -> None:
    """Raise ``ValueError`` unless ``variant`` exists and trains the right way with ``gamma``.

    Args:
        name: the name of ``gamma`` in the message.
    """
    if variant not in VARIANTS:
        raise InvalidValue(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}.")
    if not _is_number(gamma) or gamma < 0:
        raise InvalidValue(
            f"{name} must be a finite number of at least 0, got {gamma!r}: the paper uses 0.05."
        )
    if variant == "correct" and gamma >= REVERSAL_GAMMA and not allow_reversed:
        raise InvalidValue(
            f"{name} must be below 1/ln 2 = {REVERSAL_GAMMA:.4f} for variant 'correct', got "
            f"{gamma!r}: from there on, training runs backwards from the first step. The paper "
            "uses 0.05; to train anyway, set allow_reversed=True."
        )
    if variant == "correct_exact" and gamma >= 1 and not allow_reversed:
        raise InvalidValue(
            f"{name} must be below 1 for variant 'correct_exact', got {gamma!r}: from 1 on, the "
            "loss no longer falls as the margin grows. The paper uses 0.05; to train anyway, set "
            "allow_reversed=True."
        )


def check_beta(beta: float) -> None:
    """Raise ``ValueError`` unless ``beta``, the scale of the implicit reward, is above 0."""
    if not _is_number(beta) or beta <= 0:
        raise InvalidValue(
            f"beta must be a finite number above 0, got {beta!r}: the paper uses 0.01."
        )


def check_label_smoothing(label_smoothing: float) -> None:
    """Raise ``ValueError`` unless ``label_smoothing`` is at least 0 and below 0.5."""
    if not _is_number(label_smoothing) or not 0 <= label_smoothing < 0.5:
        raise InvalidValue(
            f"label_smoothing must be at least 0 and below 0.5, got {label_smoothing!r}: it is the "
            "assumed share of flipped labels, and from 0.5 on the labels carry no information."
        )


def check_weights(name: str, *weights: float) -> None:
    """Raise ``ValueError`` unless the weights, of terms that a host adds, are at least 0.

    Some hosts drop a term without a word if its weight is negative or not a number.

    Args:
        name: the host's key for them.
    """
    for weight in weights:
        if not _is_number(weight) or weight < 0:
            raise InvalidValue(
                f"{name} must be a finite number of at least 0, got {weight!r}: it is the weight "
                "of a term of the loss."
            )


class FocalPOLoss(nn.Module):
    """:func:`focalpo_loss` as a module that holds the scalars.

    Args:
        gamma: focusing parameter.
        variant: one of :data:`VARIANTS`.
        beta: the factor that turns the input into the reward margin.  With the default of 1 the
            input is the margin itself; with DPO's beta it is the difference of log-ratios.
        label_smoothing: as in :func:`focalpo_loss`.
        allow_reversed: as in :func:`focalpo_loss`.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> loss = FocalPOLoss(beta=0.1)
        >>> losses = loss(chosen_logratios - rejected_logratios)  # (B,)
    """

    def __init__(
        self,
        gamma: float = 0.05,
        variant: str = "correct",
        *,
        beta: float = 1.0,
        label_smoothing: float = 0.0,
        allow_reversed: bool = False,
    ) -> None:
        super().__init__()
        check_gamma(gamma, variant, allow_reversed=allow_reversed)
        check_beta(beta)
        check_label_smoothing(label_smoothing)
        self.gamma = gamma
        self.variant = variant
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.allow_reversed = allow_reversed

    def forward(self, delta_logratios: Tensor) -> Tensor:
        """Losses of the shape and dtype of ``delta_logratios``, which is usually ``(B,)``."""
        return focalpo_loss(
            self.beta * delta_logratios,
            self.gamma,
            self.variant,
            label_smoothing=self.label_smoothing,
            allow_reversed=self.allow_reversed,
        )

    def extra_repr(self) -> str:
        return (
            f"gamma={self.gamma}, variant={self.variant!r}, beta={self.beta}, "
            f"label_smoothing={self.label_smoothing}"
        )


class _FocalPOFunction(torch.autograd.Function):
    """Loss with its closed-form gradient, so that the margin is the only tensor saved.

    The backward is made of differentiable operations: second derivatives work.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(margins: Tensor, gamma: float, variant: str) -> Tensor:
        losses = _value(_at_least_float32(margins), gamma, variant)
        # torch 2.11 compiles a gradient of 0 where the last operation gives its own input back: a
        # cast that changes nothing, or one in place.
        return losses if losses.dtype == margins.dtype else losses.to(margins.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, str], output: Tensor) -> None:
        margins, ctx.gamma, ctx.variant = inputs
        ctx.save_for_backward(margins)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (grad_losses,) = grad_outputs
        (margins,) = ctx.saved_tensors
        z = _at_least_float32(margins)
        grad = grad_losses.to(z.dtype) * _slope(z, ctx.gamma, ctx.variant)
        return grad.to(margins.dtype), None, None


def _focalpo(margins: Tensor, gamma: float, variant: str) -> Tensor:
    losses: Tensor = _FocalPOFunction.apply(margins, gamma, variant)  # type: ignore[no-untyped-call]
    return losses


def _value(z: Tensor, gamma: float, variant: str) -> Tensor:
    """The loss, in the dtype of ``z``."""
    log_p = F.logsigmoid(z)
    if variant == "correct":
        return (gamma * log_p).exp_() * log_p.neg_()  # in place: fewer tensors take less time
    s = _exponent(gamma, variant)
    log_q = F.logsigmoid(-z)
    # For z >= 0, -log p = (1 - p)(1 + t) log1p(t)/t with t = exp(-z): (1 - p)**s and 1 - p share
    # one exponential.  Separately, each would overflow or vanish (the NaN of the paper's note 2).
    right = torch.exp((s + 1) * log_q) * (1 + _exp_minus_abs(z)) * _log1p_ratio(z)
    return torch.where(z < 0, -torch.exp(s * log_q) * log_p, right)


def _slope(z: Tensor, gamma: float, variant: str) -> Tensor:
    """dL/dz, in the dtype of ``z``: Eq. 6 without the policy's own gradient."""
    if variant == "correct":
        log_p = F.logsigmoid(z)
        scaled = _scaled(log_p, gamma)
        factor = torch.exp(scaled)
        # -(1 - p) p^gamma (1 + gamma log p). Not expm1(log p) for p - 1: compiled for a CPU, it is
        # 0 from a margin of 17 on.
        return -torch.sigmoid(-z) * torch.addcmul(factor, factor, scaled)
    s = _exponent(gamma, variant)
    return -torch.exp((s + 1) * F.logsigmoid(-z)) * (1 + s * _entropy_ratio(z))


def _scaled(log_p: Tensor, gamma: float) -> Tensor:
    """``gamma * log(p)``, kept finite if the product overflows.

    Its exponential is then 0, and 0 times ``-inf`` would be NaN.
    """
    scaled = gamma * log_p
    return scaled.clamp(min=torch.finfo(log_p.dtype).min) if gamma > 1 else scaled


def _entropy_ratio(z: Tensor) -> Tensor:
    """``-p log(p) / (1 - p)``, which is ``log1p(t)/t`` for ``z >= 0`` and ``-t log p`` below, with
    ``t = exp(-|z|)``."""
    return torch.where(z < 0, -_exp_minus_abs(z) * F.logsigmoid(z), _log1p_ratio(z))


def _log1p_ratio(z: Tensor) -> Tensor:
    """``log1p(t)/t`` for ``t = exp(-|z|)``, by its series if ``t`` is below rounding."""
    t = _exp_minus_abs(z)
    tiny = torch.finfo(z.dtype).eps
    return torch.where(t < tiny, 1 - t / 2, torch.log1p(t) / t.clamp(min=tiny))


def _exp_minus_abs(z: Tensor) -> Tensor:
    """``exp(-|z|)``, with the right-hand derivative at 0, where every run starts.

    The derivative of ``abs`` is 0 there, and would make second derivatives wrong.
    """
    return torch.exp(torch.where(z < 0, z, -z))


def _exponent(gamma: float, variant: str) -> float:
    """The ``s`` of the factor ``(1 - p)**s``."""
    return -gamma if variant == "correct_exact" else gamma


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _check_margins(margins: Tensor) -> None:
    if not isinstance(margins, Tensor) or not margins.is_floating_point():
        got = margins.dtype if isinstance(margins, Tensor) else type(margins).__name__
        raise InvalidType(
            f"margins must be a floating-point tensor, got {got}: convert with .float()."
        )


def _is_number(value: Any) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    # Not math.isfinite: torch.compile can't trace it once it has seen two values of gamma.
    return bool(-math.inf < value < math.inf)  # type: ignore[operator]
