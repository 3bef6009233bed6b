"""TRL's trainers without a reference, with another pairwise loss on their margin.

The only change with respect to ``CPOTrainer`` and ``ORPOTrainer`` is the loss of the margin ``z``.
The margin is TRL's own:

==========  ===============================================================  ==================
margin      ``z``                                                            in TRL
==========  ===============================================================  ==================
``cpo``     ``beta * (logp_chosen - logp_rejected)``, sums over tokens       ``loss_type="sigmoid"``
``simpo``   the same with means over tokens, minus ``simpo_gamma``           ``loss_type="simpo"``
``orpo``    log odds ratio of the means over tokens                          ``ORPOTrainer``
==========  ===============================================================  ==================

Terms that TRL adds to the loss don't change, such as ``cpo_alpha`` times the chosen answer's
negative log-likelihood.  The paper leaves this open (arXiv 2501.06645, "Future Work"): nothing here
is a result of the paper.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..balanced import MEAN_OF_TOKENS
from ..errors import InvalidValue, conflict
from ..guards import pairs
from ..guards.faults import Fault
from ..hf_batches import check_batches
from ..hf_sequences import PairSequences
from ..loss import check_beta, check_label_smoothing, check_weights
from .arguments import by_name, check_parallelism
from .batch_loss import BatchLossMixin
from .config import OfConfig, PairwiseFields
from .data import (
    SEQUENCES,
    check_data,
    labelled_answers,
    largest_id,
    sampled_columns,
    sequences_of,
    unpadded,
)
from .exchange import check_host, smoothing_of_both
from .parts import embeddings_of

with warnings.catch_warnings():
    # TRL warns that this part of it may change: check_host checks the installed one.
    warnings.simplefilter("ignore")
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

#: The margin of each of CPO's loss types.
MARGIN_OF = {"sigmoid": "cpo", "simpo": "simpo"}
# The same for a model whose encoder gets the prompt, and whose decoder gets the answers.
_OF_DECODER = ("prompt_input_ids", "chosen_labels", "rejected_labels")
# What the start-up line shows of the host's values.
_SAID = ("margin", "beta", "simpo_gamma", "cpo_alpha", "label_smoothing", "alpha")


class ReferenceFreeMixin(BatchLossMixin):
    """The part that the trainers for CPO and ORPO share."""

    _trainer: ClassVar[type]  # TRL's trainer
    _method: ClassVar[str]  # its method that computes the loss of the margin

    if TYPE_CHECKING:
        beta: float

    @classmethod
    def check_host(cls) -> None:
        """Raise ``RuntimeError`` unless TRL computes its loss where we exchange it."""
        check_host(cls._trainer, cls._method)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.check_host()
        given = by_name(self._trainer, args, kwargs)
        config = given.get("args")
        if config is not None:
            self._check_config(config)
            self._ask(given, config)
        check_data(given, self._host)
        self._embeddings = {"policy": embeddings_of(given.get("model"))}
        super().__init__(*args, **kwargs)
        self._check_sets(self.processing_class, self.train_dataset, self.eval_dataset)

    def _check_config(self, config: Any) -> None:
        """Raise ``ValueError`` if TRL's arguments can't be combined with a pairwise loss."""
        check_beta(config.beta)
        check_parallelism(config)
        check_batches(config)

    def _said_of_host(self) -> str:
        said = {key: value for key, value in self._in_loss().items() if key in _SAID}
        if not said.get("alpha"):
            said.pop("alpha", None)  # AlphaPO's, 0 unless it is asked for
        shown = " ".join(f"{key}={value}" for key, value in said.items())
        return shown + self._said_of_batches()

    def _of_any(self) -> dict[str, Any]:
        """Values that go into both trainers' losses."""
        host: Any = self
        coefficient = host.aux_loss_coef if host.aux_loss_enabled else None
        of_decoder = host.args.max_completion_length if host.is_encoder_decoder else None
        return {
            "router_aux_loss_coef": coefficient,
            "max_length": host.args.max_length,
            "max_completion_length": of_decoder,
        }

    def _largest_id(self, dataset: Any) -> int:
        return largest_id(dataset, SEQUENCES)

    def _pair_faults(self, dataset: Any, tokenizer: Any, evaluation: bool) -> Iterator[Fault]:
        # TRL cuts what an encoder and what a decoder gets each to a limit of its own.
        decoder: bool = self.is_encoder_decoder  # type: ignore[attr-defined]
        cutting = pairs.Cutting(
            self._host.key("max_length"),
            None if decoder else self.args.max_length,  # type: ignore[attr-defined]
            marker=self._marker,
        )
        rows = sampled_columns(dataset, _OF_DECODER) if decoder else labelled_answers(dataset)
        yield from pairs.find(rows, tokenizer, cutting, evaluation)
        yield from self._faults(dataset, tokenizer, evaluation)

    def _sequences(self) -> PairSequences | None:
        # An encoder's data have other columns.
        return sequences_of(self.train_dataset, None, *SEQUENCES)

    def _pairs_of_step(self) -> list[tuple[list[int], list[int]]]:
        chosen, rejected = (
            unpadded(self._batch[f"{side}_input_ids"], self._batch[f"{side}_attention_mask"])
            for side in ("chosen", "rejected")
        )
        return list(zip(chosen, rejected, strict=True))

    def _places(self) -> int:
        sides = [self._batch[name] for name in SEQUENCES]
        return sum(map(len, sides)) * max(int(ids.shape[1]) for ids in sides)

    def _pairs_in(self, batch: Mapping[str, Any]) -> int:
        return len(batch["chosen_labels"])


class CPOLossMixin(ReferenceFreeMixin):
    """Exchanges a TRL CPO trainer's loss.  Comes before the trainer in the list of bases."""

    _own_loss, _trainer, _method = "CPO", CPOTrainer, "cpo_loss"

    if TYPE_CHECKING:
        loss_type: str
        label_smoothing: float
        cpo_alpha: float
        simpo_gamma: float
        alpha: float

    def _check_config(self, config: Any) -> None:
        super()._check_config(config)
        if config.loss_type not in MARGIN_OF:
            raise InvalidValue(
                f"loss_type must be one of {', '.join(MARGIN_OF)}, got {config.loss_type!r}: it "
                "has no log-sigmoid of the margin that the loss could replace."
            )
        check_label_smoothing(config.label_smoothing)
        check_weights("cpo_alpha", config.cpo_alpha)

    def _in_loss(self) -> dict[str, Any]:
        of_simpo = {"simpo_gamma": self.simpo_gamma} if self.loss_type == "simpo" else {}
        return {
            "margin": MARGIN_OF[self.loss_type],
            "beta": self.beta,
            **of_simpo,
            "cpo_alpha": self.cpo_alpha,
            "label_smoothing": self.label_smoothing,
            "alpha": self.alpha,
            **self._of_any(),
        }

    def _notes(self) -> list[str]:
        if self.loss_type != "simpo" or not self.cpo_alpha:
            return []
        key = self._host.key("cpo_alpha")
        return [
            f"the loss adds {self.cpo_alpha:g} x the chosen answer's negative log-likelihood "
            f"({key}, which is 1.0 unless it is set) to SimPO's. For SimPO itself set {key} to 0."
        ]

    def cpo_loss(self, *logps: Tensor) -> Any:
        """TRL's own loss, which calls one log-sigmoid of ``z`` and one of ``-z``."""
        host: Any = super()
        smoothing = smoothing_of_both(self.label_smoothing)
        with self._exchanged(smoothing, f"loss_type {self.loss_type!r}", CPOTrainer):
            return host.cpo_loss(*logps)


class ORPOLossMixin(ReferenceFreeMixin):
    """Exchanges a TRL ORPO trainer's loss.  Comes before the trainer in the list of bases."""

    _own_loss, _trainer, _method = "ORPO", ORPOTrainer, "odds_ratio_loss"

    def _in_loss(self) -> dict[str, Any]:
        return {"margin": "orpo", "beta": self.beta, **self._of_any()}

    def _ask(self, given: Mapping[str, Any], config: Any) -> None:
        super()._ask(given, config)
        key = self._balanced_key
        if key is not None:
            why = f"its likelihood term {MEAN_OF_TOKENS}"
            raise conflict(key, self._host.key("margin"), "orpo", why, f"Set {key} to false")

    def odds_ratio_loss(self, *logps: Tensor) -> Any:
        """TRL's own loss, which calls one log-sigmoid of the log odds ratio."""
        host: Any = super()
        with self._exchanged([0.0], "ORPO", ORPOTrainer):
            return host.odds_ratio_loss(*logps)


@dataclass
class FocalCPOConfig(PairwiseFields, CPOConfig):
    """TRL's ``CPOConfig`` with the fields of :class:`~focalpo_plugins.trl.config.PairwiseFields`.

    ``loss_type`` chooses the margin of the loss: ``sigmoid`` for CPO's, ``simpo`` for SimPO's.

    Raises:
        ValueError: a ``focalpo_*`` value is out of range.
    """


@dataclass
class FocalORPOConfig(PairwiseFields, ORPOConfig):
    """TRL's ``ORPOConfig`` with the fields of :class:`~focalpo_plugins.trl.config.PairwiseFields`.

    Raises:
        ValueError: a ``focalpo_*`` value is out of range.
    """


class FocalCPOTrainer(OfConfig, CPOLossMixin, CPOTrainer):
    """TRL's ``CPOTrainer`` with FocalPO's loss of CPO's or SimPO's margin; takes a
    :class:`FocalCPOConfig` as ``args``.

    Raises:
        TypeError: ``args`` is a plain ``CPOConfig``, which has no gamma.
        ValueError: the config asks for something that the loss can't be combined with.
        RuntimeError: the installed TRL computes its loss elsewhere.
    """

    _config = FocalCPOConfig
    __signature__ = inspect.signature(CPOTrainer)


class FocalORPOTrainer(OfConfig, ORPOLossMixin, ORPOTrainer):
    """TRL's ``ORPOTrainer`` with FocalPO's loss of the log odds ratio; takes a
    :class:`FocalORPOConfig` as ``args``.

    Raises:
        TypeError: ``args`` is a plain ``ORPOConfig``, which has no gamma.
        ValueError: the config asks for something that the loss can't be combined with.
        RuntimeError: the installed TRL computes its loss elsewhere.
    """

    _config = FocalORPOConfig
    __signature__ = inspect.signature(ORPOTrainer)
