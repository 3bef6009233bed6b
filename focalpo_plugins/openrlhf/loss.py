"""A registered pairwise loss with the interface of OpenRLHF's ``DPOLoss``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import InvalidValue
from ..loss import check_beta, check_label_smoothing, label_smoothed
from ..registry import BoundLoss, get_loss


class PairwiseDPOLoss(nn.Module):
    r"""Mean loss and both rewards from four tensors of log-probabilities.

    The loss gets the margin of the log-probabilities

    .. math:: z = \beta\,\big((\pi_w - \pi_l) - (\pi^{ref}_w - \pi^{ref}_l)\big)

    The rewards and the mean are as in OpenRLHF's ``DPOLoss``.  Its arguments come first, so that
    this class can be constructed in its place.

    Args:
        beta: scale of the implicit reward.
        label_smoothing: assumed share ``e`` of flipped labels: ``(1 - e) L(z) + e L(-z)``.
        ipo: must be false; IPO is another loss.
        loss: name of a registered loss.
        options: its options, such as ``gamma`` and ``variant``; the others keep their defaults.

    Raises:
        ValueError: a value is out of range, or the loss or an option is not known.

    Example:
        >>> loss_fn = PairwiseDPOLoss(beta=0.1, gamma=0.05)
        >>> loss, chosen_rewards, rejected_rewards = loss_fn(
        ...     policy_chosen, policy_rejected, reference_chosen, reference_rejected
        ... )
    """

    def __init__(
        self,
        beta: float,
        label_smoothing: float = 0.0,
        ipo: bool = False,
        *,
        loss: str = "focalpo",
        **options: Any,
    ) -> None:
        super().__init__()
        check_beta(beta)
        check_label_smoothing(label_smoothing)
        if ipo:
            raise InvalidValue(
                f"ipo must be false with the loss {loss!r}, got {ipo!r}: IPO is another loss. "
                "Choose one of the two."
            )
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.pairwise_loss = get_loss(loss).bind(**options)

    def loss_of(self, margins: Tensor) -> BoundLoss:
        """The loss for a batch with these margins ``(B,)``: the one at the start of a run.

        A trainer's subclass counts the margins, and takes the loss at the step that is trained.
        """
        return self.pairwise_loss.at(0.0)

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Summed log-probabilities ``(B,)`` of the answers, under the policy and the reference.

        Returns:
            The mean loss ``()``, the chosen rewards ``(B,)`` and the rejected rewards ``(B,)``,
            the rewards detached.
        """
        policy_logratios = policy_chosen_logps - policy_rejected_logps
        reference_logratios = reference_chosen_logps - reference_rejected_logps
        logratios = policy_logratios - reference_logratios
        pairwise_loss = self.loss_of(self.beta * logratios)
        # Beta multiplies each of the two gradients before they are added, as in ``DPOLoss``: so at
        # gamma 0 both are equal to the last bit.
        loss = label_smoothed(
            lambda signed: pairwise_loss(self.beta * signed),
            logratios,
            self.label_smoothing,
        ).mean()
        chosen_rewards = self.beta * (policy_chosen_logps - reference_chosen_logps).detach()
        rejected_rewards = self.beta * (policy_rejected_logps - reference_rejected_logps).detach()
        return loss, chosen_rewards, rejected_rewards

    def extra_repr(self) -> str:
        return (
            f"{self.pairwise_loss.describe()}, beta={self.beta}, "
            f"label_smoothing={self.label_smoothing}"
        )
