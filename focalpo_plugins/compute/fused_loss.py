"""A pairwise loss and its gradients from hidden states, with a part of the logits at a time.

With hidden states ``h`` and the output layer's weight ``W``, the logits of token ``t`` are
``h_t W^T + b``, a row of the vocabulary's size.  DPO needs only one number of each row: the label's
log-softmax.  So the logits are computed a part at a time and thrown away:

1. a group of tokens at a time, whole rows: log-probs and log-sum-exps;
2. the sums ``(2B,)`` give margins, losses, and ``c = dL/dlogp`` for each sequence;
3. a group of vocabulary entries at a time, for all tokens: the logits are computed again and give
   ``G = c (onehot - softmax)``, and ``G`` gives the gradients ``G W`` of ``h`` and ``G^T h`` of
   ``W``.  Each row of the weight's gradient is written once, so it is rounded once.

Step 3 is only for a trained ``W``.  If one group holds all tokens, step 3 continues with the
softmax of step 1.  For a frozen ``W`` (adapters) step 1 also computes the gradient of each
log-prob, before ``c`` is known, and nothing is computed twice.  Everything is computed in the
forward pass, because DeepSpeed's ZeRO-3 has ``W`` in one piece only there.

Tokens without a label (prompts and padding) are left out before the first product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: Logits held at a time: 128 MiB in float32, or 256 tokens of a vocabulary of 128,256.
LOGITS_AT_ONCE = 2**25
#: The label of a token that no log-prob includes.
IGNORED = -100


class FusedLoss(NamedTuple):
    """The result of :func:`fused_pairwise_loss`; only ``loss`` has a gradient.

    Attributes:
        loss: mean loss of the pairs, ``()``.
        logps: log-probs summed over each sequence's labels, in nats, ``(2B,)``.
        mean_logits: each label's mean logit over the vocabulary, summed over each sequence's
            labels, ``(2B,)``.
    """

    loss: Tensor
    logps: Tensor
    mean_logits: Tensor


def fused_pairwise_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_logps: Tensor,
    pairwise: Callable[[Tensor], Tensor],
    *,
    beta: float,
    bias: Tensor | None = None,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> FusedLoss:
    """Mean pairwise loss of the margins ``beta * (logratio_chosen - logratio_rejected)``.

    Softmax and sums are in float32 at least, products in the weight's dtype or autocast's.

    Args:
        hidden: last hidden states ``(2B, S, H)``, the chosen answers first.
        weight: the output layer's ``(V, H)``.
        labels: the token that follows each place, ``(2B, S)``; -100 if it isn't trained on.
        ref_logps: the reference's summed log-probs ``(2B,)``.
        pairwise: per-pair losses ``(B,)`` of margins ``(B,)``.
        beta: DPO's beta.
        bias: the output layer's ``(V,)``.
        logits_at_once: the largest number of logits held at a time, but at least a token's row.
    """
    # Inside the autograd function gradients are off, so it can't tell evaluation from training.
    grad = torch.is_grad_enabled()
    run: Callable[..., tuple[Tensor, Tensor, Tensor]] = _Fused.apply
    return FusedLoss(
        *run(hidden, weight, bias, labels, ref_logps, pairwise, beta, logits_at_once, grad)
    )


@torch.no_grad()
def fused_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> Tensor:
    """Log-probs summed over each sequence's labels ``(2B,)``, without gradients.

    The arguments are as in :func:`fused_pairwise_loss`.
    """
    dtype = _dtype(weight)
    with torch.autocast(hidden.device.type, enabled=False):
        part = _Part(hidden, labels, dtype)
        tokens = _token_logps(part, weight.to(dtype), _cast(bias, dtype), logits_at_once)
        return part.by_sequence(tokens.logps)


class _Part:
    """The hidden states that have a label, ``(N, H)``, and their places among all states."""

    def __init__(self, hidden: Tensor, labels: Tensor, dtype: torch.dtype) -> None:
        self.shape = hidden.shape
        self.places = (labels != IGNORED).nonzero(as_tuple=True)
        self.labels = labels[self.places]
        self.states = hidden[self.places].to(dtype)

    def by_sequence(self, values: Tensor) -> Tensor:
        """Sums of ``values`` ``(N,)`` over each sequence ``(2B,)``, always in the same order."""
        return self.back(values).sum(1)

    def back(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """``values`` ``(N, ...)`` at their places in a tensor of zeros ``(2B, S, ...)``."""
        whole = values.new_zeros(*self.shape[:2], *values.shape[1:], dtype=dtype or values.dtype)
        whole[self.places] = values.to(whole.dtype)
        return whole


class _TokenLogps(NamedTuple):
    logps: Tensor  # (N,)
    logsumexps: Tensor  # (N,)
    gradients: Tensor | None = None  # of each log-prob with respect to its hidden state, (N, H)
    softmax: Tensor | None = None  # (N, V)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        ref_logps: Tensor,
        pairwise: Callable[[Tensor], Tensor],
        beta: float,
        logits_at_once: int,
        grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = _dtype(weight)
        of_hidden, of_weight, of_bias = (grad and wanted for wanted in ctx.needs_input_grad[:3])
        of_head = of_weight or of_bias
        with torch.autocast(hidden.device.type, enabled=False):
            part = _Part(hidden, labels, dtype)
            w, b = weight.to(dtype), _cast(bias, dtype)
            tokens = _token_logps(part, w, b, logits_at_once, of_hidden and not of_head, of_head)
            logps = part.by_sequence(tokens.logps)

            with torch.set_grad_enabled(grad):
                leaf = logps.detach().requires_grad_(grad)
                chosen, rejected = (leaf - ref_logps.to(leaf)).chunk(2)
                loss = pairwise(beta * (chosen - rejected)).mean()
            if of_hidden or of_head:
                (slopes,) = torch.autograd.grad(loss, leaf)
                # The largest slope is multiplied in last, together with the incoming gradient:
                # beta / B is so small that gradients in float16 would lose it.
                scale = slopes.abs().max().clamp_min(torch.finfo(slopes.dtype).tiny)
                slopes = (slopes / scale)[part.places[0]]
                if of_head:
                    gradients = _gradients(
                        part, weight, bias, dtype, tokens, slopes,
                        (of_hidden, of_weight, of_bias), logits_at_once,
                    )  # fmt: skip
                else:
                    assert tokens.gradients is not None
                    gradients = (tokens.gradients.mul_(slopes[:, None]), None, None)
                states, *others = gradients
                if states is not None:
                    states = part.back(states, hidden.dtype)
                ctx.save_for_backward(scale, states, *others)

            rows = torch.mv(part.states, w.mean(0, dtype=logps.dtype).to(dtype)).to(logps.dtype)
            if b is not None:
                rows += b.mean(dtype=logps.dtype)
            mean_logits = part.by_sequence(rows)
        ctx.mark_non_differentiable(logps, mean_logits)
        return loss.detach(), logps, mean_logits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outside: Tensor) -> Any:
        scale, *gradients = ctx.saved_tensors
        scale = scale * outside[0]
        # In place is safe: autograd stops a second backward pass over the same graph.
        return (*(g if g is None else g.mul_(scale) for g in gradients), *[None] * 6)


def _token_logps(
    part: _Part,
    weight: Tensor,
    bias: Tensor | None,
    logits_at_once: int,
    gradients: bool = False,
    keep: bool = False,
) -> _TokenLogps:
    """The labels' log-probs; with ``gradients`` also the gradients of the hidden states.

    With ``keep`` the softmax is returned too, if one group holds all tokens.
    """
    count, wide = len(part.labels), _wide(weight.dtype)
    logps = torch.empty(count, dtype=wide, device=weight.device)
    sums = torch.empty_like(logps)
    of_states = torch.empty_like(part.states) if gradients else None
    kept = None
    for rows in _groups(count, logits_at_once // len(weight)):
        logits = F.linear(part.states[rows], weight, bias).to(wide)
        labels = part.labels[rows, None]
        top = logits.amax(-1, keepdim=True)
        logits.sub_(top)
        picked = logits.gather(-1, labels)
        total = logits.exp_().sum(-1, keepdim=True)
        logs = total.log()
        logps[rows] = (picked - logs).squeeze(-1)
        sums[rows] = (top + logs).squeeze(-1)
        if of_states is not None:
            _subtract_onehot(logits.div_(total), labels.squeeze(-1))
            torch.mm(logits.neg_().to(weight.dtype), weight, out=of_states[rows])
        elif keep and len(labels) == count:
            kept = logits.div_(total)
        del logits  # before the next ones are computed
    return _TokenLogps(logps, sums, of_states, kept)


def _gradients(
    part: _Part,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    tokens: _TokenLogps,
    slopes: Tensor,
    wanted: tuple[bool, bool, bool],
    logits_at_once: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of states, weight and bias from the log-probs' gradients, ``slopes`` ``(N,)``."""
    states, wide = part.states, tokens.logps.dtype
    of_states = torch.zeros_like(states, dtype=wide) if wanted[0] else None
    of_weight = torch.empty_like(weight) if wanted[1] else None
    of_bias = torch.empty_like(bias) if wanted[2] and bias is not None else None
    at_once = len(weight) if tokens.softmax is not None else logits_at_once // max(1, len(states))
    for entries in _groups(len(weight), at_once):
        w = weight[entries].to(dtype)
        if tokens.softmax is not None:
            softmax = tokens.softmax
        else:
            b = None if bias is None else bias[entries].to(dtype)
            logits = F.linear(states, w, b).to(wide)
            softmax = logits.sub_(tokens.logsumexps[:, None]).exp_()
            del logits
        _subtract_onehot(softmax, part.labels - entries.start)
        of_logits = softmax.mul_(-slopes[:, None])
        if of_bias is not None:
            of_bias[entries] = of_logits.sum(0).to(of_bias.dtype)
        narrow = of_logits.to(dtype)
        del softmax, of_logits
        if of_weight is not None:
            if of_weight.dtype == dtype:
                torch.mm(narrow.t(), states, out=of_weight[entries])
            else:  # autocast
                of_weight[entries] = torch.mm(narrow.t(), states)
        if of_states is not None:
            if wide == dtype:
                of_states.addmm_(narrow, w)
            else:
                of_states += torch.mm(narrow, w)
        del narrow
    return of_states, of_weight, of_bias


def _subtract_onehot(rows: Tensor, labels: Tensor) -> None:
    """Subtract 1 from each row ``(N, v)`` at its label, if the label is within the row."""
    inside = (labels >= 0) & (labels < rows.shape[1])
    each = torch.arange(len(rows), device=rows.device)
    at = (each, labels.clamp(0, rows.shape[1] - 1))
    rows[at] = rows[at] - inside.to(rows.dtype)


def _groups(count: int, most: int) -> list[slice]:
    """Slices that split ``count`` items into groups of at most ``most``, and at least one."""
    size = max(1, min(most, count))
    if 128 < size < count:
        size -= size % 128  # matrix products of such sizes are faster on a GPU
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which the model's own output layer would compute."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)
