"""A pairwise loss and its gradients from hidden states, without the logits of more than a part.

With hidden states ``h`` and the output layer's weight ``W``, the logits of token ``t`` are
``h_t W^T + b``, a row of the vocabulary's size, and all that DPO needs of them is one number: the
label's log-softmax.  So they are computed a part at a time and thrown away:

1. a group of tokens at a time, whole rows: log-probs and log-sum-exps;
2. the sums ``(2B,)`` give margins, losses, and ``c = dL/dlogp`` for each sequence;
3. a group of vocabulary entries at a time, for all tokens, ``G = c (onehot - softmax)`` from
   logits computed once more, and from it the gradients ``G W`` of ``h`` and ``G^T h`` of ``W``.
   Each row of the weight's gradient is written once, so it is rounded once.

Step 3 is only for a trained ``W``; where one group holds all tokens it goes on with the logits of
step 1.  For a frozen ``W`` (adapters) step 1 takes the gradient of each log-prob as well, before
``c`` is known, and nothing is computed twice.  Everything happens in the forward pass, because that
is when DeepSpeed's ZeRO-3 has ``W`` in one piece.

Tokens without a label, those of prompts and padding, are left out before the first product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: Logits held at a time: 128 MiB in float32, or 256 tokens of a vocabulary of 128,256.
LOGITS_AT_ONCE = 2**25
#: The label of a token that is in no log-prob.
IGNORED = -100


class FusedLoss(NamedTuple):
    """What :func:`fused_pairwise_loss` gives; only ``loss`` has a gradient.

    Attributes:
        loss: mean loss of the pairs, ``()``.
        logps: log-probs summed over each sequence's labels, in nats, ``(2B,)``.
        mean_logits: for each sequence the sum over its labels of the mean logit, ``(2B,)``.
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
        labels: the token that follows each, ``(2B, S)``; -100 where it isn't trained on.
        ref_logps: the reference's summed log-probs ``(2B,)``.
        pairwise: per-pair losses ``(B,)`` of margins ``(B,)``.
        beta: DPO's beta.
        bias: the output layer's ``(V,)``.
        logits_at_once: the most logits that are held at a time; a token's row at least is.
    """
    # Inside the function gradients are off, and it could not tell an evaluation from training.
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
    """Log-probs summed over each sequence's labels ``(2B,)``, without gradients; the arguments are
    those of :func:`fused_pairwise_loss`."""
    dtype = _dtype(weight)
    with torch.autocast(hidden.device.type, enabled=False):
        part = _Part(hidden, labels, dtype)
        tokens = _token_logps(part, weight.to(dtype), _cast(bias, dtype), logits_at_once)
        return part.by_sequence(tokens.logps)


class _Part:
    """The hidden states that have a label, ``(N, H)``, and the way back to all of them."""

    def __init__(self, hidden: Tensor, labels: Tensor, dtype: torch.dtype) -> None:
        self.shape = hidden.shape
        self.places = (labels != IGNORED).nonzero(as_tuple=True)
        self.labels = labels[self.places]
        self.states = hidden[self.places].to(dtype)

    def by_sequence(self, values: Tensor) -> Tensor:
        """Sums of ``values`` ``(N,)`` over each sequence ``(2B,)``, always in the same order."""
        return self.back(values).sum(1)

    def back(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """``values`` ``(N, ...)`` at their places among zeros, ``(2B, S, ...)``."""
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
                # The largest slope is multiplied in last, together with what comes from outside:
                # beta / B is small enough to be lost in float16's gradients.
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
        # In place: a second backward pass over the same graph is stopped by autograd.
        return (*(g if g is None else g.mul_(scale) for g in gradients), *[None] * 6)


def _token_logps(
    part: _Part,
    weight: Tensor,
    bias: Tensor | None,
    logits_at_once: int,
    gradients: bool = False,
    keep: bool = False,
) -> _TokenLogps:
    """With ``gradients`` those of the hidden states; with ``keep`` the softmax, where one group is
    all there is."""
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
        del logits  # before the next ones are there
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
    """Of states, weight and bias, from those of the log-probs, ``slopes`` ``(N,)``."""
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
    """Take 1 from each row ``(N, v)`` at its label, where that is within the row."""
    inside = (labels >= 0) & (labels < rows.shape[1])
    each = torch.arange(len(rows), device=rows.device)
    at = (each, labels.clamp(0, rows.shape[1] - 1))
    rows[at] = rows[at] - inside.to(rows.dtype)


def _groups(count: int, most: int) -> list[slice]:
    """``count`` things in groups of at most ``most``, and of one at least."""
    size = max(1, min(most, count))
    if 128 < size < count:
        size -= size % 128  # what a GPU's products like
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _dtype(weight: Tensor) -> torch.dtype:
    """What the model's own output layer would compute in."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)
