"""What a host would train, as its adapter has read it with the host's own code."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch

from .balanced import Geometry, steps_of_epoch
from .errors import InvalidValue
from .registry import BoundLoss

NO_LIMIT = 10**9  # tokens
_IGNORED = -100  # the label of a token that isn't trained


@dataclass(frozen=True)
class Tokens:
    """Prompt and one answer as the model gets them, without padding.

    Attributes:
        ids: token ids.
        trained: for each token, whether its log-probability goes into the loss.
    """

    ids: list[int]
    trained: list[bool]

    @classmethod
    def labelled(cls, ids: Iterable[int], labels: Iterable[int]) -> Tokens:
        """The tokens of a sequence with a label for each, which is -100 if it isn't trained."""
        return cls(list(ids), [label != _IGNORED for label in labels])

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> tuple[Tokens, Tokens]:
        """The chosen and the rejected sequence of a row with ids and labels of both."""
        chosen, rejected = (
            cls.labelled(row[f"{side}_input_ids"], row[f"{side}_labels"])
            for side in ("chosen", "rejected")
        )
        return chosen, rejected

    @property
    def prompt(self) -> list[int]:
        """The tokens before the first one that is trained."""
        return self.ids[: self._start]

    @property
    def answer(self) -> list[int]:
        """The tokens after the prompt."""
        return self.ids[self._start :]

    @property
    def _start(self) -> int:
        return self.trained.index(True) if True in self.trained else len(self.ids)


@dataclass(frozen=True)
class Pair:
    """A preference pair as it is trained on; ``truncated`` if either side was cut."""

    chosen: Tokens
    rejected: Tokens
    truncated: bool


@dataclass(frozen=True)
class Window:
    """The pairs of an optimizer step, which balanced batches exchange among its micro-batches.

    Attributes:
        epoch: number of the epoch, from 1.
        step: number of the optimizer step in the run, from 1.  A step that continues in the
            next epoch is two windows.
        pairs: places among the pairs that are trained on, in the host's order and in the layout
            ``[micro-step][rank][place]``.  The last micro-step may be short, on all ranks alike.
    """

    epoch: int
    step: int
    pairs: Sequence[int]


@dataclass(frozen=True)
class ModelState:
    """What the memory of the model's state on a rank depends on.

    Attributes:
        config: transformers' config of the model, from which its parameters are counted.
        lora: PEFT's config if adapters are trained, else None.
        weight_bytes: bytes of a weight as it is loaded, 2 or 4.
        four_bit: whether the frozen weights are held in 4 bits.
        optimizer_bytes: bytes of the optimizer's state for a trained weight, master copy included.
        zero_stage: DeepSpeed's stage, 0 without sharding; None under FSDP, whose sharding isn't
            known: then nothing is estimated.
        reference: whether a second copy of the model is held as reference.
        offloaded: which of ``optimizer``, ``weights``, ``reference`` are held in the CPU's memory.
        logits_at_once: the largest number of logits that a fused loss holds; None if all logits of
            a micro-batch are held.
        reference_freed: whether the reference is held before the first step only.
        adapter_bytes: bytes of an adapter's weight; None if it is ``weight_bytes``.
        in_float32: parts of the names of modules that are held in float32, in the reference too.
        unknown: the user's setting for which nothing is estimated; empty without one.
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
    adapter_bytes: int | None = None
    in_float32: tuple[str, ...] = ()
    unknown: str = ""


@dataclass(frozen=True)
class Plan:
    """A run before it is started.

    Attributes:
        host: the host's name and release.
        loss: the loss of this package that the host will train; None for the host's own.
        host_loss: the host's loss, trained if ``loss`` is None.
        beta: the factor of the margin.
        label_smoothing: as in :func:`~focalpo_plugins.focalpo_loss`.
        margin: the margin of the loss, ``dpo`` or one without a reference.
        terms: the host's names of the losses that are added up, each with its weight; ``loss``
            replaces ``sigmoid``. None if the logged loss has another part or factor, or if the
            reference is another model than the policy.
        max_length: tokens that a sequence is cut to.
        micro_batch: number of pairs that a rank computes at a time.
        accumulation: number of micro-batches in a step.
        ranks: number of ranks that the run is planned for.
        data_ranks: number of ranks that get pairs of their own; fewer than ``ranks`` if sequences
            or layers are split over ranks.
        precision: ``bf16``, ``fp16`` or ``fp32``.
        state: what the memory depends on.
        warnings: what the adapter warns of, a sentence each.
        notes: remarks that are printed below the run's name.
        tokenizer: None if no data was read; then what follows is empty.
        rows: number of pairs in the data files.
        kept: number of pairs that are trained on; the host drops the others.
        pairs: the kept pairs, in order.
        formats: what the rows of each dataset look like, and what reads them.
        epoch_steps: optimizer steps of an epoch, a fraction if a step continues in the next epoch.
        steps: optimizer steps of the run.
        windows: the run's pairs as the host draws them, before they are balanced.
        balanced_batches: whether the run balances its batches.
        shared_prompts: whether the run computes the common start of a pair's sequences once.
        fused: whether the output layer, too, computes only the tokens that aren't padding.
        packed: whether the host itself computes no padding.
    """

    host: str
    loss: BoundLoss | None
    host_loss: str
    beta: float
    label_smoothing: float
    max_length: int | None
    micro_batch: int
    accumulation: int
    ranks: int
    data_ranks: int
    precision: str
    state: ModelState
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()
    margin: str = "dpo"
    terms: Sequence[tuple[str, float]] | None = (("sigmoid", 1.0),)
    tokenizer: Any = None
    rows: int = 0
    kept: int = 0
    pairs: Iterable[Pair] = ()
    formats: Sequence[str] = ()
    epoch_steps: float = 0
    steps: int = 0
    windows: Iterable[Window] = ()
    balanced_batches: bool = False
    shared_prompts: bool = False
    fused: bool = False
    packed: bool = False

    @property
    def geometry(self) -> Geometry:
        """How an epoch is cut into micro-batches."""
        return Geometry(self.data_ranks, self.micro_batch, self.accumulation)

    def reversal(self) -> float:
        """The margin below which the loss pushes a pair the wrong way; ``-inf`` if there is none.

        It is the higher of the margins at both ends of the run.
        """
        if self.loss is None:
            return -math.inf
        return max(self.loss.at(progress).reversal() for progress in (0.0, 1.0))

    def first_loss(self) -> float | None:
        """The loss at margin 0, where a run starts whose policy is its reference; None if unknown.

        Label smoothing doesn't change it.
        """
        if self.margin != "dpo" or self.terms is None:
            return None
        of_dpo = math.log(2) if self.loss is None else self.loss(torch.zeros(1).double()).item()
        # IPO pulls the difference of the log-ratios to 1/(2 beta).
        known = {"sigmoid": of_dpo, "hinge": 1.0, "ipo": (2 * self.beta) ** -2}
        if not all(name in known for name, _ in self.terms):
            return None
        return sum(weight * known[name] for name, weight in self.terms)


def sharding(deepspeed: Any, fsdp: Any) -> tuple[int | None, frozenset[str]]:
    """The stage and the offloaded parts of a :class:`ModelState`.

    Args:
        deepspeed: DeepSpeed's config, or the path of its file; None without DeepSpeed.
        fsdp: what configures FSDP, if anything does.
    """
    if not deepspeed:
        return (None if fsdp else 0), frozenset()
    if not isinstance(deepspeed, dict):
        deepspeed = json.loads(Path(deepspeed).read_text(encoding="utf-8"))
    zero = deepspeed.get("zero_optimization", {})
    keys = {"optimizer": "offload_optimizer", "weights": "offload_param"}
    offloaded = (
        what for what, key in keys.items() if (zero.get(key) or {}).get("device", "none") != "none"
    )
    return int(zero.get("stage", 0)), frozenset(offloaded)


def precision(bf16: object, fp16: object) -> str:
    """The ``precision`` of a :class:`Plan`, by whether each of the two is asked for."""
    return "bf16" if bf16 else "fp16" if fp16 else "fp32"


def adam_bytes(optimizer: object, weight: int, *, master: bool) -> float:
    """The ``optimizer_bytes`` of a :class:`ModelState`.

    Args:
        optimizer: its name, as the host's users write it.
        weight: the bytes of a trained weight.
        master: whether DeepSpeed trains a copy in float32, as it does if weights are narrower.
    """
    moments = 2.0 if "8bit" in str(optimizer) else 2.0 * (4 if master else weight)
    return 4 * master + moments


def streamed() -> InvalidValue:
    """The error for data that can't be counted."""
    return InvalidValue(
        "streaming must be false for focalpo check, got true: streamed data can't be counted. Set "
        "it to false for the check."
    )


def run_steps(args: Any, epoch_steps: float) -> int:
    """Optimizer steps of a run with transformers' arguments."""
    of_epochs = math.ceil(args.num_train_epochs * epoch_steps)
    return int(args.max_steps) if args.max_steps > 0 else of_epochs


def epoch_steps(
    pairs: int, micro_batch: int, accumulation: int, ranks: int, drop_last: bool
) -> int:
    """Optimizer steps of an epoch, as transformers and accelerate count them.

    A batch, a round of ranks or a step is also trained on if it is not full; ``drop_last`` leaves
    out such batches and rounds.
    """
    left_out = 0 if drop_last else 1
    batches = pairs // micro_batch + left_out * bool(pairs % micro_batch)
    of_rank = batches // ranks + left_out * bool(batches % ranks)
    return max(1, -(-of_rank // accumulation))


def windows(
    order: Iterable[int],
    geometry: Geometry,
    drop_last: bool,
    steps: int,
    *,
    completed: bool = True,
) -> Iterator[Window]:
    """The pairs of a run of ``steps`` steps, as accelerate divides them among the ranks.

    Args:
        order: draws the pairs of an epoch each time.
        drop_last: whether pairs that don't fill a round of micro-batches are left out.
        completed: whether such a round of several ranks is completed with the epoch's first pairs.
    """
    size, done = geometry.micro_step, 0
    for epoch in count():
        if hasattr(order, "set_epoch"):
            order.set_epoch(epoch)
        before = done
        filled = completed and geometry.ranks > 1 and not drop_last
        for pairs in steps_of_epoch(order, geometry, filled):
            kept = pairs[: len(pairs) // size * size] if drop_last else pairs
            if done == steps:
                return
            if kept:
                done += 1
                yield Window(epoch + 1, done, kept)
        if done == before:
            return
