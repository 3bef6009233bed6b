"""A pairwise loss in Liger's fused linear preference loss, for TRL's ``use_liger_kernel``.

The only change with respect to Liger's DPO loss is the function of the margin: chunks, log-probs
and gradients are those of Liger's base class, which never holds the logits of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from liger_kernel.chunked_loss.fused_linear_preference import LigerFusedLinearPreferenceBase
from torch import Tensor, nn

from ..registry import BoundLoss


class FusedPairwiseLoss(nn.Module):
    """Takes the place of Liger's ``LigerFusedLinearDPOLoss`` in TRL's trainer.

    Args:
        loss: the pairwise loss.
        beta: DPO's beta.
        label_smoothing: share of labels taken to be flipped.
        record: called with the batch's reward margins ``(B,)``.
    """

    def __init__(
        self,
        loss: BoundLoss,
        *,
        beta: float,
        label_smoothing: float,
        record: Callable[[Tensor], None],
    ) -> None:
        super().__init__()
        self.loss = loss
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.record = record

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Mean loss, and Liger's metrics, of which the last two are the rewards ``(B,)``."""
        loss, metrics = _FusedPairwiseFunction.apply(
            _input,
            lin_weight,
            target,
            bias,
            ref_input,
            ref_weight,
            ref_bias,
            self.beta,
            lambda margins: self.loss(margins, self.label_smoothing),
        )
        self.record(metrics[-2] - metrics[-1])
        return loss, metrics


class _FusedPairwiseFunction(LigerFusedLinearPreferenceBase):
    @staticmethod
    def preference_loss_fn(
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        full_target: Tensor,
        ref_chosen_logps: Tensor,
        ref_rejected_logps: Tensor,
        beta: float,
        pairwise: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A chunk's share of the batch's mean loss, and the rewards of its pairs."""
        chosen_logratios = chosen_logps - ref_chosen_logps
        rejected_logratios = rejected_logps - ref_rejected_logps
        losses = pairwise(beta * (chosen_logratios - rejected_logratios))
        pairs = full_target.shape[0] // 2
        return losses.sum() / pairs, beta * chosen_logratios, beta * rejected_logratios

    @classmethod
    def forward(
        cls,
        ctx: Any,
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        ref_input: Tensor,
        ref_weight: Tensor,
        ref_bias: Tensor | None,
        beta: float,
        pairwise: Callable[[Tensor], Tensor],
    ) -> Any:
        return super().forward(
            cls=cls,
            ctx=ctx,
            _input=_input,
            weight=weight,
            target=target,
            bias=bias,
            beta=beta,
            compute_nll_loss=False,
            compiled=torch.cuda.is_available(),
            use_ref_model=True,
            ref_input=ref_input,
            ref_weight=ref_weight,
            ref_bias=ref_bias,
            average_log_prob=False,
            pairwise=pairwise,
        )

    @staticmethod
    def backward(ctx: Any, *grad_output: Any) -> Any:
        # Liger's gives the gradients of the first four inputs; the other five need none.
        return (*LigerFusedLinearPreferenceBase.backward(ctx, grad_output)[:4], *[None] * 5)
