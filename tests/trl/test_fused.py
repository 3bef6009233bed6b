"""The fused loss by itself: values and gradients, and the memory that it holds."""

from __future__ import annotations

import inspect
import math
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from focalpo_plugins import focalpo_loss
from focalpo_plugins.compute.fused_loss import (
    IGNORED,
    LOGITS_AT_ONCE,
    fused_logps,
    fused_pairwise_loss,
)

BETA = 0.3
VOCABULARY, SIZE = 300, 16
# One row at a time; groups with a partial last one, in step 1 and in step 3; all at once.
AT_ONCE = (1, 7 * VOCABULARY, 35 * 130, 10**9)


def smoothed(margins: torch.Tensor) -> torch.Tensor:
    return focalpo_loss(margins, 0.5, label_smoothing=0.1)


def case(
    dtype: torch.dtype, bias: bool = False, frozen: bool = False, sequences: int = 6
) -> dict[str, Any]:
    """Hidden states, output layer, and labels with some ignored: prompts, padding, and one whole
    sequence."""
    torch.manual_seed(0)
    labels = torch.randint(0, VOCABULARY, (sequences, 9))
    labels[torch.rand(labels.shape) < 0.4] = IGNORED
    labels[2:3] = IGNORED
    labels[0, 0], labels[0, 1] = 0, VOCABULARY - 1  # the ends of the vocabulary
    offset = torch.randn(VOCABULARY).to(dtype).requires_grad_(not frozen)
    return {
        "hidden": torch.randn(sequences, 9, SIZE).to(dtype).requires_grad_(),
        "weight": (torch.randn(VOCABULARY, SIZE) / 2).to(dtype).requires_grad_(not frozen),
        "labels": labels,
        "ref_logps": torch.randn(sequences) * 3 - 20,
        "bias": offset if bias else None,
    }


def tensors(given: dict[str, Any]) -> list[torch.Tensor]:
    kept = (given[name] for name in ("hidden", "weight", "bias"))
    return [tensor for tensor in kept if tensor is not None and tensor.requires_grad]


def whole(given: dict[str, Any], pairwise: Any = smoothed) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and log-probs from all logits, with softmax in float32 at least."""
    logits = F.linear(given["hidden"], given["weight"], given["bias"])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = given["labels"]
    picked = logits.log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None]).squeeze(-1)
    logps = torch.where(labels == IGNORED, 0.0, picked).sum(1)
    chosen, rejected = (logps - given["ref_logps"].to(logps)).chunk(2)
    return pairwise(BETA * (chosen - rejected)).mean(), logps


def in_float64(given: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().double().requires_grad_(value.requires_grad)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in given.items()
    }


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("label, other", [(0, 1), (1, 0)])
def test_by_hand(label, other):
    """Two words with the weights 1 and -1, a hidden state of one number h: the log-prob of the first
    is -log(1 + e^-2h), its slope in h 2 (1 - p), and with respect to the first weight (1 - p) h.
    Chosen ends in ``label`` at h = 0.5, rejected in the other at h = 0.25, the reference is at 0."""
    hidden = torch.tensor([0.5, 0.25], dtype=torch.float64).reshape(2, 1, 1).requires_grad_()
    weight = torch.tensor([[1.0], [-1.0]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[label], [other]])
    found = fused_pairwise_loss(
        hidden, weight, labels, torch.zeros(2), lambda z: -F.logsigmoid(z), beta=2.0
    )
    found.loss.backward()
    sign = 1 if label == 0 else -1
    p = [1 / (1 + math.exp(-2 * sign * 0.5)), 1 / (1 + math.exp(2 * sign * 0.25))]
    z = 2 * (math.log(p[0]) - math.log(p[1]))
    slope = -2 / (1 + math.exp(z))  # of the loss in chosen's log-prob; rejected's is its opposite
    assert found.loss.item() == pytest.approx(math.log(1 + math.exp(-z)), rel=1e-12)
    assert found.logps.tolist() == pytest.approx([math.log(p[0]), math.log(p[1])], rel=1e-12)
    assert found.mean_logits.tolist() == [0.0, 0.0]
    of_hidden = [slope * sign * 2 * (1 - p[0]), -slope * -sign * 2 * (1 - p[1])]
    assert hidden.grad.flatten().tolist() == pytest.approx(of_hidden, rel=1e-12)
    of_first = slope * sign * (1 - p[0]) * 0.5 - slope * -sign * (1 - p[1]) * 0.25
    assert weight.grad.flatten().tolist() == pytest.approx([of_first, -of_first], rel=1e-12)


@pytest.mark.parametrize("at_once", AT_ONCE)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "dtype, rounding",
    [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 2**-7)],
    ids=str,
)
def test_against_float64(dtype, rounding, bias, frozen, at_once):
    """Loss, log-probs and every gradient, including the incoming gradient."""
    given = case(dtype, bias, frozen)
    exact = in_float64(given)
    truth, logps = whole(exact)
    (truth * 0.37).backward()
    found = fused_pairwise_loss(**given, pairwise=smoothed, beta=BETA, logits_at_once=at_once)
    (found.loss * 0.37).backward()
    assert error(found.loss, truth) < rounding
    assert error(found.logps, logps) < rounding
    assert len(tensors(given)) == (1 if frozen else 3 if bias else 2)
    for ours, theirs in zip(tensors(given), tensors(exact), strict=True):
        assert ours.grad.dtype == dtype
        assert error(ours.grad, theirs.grad) < rounding
    assert torch.count_nonzero(given["hidden"].grad[given["labels"] == IGNORED]) == 0
    ref = fused_logps(
        given["hidden"],
        given["weight"],
        given["labels"],
        bias=given["bias"],
        logits_at_once=at_once,
    )
    assert torch.equal(ref, found.logps)


def test_mean_logits():
    given = case(torch.float64, bias=True)
    logits = F.linear(given["hidden"], given["weight"], given["bias"])
    expected = torch.where(given["labels"] == IGNORED, 0.0, logits.mean(-1)).sum(1)
    found = fused_pairwise_loss(**given, pairwise=smoothed, beta=BETA)
    torch.testing.assert_close(found.mean_logits, expected.detach())


def test_a_part_of_the_head_is_trained():
    """A frozen weight under a trained bias, and hidden states that need no gradient."""
    given = case(torch.float64, bias=True)
    given["weight"].requires_grad_(False)
    given["hidden"].requires_grad_(False)
    exact = in_float64(given)
    whole(exact)[0].backward()
    fused_pairwise_loss(**given, pairwise=smoothed, beta=BETA, logits_at_once=5000).loss.backward()
    torch.testing.assert_close(given["bias"].grad, exact["bias"].grad)
    assert given["weight"].grad is None and given["hidden"].grad is None


def test_tied_embeddings():
    """One parameter at both ends of the network gets the sum of both gradients."""
    given = case(torch.float64)
    ids = torch.randint(0, VOCABULARY, given["labels"].shape)
    grads = []
    for fused in (True, False):
        weight = given["weight"].detach().clone().requires_grad_()
        network = {**given, "weight": weight, "hidden": torch.tanh(weight[ids]).cumsum(1)}
        if fused:
            loss = fused_pairwise_loss(**network, pairwise=smoothed, beta=BETA).loss
        else:
            loss = whole(network)[0]
        loss.backward()
        grads.append(weight.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-13)


def test_evaluation_keeps_nothing():
    given = case(torch.float32)
    trained = fused_pairwise_loss(**given, pairwise=smoothed, beta=BETA)
    with torch.no_grad():
        found = fused_pairwise_loss(**given, pairwise=smoothed, beta=BETA)
    assert torch.equal(found.loss, trained.loss)
    assert found.loss.grad_fn is None and trained.loss.grad_fn is not None


def test_autocast():
    """Products in bfloat16, as in the plain path; the gradients of float32 parameters in
    float32."""
    given, plain = case(torch.float32, bias=True), case(torch.float32, bias=True)
    exact = in_float64(given)
    whole(exact)[0].backward()
    with torch.autocast("cpu", torch.bfloat16):
        found = fused_pairwise_loss(**given, pairwise=smoothed, beta=BETA, logits_at_once=5000)
        expected, logps = whole(plain)
    found.loss.backward()
    expected.backward()
    # Not float32's products: the log-probs have the plain path's rounding, to the last bit or so.
    assert error(found.logps, logps.double()) < 1e-6 < 1e-5 < error(found.logps, whole(exact)[1])
    for ours, theirs, truth in zip(tensors(given), tensors(plain), tensors(exact), strict=True):
        assert ours.grad.dtype == torch.float32
        assert error(ours.grad, truth.grad) < 1.5 * error(theirs.grad, truth.grad) + 1e-3


@pytest.mark.parametrize("frozen", [False, True])
def test_small_slopes_survive_float16(frozen):
    """beta / B = 1e-6 times a softmax below 0.06 vanishes in float16; the loss scaler's factor,
    which comes from outside, must still reach it."""
    given = case(torch.float16, frozen=frozen)
    exact = in_float64(given)
    for one, function in ((exact, None), (given, fused_pairwise_loss)):
        if function is None:
            loss, _ = whole(one, lambda z: 1e-5 * smoothed(z))
        else:
            loss = function(**one, pairwise=lambda z: 1e-5 * smoothed(z), beta=BETA).loss
        (loss * 2**16).backward()
    for ours, theirs in zip(tensors(given), tensors(exact), strict=True):
        assert error(ours.grad, theirs.grad) < 2**-9


def test_a_second_backward_pass_is_stopped():
    """The gradients are scaled in place."""
    given = case(torch.float32)
    loss = fused_pairwise_loss(**given, pairwise=smoothed, beta=BETA).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Held(TorchDispatchMode):
    """The largest number of bytes of all tensors that operations made and that are still held, and
    of the largest of them."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, int] = {}
        self.most = self.largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        old = {storage(tensor) for tensor in tree_leaves((arguments, named)) if is_tensor(tensor)}
        for tensor in filter(is_tensor, tree_leaves(result)):
            if storage(tensor) not in old | self.held.keys():
                size = self.held[storage(tensor)] = tensor.untyped_storage().nbytes()
                weakref.finalize(tensor.untyped_storage(), self.held.pop, storage(tensor))
                self.largest = max(self.largest, size)
        self.most = max(self.most, sum(self.held.values()))
        return result


def is_tensor(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor)


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("sequences", [16, 64])
def test_one_part_of_the_logits_is_held(sequences, frozen, dtype):
    """Forward and backward, no tensor is larger than the allowed logits in float32; allowing twice
    as many increases the peak by one part at most, not by two: 4 bytes a logit, and 2 for the same
    in bfloat16."""
    parts = {}
    for at_once in (20 * VOCABULARY, 40 * VOCABULARY):
        given = case(dtype, frozen=frozen, sequences=sequences)
        assert (given["labels"] != IGNORED).sum() * VOCABULARY > 1.5 * at_once
        with Held() as fused:
            fused_pairwise_loss(
                **given, pairwise=smoothed, beta=BETA, logits_at_once=at_once
            ).loss.backward()
        others = 4 * max(given["hidden"].numel(), given["weight"].numel())
        assert fused.largest <= max(4 * at_once, others)
        parts[at_once] = fused.most
    small, large = parts
    each = 4 if dtype == torch.float32 else 6
    assert parts[large] - parts[small] <= 1.1 * (large - small) * each
    with Held() as plain:  # the measurement sees what it should
        whole(given)[0].backward()
    assert plain.largest == sequences * 9 * VOCABULARY * 4
    assert plain.most > 2 * plain.largest


def test_what_has_no_label_has_no_logits():
    """One label in each of nine sequences: no tensor is as large as the logits of two whole
    sequences, and the weight's gradient is the largest."""
    given = case(torch.float32)
    given["labels"] = torch.full_like(given["labels"], IGNORED)
    given["labels"][:, 4] = 7
    with Held() as fused:
        fused_pairwise_loss(**given, pairwise=smoothed, beta=BETA).loss.backward()
    largest = max(6 * VOCABULARY, VOCABULARY * SIZE) * 4
    assert fused.largest == largest < 9 * 6 * VOCABULARY * 4


def test_how_many_logits_are_held_by_default():
    """2^25 of them, which is 128 MiB in float32, on each of the two ways to them."""
    assert LOGITS_AT_ONCE == 2**25 and LOGITS_AT_ONCE * 4 == 128 * 2**20
    for function in (fused_pairwise_loss, fused_logps):
        assert inspect.signature(function).parameters["logits_at_once"].default == LOGITS_AT_ONCE


@pytest.mark.parametrize(
    "length, ours_was, plain_was", [(512, 0.11, 7.4), (2048, 0.41, 28), (8192, 1.8, 121)]
)
def test_long_sequences_in_bfloat16(length: int, ours_was: float, plain_was: float):
    """Log-probs summed over a sequence of likely tokens, of bf16 states and weights, against float64
    of the same; in nats.

    A logit rounded to bf16 is off by up to 2^-9 of itself, about 0.01 in its spread where it is 5 to
    10, either way: over T tokens that adds up as sqrt(T), and five times that is the bound.
    TRL's plain path on bf16 logits sums in bf16, whose step is 256 at 46,000 nats; half a step is
    what it can be off by.  Both are held to what was measured, which README has: products in
    another order change few roundings.
    """
    from trl.trainer.utils import selective_log_softmax

    torch.manual_seed(0)
    words, size = 2048, 64
    hidden = torch.randn(4, length, size).bfloat16()
    weight = (torch.randn(words, size) * 2 * size**-0.5).bfloat16()
    exact = F.linear(hidden.double(), weight.double()).log_softmax(-1)
    labels = torch.distributions.Categorical(logits=exact).sample()
    truth = exact.gather(-1, labels[..., None]).squeeze(-1).sum(1)
    ours = fused_logps(hidden, weight, labels)
    assert ours.dtype == torch.float32
    plain = selective_log_softmax(F.linear(hidden, weight), labels).sum(1)
    error, of_plain = ((x.double() - truth).abs().max().item() for x in (ours, plain))
    assert error < 5 * 0.01 * length**0.5
    assert error == pytest.approx(ours_was, rel=0.3)
    assert of_plain == pytest.approx(plain_was, rel=0.1)
