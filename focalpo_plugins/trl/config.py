"""TRL's configs with FocalPO's fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from trl import DPOConfig

from ..errors import InvalidType, InvalidValue
from ..guards.messages import named
from ..options import OF_ANY_LOSS, OF_FOCALPO
from ..registry import BoundLoss, get_loss
from .arguments import by_name

if TYPE_CHECKING:
    # The class of super() in the fields' methods, by the order of the bases.
    from transformers import TrainingArguments as _Host
else:
    _Host = object


def _field(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": f"{text}."})


@dataclass
class PairwiseFields(_Host):
    """The fields added to each of TRL's configs; this class comes before TRL's in the bases.

    Args:
        focalpo_gamma: focusing parameter gamma of Eq. 4, the paper's 0.05 by default.
        focalpo_gamma_end: gamma at the last step; gamma changes to it over the run.  None keeps
            gamma constant.
        focalpo_gamma_schedule: how gamma changes, ``linear`` (the default) or ``cosine``;
            :func:`~focalpo_plugins.loss.gamma_at` has the formulas.
        focalpo_variant: ``correct`` (Eq. 4), ``correct_exact`` (Eq. 3) or ``incorrect``.
        focalpo_allow_reversed: accept a gamma that makes training run backwards.
        focalpo_pairwise_loss: name of the registered loss; a loss of another package is trained
            with its options' defaults.
        focalpo_shared_prompts: compute the common start of a pair's two sequences once instead of
            twice, and no padding: the same log-probs up to rounding, from fewer tokens.
        focalpo_balanced_batches: deal the pairs of each optimizer step to ranks and
            micro-batches by length: the same steps up to rounding, in less time.
        focalpo_allow_changed: resume from a checkpoint that was trained with another loss, or with
            another value of a setting that goes into the loss.
        focalpo_allow_data: train even if more than half of the data has a fault.

    Raises:
        ValueError: a ``focalpo_*`` value is out of range.
    """

    focalpo_gamma: float = _field(0.05, OF_FOCALPO["gamma"])
    focalpo_gamma_end: float | None = _field(None, OF_FOCALPO["gamma_end"])
    focalpo_gamma_schedule: str | None = _field(None, OF_FOCALPO["gamma_schedule"])
    focalpo_variant: str = _field("correct", OF_FOCALPO["variant"])
    focalpo_allow_reversed: bool = _field(False, OF_FOCALPO["allow_reversed"])
    focalpo_pairwise_loss: str = _field("focalpo", "Name of the registered pairwise loss")
    focalpo_shared_prompts: bool = _field(False, OF_ANY_LOSS["shared_prompts"])
    focalpo_balanced_batches: bool = _field(False, OF_ANY_LOSS["balanced_batches"])
    focalpo_allow_changed: bool = _field(False, OF_ANY_LOSS["allow_changed"])
    focalpo_allow_data: bool = _field(False, OF_ANY_LOSS["allow_data"])

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pairwise_loss()

    def pairwise_loss(self) -> BoundLoss:
        """The loss that the ``focalpo_*`` fields ask for.

        Raises:
            ValueError: a field is out of range; the message names it.
        """
        with named("focalpo_pairwise_"):
            loss = get_loss(self.focalpo_pairwise_loss)
        defaults = get_loss("focalpo").options
        options = {name: getattr(self, f"focalpo_{name}") for name in defaults}
        with named("focalpo_", options):
            if loss.name == "focalpo":
                return loss.bind(**options)
            for name, default in defaults.items():
                if options[name] != default:
                    raise InvalidValue(
                        f"{name} belongs to the loss focalpo, got {options[name]!r} with "
                        f"focalpo_pairwise_loss={loss.name!r}: remove it."
                    )
            return loss.bind()


@dataclass
class FocalPOConfig(PairwiseFields, DPOConfig):
    """TRL's ``DPOConfig`` with the fields of :class:`PairwiseFields` and these.

    Args:
        focalpo_fused: compute the loss without holding all logits of the batch in memory, with or
            without a precomputed reference; Liger's package isn't needed. From 1.14 on, TRL has
            such a path itself and always takes it.

    Raises:
        ValueError: a ``focalpo_*`` value is out of range.
    """

    focalpo_fused: bool = _field(False, OF_ANY_LOSS["fused"])


class OfConfig:
    """A trainer that takes its loss and its settings from a config of this package."""

    _config: ClassVar[Any]  # its class

    def __init__(self, *given: Any, **kwargs: Any) -> None:
        args = by_name(self._trainer, given, kwargs).get("args")  # type: ignore[attr-defined]
        if not isinstance(args, self._config):
            needed = self._config.__name__
            raise InvalidType(
                f"args must be a {needed}, got {type(args).__name__}: {needed} accepts the same "
                "arguments, plus those that begin with focalpo_."
            )
        self._allow_changed = args.focalpo_allow_changed
        self._allow_data = args.focalpo_allow_data
        super().__init__(*given, **kwargs)
        self.set_loss(args.pairwise_loss())  # type: ignore[attr-defined]
