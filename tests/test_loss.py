"""The maths: hand-derived values, a high-precision reference, and torch's transforms."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from focalpo_plugins import (
    VARIANTS,
    FocalPOLoss,
    focalpo_loss,
    focalpo_weight,
    gamma_at,
    reversal_margin,
)
from focalpo_plugins.loss import REVERSAL_GAMMA

LN2 = math.log(2)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Gammas that each variant accepts: the paper's, a middling one, and one near the edge.
GAMMAS = {
    "correct": (0.05, 0.5, 1.4),
    "correct_exact": (0.05, 0.5, 0.999),
    "incorrect": (0.05, 1, 5),
}
CASES = [(variant, gamma) for variant in VARIANTS for gamma in GAMMAS[variant]]
MARGINS = [0.0, 1e-3, 0.5, 2.24, 5.0, 20.0, 88.0, 104.0, 710.0, 1e4]
MARGINS = sorted({*MARGINS, *(-z for z in MARGINS)})


mpmath.mp.dps = 50


def log_sigmoid(z: mpmath.mpf) -> mpmath.mpf:
    return -mpmath.log1p(mpmath.exp(-z)) if z >= 0 else z - mpmath.log1p(mpmath.exp(z))


def reference(z: float, gamma: float, variant: str) -> tuple[mpmath.mpf, mpmath.mpf]:
    """Value and derivative straight from Eq. 3 and 4, in 50 digits and with unbounded exponents."""
    z, gamma = mpmath.mpf(z), mpmath.mpf(gamma)
    log_p = log_sigmoid(z)
    p, q = mpmath.exp(log_p), mpmath.exp(log_sigmoid(-z))
    if variant == "correct":
        return -(p**gamma) * log_p, -q * p**gamma * (1 + gamma * log_p)
    s = -gamma if variant == "correct_exact" else gamma
    return -(q**s) * log_p, -(q**s) * (q - s * p * log_p)


def value_and_grad(
    z: torch.Tensor, gamma: float, variant: str
) -> tuple[torch.Tensor, torch.Tensor]:
    z = z.detach().clone().requires_grad_()
    losses = focalpo_loss(z, gamma, variant)
    (grad,) = torch.autograd.grad(losses.sum(), z)
    return losses.detach(), grad


def rounding(z: float, gamma: float, expected: float, dtype: torch.dtype) -> float:
    """The error that rounding alone explains in ``dtype``.

    Exponentiating ``x`` multiplies the relative error of ``x`` by ``|x|``, and the exponents here
    are up to ``(1 + gamma) (|z| + ln 2)``, since ``-log p`` is ln 2 at 0.  The arithmetic is in
    float32 at least; the result is rounded once to ``dtype``, whose smallest subnormal bounds what
    it can tell from 0.
    """
    arithmetic = min(torch.finfo(torch.float32).eps, torch.finfo(dtype).eps)
    condition = 4 * (1 + (1 + gamma) * (abs(z) + LN2)) * arithmetic + torch.finfo(dtype).eps
    # A denormal may be flushed to 0, which loses at most the smallest normal number.
    tiny = min(torch.finfo(torch.float32).tiny, torch.finfo(dtype).tiny)
    return (
        condition * abs(expected)
        + tiny
        + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    )


def test_values_by_hand():
    """At z = 0, p = 1/2: the factor is 2^-gamma (correct, incorrect) or 2^gamma (exact), times ln 2.

    At z = ln 3, p = 3/4, so with gamma 1: correct 3/4 ln(4/3), incorrect 1/4 ln(4/3); with gamma
    1/2, exact (1/4)^-1/2 ln(4/3) = 2 ln(4/3).
    """
    zero = torch.zeros(1, dtype=torch.float64)
    log3 = torch.tensor([math.log(3)], dtype=torch.float64)
    log43 = math.log(4 / 3)
    assert focalpo_loss(zero).item() == pytest.approx(2**-0.05 * LN2, rel=1e-15)
    assert focalpo_loss(zero).item() == pytest.approx(0.6695, abs=5e-5)
    assert focalpo_loss(zero, 0.05, "correct_exact").item() == pytest.approx(
        2**0.05 * LN2, rel=1e-15
    )
    assert focalpo_loss(zero, 1, "incorrect").item() == pytest.approx(LN2 / 2, rel=1e-15)
    assert focalpo_loss(log3, 1).item() == pytest.approx(0.75 * log43, rel=1e-14)
    assert focalpo_loss(log3, 1, "incorrect").item() == pytest.approx(0.25 * log43, rel=1e-14)
    assert focalpo_loss(log3, 0.5, "correct_exact").item() == pytest.approx(2 * log43, rel=1e-14)


def test_gradients_by_hand():
    """At z = 0 Eq. 6's bracket is 1/2 * 2^-gamma * (1 - gamma ln 2), and the loss falls along it.

    At gamma 0.05: -0.5 * 0.96594 * 0.96534 = -0.46623.  At z = ln 3 with gamma 1:
    -(1/4)(3/4)(1 + ln(3/4)) = -0.13356.
    """
    z = torch.tensor([0.0, math.log(3)], dtype=torch.float64)
    assert value_and_grad(z, 0.05, "correct")[1][0].item() == pytest.approx(-0.46623, abs=1e-5)
    assert value_and_grad(z, 1, "correct")[1][1].item() == pytest.approx(-0.13356, abs=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant, gamma", CASES)
def test_every_finite_margin(variant: str, gamma: float, dtype: torch.dtype):
    z = torch.tensor(MARGINS, dtype=dtype)
    losses, grads = value_and_grad(z, gamma, variant)
    assert losses.dtype == grads.dtype == dtype
    assert losses.shape == z.shape
    for margin, loss, grad in zip(z.tolist(), losses.tolist(), grads.tolist(), strict=True):
        expected_loss, expected_grad = (float(x) for x in reference(margin, gamma, variant))
        assert loss == pytest.approx(
            expected_loss, abs=rounding(margin, gamma, expected_loss, dtype)
        ), margin
        # Near z* the gradient is a difference of near equals: its rounding is that of its terms.
        scale = max(abs(expected_grad), gamma_term(margin, gamma, variant))
        assert grad == pytest.approx(expected_grad, abs=rounding(margin, gamma, scale, dtype)), (
            margin
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant, gamma", CASES)
def test_the_largest_margins(variant: str, gamma: float, dtype: torch.dtype):
    """Whatever the sign, nothing overflows: the loss is 0, or ``-z`` with the gradient -1 where
    ``incorrect`` and ``correct_exact`` leave DPO's loss as it is."""
    largest = torch.finfo(dtype).max
    z = torch.tensor([-largest, -largest / 2, largest / 2, largest], dtype=dtype)
    losses, grads = value_and_grad(z, gamma, variant)
    wrong = z < 0 if variant != "correct" else torch.zeros_like(z, dtype=torch.bool)
    near = {"rtol": 0, "atol": torch.finfo(torch.float16).tiny}
    if dtype == torch.float16:  # exp(-0.001 * 65504) is no 0, nor is 65504 * exp(-0.05 * 65504)
        assert losses.isfinite().all() and grads.isfinite().all()
        return
    torch.testing.assert_close(losses, torch.where(wrong, -z, 0), **near)
    torch.testing.assert_close(grads, torch.where(wrong, -torch.ones_like(z), 0), **near)
    if variant == "correct":
        expected = torch.where(z < 0, 0, torch.ones_like(z))
        torch.testing.assert_close(focalpo_weight(z, gamma, variant), expected, **near)


def gamma_term(z: float, gamma: float, variant: str) -> float:
    """The larger of the two terms that the gradient is the difference of."""
    log_p, log_q = log_sigmoid(mpmath.mpf(z)), log_sigmoid(mpmath.mpf(-z))
    if variant == "correct":
        return float(mpmath.exp(log_q + gamma * log_p))
    s = -gamma if variant == "correct_exact" else gamma
    return float(mpmath.exp((s + 1) * log_q))


@settings(deadline=None, max_examples=300)
@given(
    z=st.floats(-1e4, 1e4),
    case=st.one_of(
        st.tuples(st.just("correct"), st.floats(0, 1.44)),
        st.tuples(st.just("correct_exact"), st.floats(0, 0.999)),
        st.tuples(st.just("incorrect"), st.floats(0, 10)),
    ),
    dtype=st.sampled_from(DTYPES),
)
def test_any_margin_gamma_dtype(z: float, case: tuple[str, float], dtype: torch.dtype):
    variant, gamma = case
    margin = torch.tensor([z], dtype=dtype)
    loss, grad = (x.item() for x in value_and_grad(margin, gamma, variant))
    z = margin.item()
    expected_loss, expected_grad = (float(x) for x in reference(z, gamma, variant))
    # gamma = 0 is the host's own -logsigmoid, whose backward rounds once more in the dtype.
    extra = 2 if gamma == 0 else 1
    assert loss == pytest.approx(expected_loss, abs=rounding(z, gamma, expected_loss, dtype))
    scale = max(abs(expected_grad), gamma_term(z, gamma, variant))
    assert grad == pytest.approx(expected_grad, abs=extra * rounding(z, gamma, scale, dtype))


def reference_at_once(
    z: np.ndarray, gamma: float, variant: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """:func:`reference` of all margins in numpy's extended precision, 64 bits of mantissa and
    exponents up to 16,384, and :func:`gamma_term` of each."""
    zero = np.longdouble(0)
    tail = np.log1p(np.exp(-np.abs(z)))
    log_p, log_q = np.minimum(z, zero) - tail, np.minimum(-z, zero) - tail
    p, q, gamma = np.exp(log_p), np.exp(log_q), np.longdouble(gamma)
    if variant == "correct":
        factor = np.exp(gamma * log_p)
        return -factor * log_p, -q * factor * (1 + gamma * log_p), q * factor
    s = -gamma if variant == "correct_exact" else gamma
    factor = np.exp(s * log_q)
    # Its own exponential: q * factor would be 0 times infinity far out.
    outer = np.exp((s + 1) * log_q)
    return -factor * log_p, -(outer - s * factor * p * log_p), outer


@pytest.mark.skipif(
    np.finfo(np.longdouble).nmant < 63, reason="numpy has no extended precision on this machine"
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant, gamma", CASES)
def test_a_million_random_margins(variant: str, gamma: float, dtype: torch.dtype):
    """Half as runs have them, normal with a spread of 10; half of every magnitude from 1e-8 to 1e4.

    The reference is itself held to 50 digits at some of them.
    """
    draw = torch.Generator().manual_seed(20250106)
    half = 500_000
    sign = torch.randint(0, 2, (half,), generator=draw) * 2 - 1
    every = sign * 10 ** (torch.rand(half, generator=draw, dtype=torch.float64) * 12 - 8)
    usual = torch.randn(half, generator=draw, dtype=torch.float64) * 10
    z = torch.cat([usual, every]).to(dtype)
    losses, grads = (x.double().numpy() for x in value_and_grad(z, gamma, variant))
    margins = z.double().numpy()
    true_losses, true_grads, terms = reference_at_once(
        margins.astype(np.longdouble), gamma, variant
    )
    for i in range(0, len(margins), 20_011):
        margin = float(margins[i])
        exact = reference(margin, gamma, variant)
        error = mpmath.mpf(2e-18) * (20 + (1 + gamma) * abs(margin))
        for true, digits in zip(exact, (true_losses[i], true_grads[i]), strict=True):
            bound = error * max(abs(true), gamma_term(margin, gamma, variant))
            assert abs(in_full(digits) - true) <= bound + mpmath.mpf(10) ** -4900
    assert np.isfinite(losses).all() and np.isfinite(grads).all()
    for found, true, scale in (
        (losses, true_losses, np.abs(true_losses)),
        (grads, true_grads, np.maximum(np.abs(true_grads), terms)),
    ):
        excess = np.abs(found - true) - rounding(margins, gamma, scale, dtype)
        worst = excess.argmax()
        assert excess[worst] <= 0, (margins[worst], found[worst], true[worst])


def in_full(x: np.longdouble) -> mpmath.mpf:
    """``x`` with all its digits, not through float64."""
    return mpmath.mpf(np.format_float_scientific(x, precision=25, unique=False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gamma_zero_is_dpo_to_the_last_bit(variant: str, dtype: torch.dtype):
    z = torch.cat([torch.tensor(MARGINS), torch.randn(1000) * 10]).to(dtype)
    dpo = z.clone().requires_grad_()
    (-F.logsigmoid(dpo)).sum().backward()
    losses, grads = value_and_grad(z, 0, variant)
    assert torch.equal(losses, -F.logsigmoid(z))
    assert torch.equal(grads, dpo.grad)


@pytest.mark.parametrize("variant, gamma", CASES)
def test_gradcheck(variant: str, gamma: float):
    """First and second derivatives, z = 0 among the points: every run starts there."""
    z = torch.tensor([-30, -3, -0.5, 0, 0.5, 3, 30], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: focalpo_loss(x, gamma, variant), z)
    assert torch.autograd.gradgradcheck(lambda x: focalpo_loss(x, gamma, variant), z)


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_mode_is_refused(variant: str):
    """By torch, and not answered with a wrong derivative; at gamma 0 the loss is torch's own."""
    z, along = torch.zeros(2), torch.ones(2)
    with pytest.raises(NotImplementedError, match="forward mode AD"):
        torch.func.jvp(lambda x: focalpo_loss(x, 0.5, variant), (z,), (along,))
    _, slope = torch.func.jvp(lambda x: focalpo_loss(x, 0, variant), (z,), (along,))
    assert slope.tolist() == [-0.5, -0.5]


@pytest.mark.parametrize("gamma", (0.05, 0.5, 1.0, 1.4))
def test_gradient_is_equation_6(gamma: float):
    """Eq. 6 without its outer -beta and policy gradient, where sigma(r_l - r_w) = 1 - p:

    (1 - p) p^gamma + log(p) gamma p^gamma (1 - p).
    """
    z = torch.linspace(-15, 15, 301, dtype=torch.float64)
    p, q = torch.sigmoid(z), torch.sigmoid(-z)
    equation_6 = q * p**gamma + torch.log(p) * gamma * p**gamma * q
    torch.testing.assert_close(
        value_and_grad(z, gamma, "correct")[1], -equation_6, rtol=1e-12, atol=1e-15
    )


@pytest.mark.parametrize("variant, gamma", [*CASES, *((variant, 0) for variant in VARIANTS)])
def test_weight_times_dpo_gradient_is_the_gradient(variant: str, gamma: float):
    z = torch.linspace(-15, 15, 301, dtype=torch.float64)
    expected = -torch.sigmoid(-z) * focalpo_weight(z, gamma, variant)
    torch.testing.assert_close(
        value_and_grad(z, gamma, variant)[1], expected, rtol=1e-12, atol=1e-15
    )


@pytest.mark.parametrize("gamma", (0.0, 0.05, 0.3, 0.7, 1.0))
def test_lemma_1(gamma: float):
    """Eq. 7 in its per-pair form, p^gamma <= gamma p + 1 - gamma (Eq. 8), times -log p."""
    z = torch.linspace(-50, 50, 2001, dtype=torch.float64)
    dpo = -F.logsigmoid(z)
    bound = gamma * torch.sigmoid(z) * dpo + (1 - gamma) * dpo
    assert (focalpo_loss(z, gamma) <= bound + 1e-12 * dpo).all()


@pytest.mark.parametrize(
    "gamma, expected",
    # logit(exp(-1/gamma)): exp(-20) is so small that its logit is its log; exp(-1)/(1 - exp(-1))
    # = 0.58198, whose log is -0.54132; exp(-2)/(1 - exp(-2)) = 0.156518, whose log is -1.85459.
    [(0.05, -20.0), (1.0, -0.54132), (0.5, -1.85459)],
)
def test_sign_change_at_z_star(gamma: float, expected: float):
    z_star = reversal_margin(gamma)
    assert z_star == pytest.approx(expected, abs=1e-5)
    around = torch.tensor([z_star - 1e-3, z_star + 1e-3], dtype=torch.float64)
    below, above = value_and_grad(around, gamma, "correct")[1].tolist()
    assert below > 0 > above
    assert focalpo_weight(around, gamma).sign().tolist() == [-1, 1]


def test_no_reversal_elsewhere():
    assert reversal_margin(0) == -math.inf
    assert reversal_margin(0.05, "correct_exact") == reversal_margin(1, "incorrect") == -math.inf
    assert reversal_margin(1e-5) == pytest.approx(-1e5)
    assert reversal_margin(REVERSAL_GAMMA) == pytest.approx(0, abs=1e-12)


def test_gradient_peaks_left_of_zero():
    """At gamma 0.05 the bell of Fig. 3 has its top at z = -2.24."""
    z = torch.linspace(-6, 6, 12001, dtype=torch.float64)
    slope = value_and_grad(z, 0.05, "correct")[1].abs()
    assert z[slope.argmax()].item() == pytest.approx(-2.24, abs=0.01)


@pytest.mark.parametrize("variant", VARIANTS)
def test_label_smoothing(variant: str):
    """(1 - e) L(z) + e L(-z), the factor in each term."""
    z = torch.linspace(-5, 5, 11, dtype=torch.float64)
    smoothed = focalpo_loss(z, 0.3, variant, label_smoothing=0.1)
    expected = 0.9 * focalpo_loss(z, 0.3, variant) + 0.1 * focalpo_loss(-z, 0.3, variant)
    torch.testing.assert_close(smoothed, expected, rtol=0, atol=0)


@pytest.mark.parametrize("variant, gamma", CASES)
def test_torch_transforms(variant: str, gamma: float):
    z = torch.linspace(-9, 9, 13, dtype=torch.float64)
    losses, grads = value_and_grad(z, gamma, variant)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return focalpo_loss(x, gamma, variant)

    torch.testing.assert_close(torch.func.vmap(loss)(z), losses)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(z), grads)
    torch.testing.assert_close(torch.func.grad(lambda x: loss(x).sum())(z), grads)
    meta = loss(torch.empty(4, 3, dtype=torch.bfloat16, device="meta"))
    assert (meta.shape, meta.dtype) == ((4, 3), torch.bfloat16)


@pytest.mark.xdist_group("compiled")  # to start the compiler takes longer than to use it
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("gamma", (0, 0.05))
def test_compiles_whole(variant: str, gamma: float):
    compiled = torch.compile(lambda x: focalpo_loss(x, gamma, variant), fullgraph=True)
    z = torch.linspace(-30, 30, 14, dtype=torch.float64)  # not z* = -20, where terms cancel
    x = z.clone().requires_grad_()
    losses = compiled(x)
    losses.sum().backward()
    expected_losses, expected_grads = value_and_grad(z, gamma, variant)
    for found, expected in ((losses.detach(), expected_losses), (x.grad, expected_grads)):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.xdist_group("compiled")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_compiled_loss_ends_in_a_new_tensor(variant: str, dtype: torch.dtype):
    """torch 2.11 gives a gradient of 0 where the last operation is in place or casts nothing."""
    forwards: list[torch.fx.Graph] = []

    def kept(graph: torch.fx.GraphModule, inputs: object) -> object:
        forwards.extend(part.graph for name, part in graph.named_modules() if "fwd_body" in name)
        return graph.forward

    compiled = torch.compile(lambda z: focalpo_loss(z, 0.05, variant), fullgraph=True, backend=kept)
    compiled(torch.zeros(3, dtype=dtype, requires_grad=True))
    (forward,) = forwards
    (result,) = forward.find_nodes(op="output")
    last = result.args[0]
    while isinstance(last, tuple):
        last = last[0]
    name = getattr(last.target, "__name__", last.target)
    assert not name.endswith("_") and (name != "to" or dtype == torch.bfloat16), last.format_node()


@pytest.mark.parametrize("variant, gamma", CASES)
def test_autocast_does_not_lower_the_arithmetic(variant: str, gamma: float):
    z = torch.linspace(-9, 9, 13)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, grads = value_and_grad(z, gamma, variant)
    expected_losses, expected_grads = value_and_grad(z, gamma, variant)
    assert torch.equal(losses, expected_losses)
    assert torch.equal(grads, expected_grads)


def test_saves_one_tensor():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(x.shape) or x, lambda x: x
    ):
        focalpo_loss(torch.zeros(7, requires_grad=True)).sum()
    assert saved == [(7,)]


def test_module_holds_the_scalars():
    delta = torch.tensor([[1.0, -2.0], [0.0, 30.0]], dtype=torch.float64)
    module = FocalPOLoss(0.3, "incorrect", beta=0.1, label_smoothing=0.2)
    expected = focalpo_loss(0.1 * delta, 0.3, "incorrect", label_smoothing=0.2)
    assert torch.equal(module(delta), expected)
    assert repr(module) == (
        "FocalPOLoss(gamma=0.3, variant='incorrect', beta=0.1, label_smoothing=0.2)"
    )
    assert torch.equal(FocalPOLoss()(delta), focalpo_loss(delta))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"gamma": -0.1}, "gamma must be a finite number of at least 0, got -0.1"),
        ({"gamma": math.nan}, "gamma must be a finite number of at least 0, got nan"),
        ({"gamma": math.inf}, "gamma must be a finite number of at least 0, got inf"),
        ({"gamma": "0.05"}, "gamma must be a finite number of at least 0, got '0.05'"),
        ({"gamma": True}, "gamma must be a finite number of at least 0, got True"),
        (
            {"gamma": REVERSAL_GAMMA},
            "gamma must be below 1/ln 2 = 1.4427 for variant 'correct', got 1.44",
        ),
        (
            {"gamma": 1, "variant": "correct_exact"},
            "gamma must be below 1 for variant 'correct_exact', got 1",
        ),
        (
            {"variant": "corect"},
            "variant must be one of correct, correct_exact, incorrect, got 'corect'",
        ),
        ({"label_smoothing": 0.5}, "label_smoothing must be at least 0 and below 0.5, got 0.5"),
        ({"label_smoothing": -0.1}, "label_smoothing must be at least 0 and below 0.5, got -0.1"),
    ],
)
def test_refusals(arguments: dict, message: str):
    for build in (
        lambda: focalpo_loss(torch.zeros(1), **arguments),
        lambda: FocalPOLoss(**arguments),
    ):
        with pytest.raises(ValueError) as error:
            build()
        assert str(error.value).startswith(message)


@pytest.mark.parametrize("beta", (0, -0.1, math.nan, math.inf, "0.1"))
def test_refuses_beta(beta: object):
    with pytest.raises(ValueError, match="^beta must be a finite number above 0, got"):
        FocalPOLoss(beta=beta)


@pytest.mark.parametrize("margins", (torch.zeros(2, dtype=torch.long), [0.0]))
def test_refuses_margins_that_are_no_float_tensor(margins: object):
    with pytest.raises(TypeError, match="^margins must be a floating-point tensor, got"):
        focalpo_loss(margins)


@pytest.mark.parametrize("gamma, variant", [(1.5, "correct"), (1.2, "correct_exact")])
def test_override(gamma: float, variant: str):
    """Past the bound the gradient is what the formula says: upwards at margin 0 for correct, and
    for correct_exact upwards at a large margin."""
    z = torch.tensor(
        [0.0 if variant == "correct" else 5.0], dtype=torch.float64, requires_grad=True
    )
    focalpo_loss(z, gamma, variant, allow_reversed=True).sum().backward()
    assert z.grad.item() == pytest.approx(float(reference(z.item(), gamma, variant)[1]), rel=1e-12)
    assert z.grad.item() > 0


@pytest.mark.parametrize(
    "progress, schedule, expected",
    [
        (0.0, "linear", 0.25),
        (0.25, "linear", 0.2),  # .05 + .2 * .75
        (0.5, None, 0.15),
        (1.0, "linear", 0.05),
        (0.0, "cosine", 0.25),
        (1 / 3, "cosine", 0.2),  # .05 + .2 * (1 + 1/2) / 2
        (0.5, "cosine", 0.15),
        (1.0, "cosine", 0.05),
    ],
)
def test_gamma_at_a_point_of_a_run(progress: float, schedule: str | None, expected: float):
    assert gamma_at(progress, 0.25, 0.05, schedule) == pytest.approx(expected, abs=1e-15)


def test_gamma_at_both_ends_is_what_was_given():
    """Not an expression of it: a gamma of 0 has to be DPO to the last bit."""
    for start, end in ((0.3, 0.0), (0.0, 0.3), (0.1, 0.7)):
        for schedule in ("linear", "cosine"):
            assert gamma_at(0.0, start, end, schedule) == start
            assert gamma_at(1.0, start, end, schedule) == end
    assert gamma_at(0.4, 0.3) == gamma_at(0.4, 0.3, None, "constant") == 0.3


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((1.1, 0.1), "progress must be from 0 to 1, got 1.1"),
        (
            (0.5, 0.1, 0.2, "step"),
            "gamma_schedule must be one of constant, linear, cosine, got 'st",
        ),
        (
            (0.5, 0.1, 0.2, "constant"),
            "gamma_schedule must be linear or cosine with gamma_end, got",
        ),
        (
            (0.5, 0.1, None, "linear"),
            "gamma_schedule 'linear' needs gamma_end, got none",
        ),
    ],
)
def test_a_schedule_that_contradicts_itself(arguments: tuple, message: str):
    with pytest.raises(ValueError, match=f"^{message}"):
        gamma_at(*arguments)
