"""What a host is about to train, as its adapter read it with the host's own code."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from .registry import BoundLoss


@dataclass(frozen=True)
class Tokens:
    """Prompt and one answer as the model gets them, without padding.

    Attributes:
        ids: token ids.
        trained: for each token, whether its log-probability goes into the loss.
    """

    ids: list[int]
    trained: list[bool]


@dataclass(frozen=True)
class Pair:
    """A preference pair as it is trained on; ``truncated`` where either side was cut."""

    chosen: Tokens
    rejected: Tokens
    truncated: bool


@dataclass(frozen=True)
class ModelState:
    """What the model's state takes on a rank.

    Attributes:
        config: transformers' config of the model, from which its parameters are counted.
        lora: PEFT's config where adapters are trained, else None.
        weight_bytes: of a weight as it is loaded, 2 or 4.
        four_bit: whether the frozen weights are held in 4 bits.
        optimizer_bytes: of the optimizer's state for a trained weight, master copy included.
        zero_stage: DeepSpeed's, 0 where there is no sharding; None where it isn't known how the
            state is sharded (FSDP), and nothing is estimated.
        reference: whether a second copy of the model is held as reference.
        offloaded: which of ``optimizer``, ``weights``, ``reference`` are held in the CPU's memory.
        logits_at_once: the most logits that a fused loss holds; None where all of a micro-batch's
            are held.
        reference_freed: whether the reference is held before the first step only.
    """

    config: Any
    lora: Any
    weight_bytes: int
    four_bit: bool
    optimizer_bytes: float
    zero_stage: int | None
    reference: bool
    offloaded: frozenset[str] = frozenset()
    logits_at_once: int | None = None
    reference_freed: bool = False


@dataclass
class Plan:
    """A run before it is started.

    Attributes:
        host: its name and release.
        loss: the loss of ours that it will train, None for the host's own.
        host_loss: what it trains where ``loss`` is None.
        margin: what the loss is of, ``dpo`` or a margin without a reference.
        tokenizer: None where no data was read; the next three are empty then.
        rows: pairs in the data files.
        kept: pairs that are trained on; the others are dropped by the host.
        pairs: those, in their order.
        max_length: tokens that a sequence is cut to.
        micro_batch: pairs of a rank at a time.
        accumulation: micro-batches of a step.
        ranks: that the run is meant for.
        data_ranks: of those, the ones that get pairs of their own; fewer where sequences or layers
            are split over ranks.
        epoch_steps: optimizer steps of an epoch, a fraction where one goes on into the next epoch.
        steps: optimizer steps of the run.
        precision: ``bf16``, ``fp16`` or ``fp32``.
        warnings: the host's own traps, a sentence each.
        formats: what the rows of each dataset look like, and what reads them.
    """

    host: str
    loss: BoundLoss | None
    host_loss: str
    beta: float
    label_smoothing: float
    tokenizer: Any
    rows: int
    kept: int
    pairs: Iterable[Pair]
    max_length: int | None
    micro_batch: int
    accumulation: int
    ranks: int
    data_ranks: int
    epoch_steps: float
    steps: int
    precision: str
    state: ModelState
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    margin: str = "dpo"
    formats: list[str] = field(default_factory=list)

    def reversal(self) -> float:
        """The margin below which the loss pushes a pair the wrong way, at the end of the run where
        it is higher; ``-inf`` where none is."""
        if self.loss is None:
            return -math.inf
        return max(self.loss.at(progress).reversal() for progress in (0.0, 1.0))

    def first_loss(self) -> float | None:
        """The loss at margin 0, where every run with a reference starts; label smoothing changes
        nothing there.  None without a reference."""
        if self.margin != "dpo":
            return None
        return math.log(2) if self.loss is None else self.loss(torch.zeros(1).double()).item()
