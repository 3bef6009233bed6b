"""A precomputed reference for a ``transformers.Trainer`` whose host can't precompute it.

:mod:`focalpo_plugins.reference` computes and keeps the log-probabilities, by the host's own
collator and forward pass.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset

from .errors import InvalidValue, conflict
from .guards.folders import check_folder
from .guards.ranks import together
from .hf_models import gathered
from .hf_sequences import sets_of
from .hf_trainer import RANKS
from .reference import Pairs, ReferenceLogps, describe_model, emptied
from .reference import precompute as precompute_with
from .yaml_keys import PRECOMPUTE, PRECOMPUTE_DIR

if TYPE_CHECKING:
    from transformers import Trainer

# A batch as the host collates it: chosen sequences first, then the rejected ones.
_Batch = Mapping[str, Any]
_Forward = Callable[[_Batch], tuple[Tensor, Tensor]]


class PrecomputedReference:
    """Gives the reference's log-probabilities of a batch, and frees the reference.

    Args:
        trainer: the host's trainer, built with its data, and with a reference or adapters.
        forward: the host's own: the reference's summed log-probabilities of both sides ``(B,)``.
        folder: the folder of the file; empty for the output folder.
        shared: whether the forward pass shares prompts, which rounds differently.

    Raises:
        ValueError: the folder can't be written to, the run can't do it, or a log-probability is not
            finite; on all ranks.
    """

    def __init__(self, trainer: Trainer, forward: _Forward, folder: str, shared: bool) -> None:
        source = _Source(trainer, forward)
        place = Path(folder or str(trainer.args.output_dir)).expanduser()
        together(RANKS, lambda: _check(trainer, source, place))
        settings = {
            **describe_model(source.model, RANKS, gathered),
            "shared": shared,
            "mixed_precision": trainer.accelerator.mixed_precision,
            "device": trainer.accelerator.device.type,
        }
        self._logps: ReferenceLogps = precompute_with(
            source, RANKS, settings, place, PRECOMPUTE_DIR
        )

    def __call__(self, batch: _Batch) -> tuple[Tensor, Tensor]:
        """Both sides ``(B,)``; NaN for a pair that wasn't in the data of the trainer."""
        return self._logps(*_pairs_of(batch))

    @property
    def unknown(self) -> str:
        """A message about such a pair; empty if there was none."""
        return self._logps.unknown


def _check(trainer: Any, source: _Source, folder: Path) -> None:
    """Refuse runs without a whole reference before training, and a folder that isn't writable."""
    fix = f"Set {PRECOMPUTE} to false"
    if trainer.is_fsdp_enabled:
        raise conflict(
            PRECOMPUTE, "fsdp", True, "each rank holds only a part of the reference's weights", fix
        )
    if trainer.is_deepspeed_enabled and trainer.ref_model is None:
        why = "the reference is the policy, which DeepSpeed prepares when training begins"
        raise conflict(PRECOMPUTE, "adapters under DeepSpeed", True, why, fix)
    if trainer.ref_model is not None and source.model is trainer.accelerator.unwrap_model(
        trainer.model
    ):  # LLaMA-Factory does so without training
        why = "the reference is the policy itself, and would be freed with it"
        raise conflict(PRECOMPUTE, "a run that doesn't train", True, why, fix)
    if getattr(trainer.args, "sync_ref_model", False):
        raise conflict(PRECOMPUTE, "sync_ref_model", True, "the reference follows the policy", fix)
    if not hasattr(trainer.train_dataset, "__len__"):
        raise InvalidValue(
            f"{PRECOMPUTE} needs training data that isn't streamed, got streamed data. {fix}."
        )
    check_folder(folder, PRECOMPUTE_DIR)


class _Source:
    """The pairs of a trainer's data sets, and its reference."""

    def __init__(self, trainer: Any, forward: _Forward) -> None:
        data = sets_of(trainer.train_dataset, trainer.eval_dataset)
        sets = [each for each, _ in data if hasattr(each, "__len__")]
        self._data: ConcatDataset[Any] = ConcatDataset(sets or [[]])
        self._trainer, self._forward = trainer, forward
        self.pairs = len(self._data)
        self.batch_size: int = trainer.args.per_device_eval_batch_size
        self.share = RANKS.rank, RANKS.count
        wrapper = trainer.model if trainer.ref_model is None else trainer.ref_model
        self.model = trainer.accelerator.unwrap_model(wrapper)

    def batch(self, numbers: Sequence[int]) -> Pairs:
        """The batch as the host collates it; its other parts are kept for :meth:`logps`."""
        self._collated = self._trainer.data_collator([self._data[number] for number in numbers])
        return _pairs_of(self._collated)

    def logps(self, batch: Pairs) -> tuple[Tensor, Tensor]:
        was_training = self.model.training
        self.model.eval()
        try:
            return self._forward(self._trainer._prepare_inputs(dict(self._collated)))
        finally:
            self.model.train(was_training)

    def name(self, number: int) -> str:
        trained = self._data.cumulative_sizes[0]
        if number < trained:
            return f"pair {number} of the training data, counted from 0"
        return f"pair {number - trained} of the evaluation data, counted from 0"

    def text(self, number: int) -> str:
        tokenizer = self._trainer.processing_class
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        text: str = tokenizer.decode(self.batch([number]).chosen_ids[0])
        return text

    def free(self) -> int:
        """Free the reference, and return the bytes of weights that it held on this rank."""
        trainer, wrapper = self._trainer, self._trainer.ref_model
        if wrapper is None:  # the policy without its adapters
            return 0
        trainer.ref_model = None
        models = trainer.accelerator._models
        trainer.accelerator._models = [
            each for each in models if each is not wrapper and each is not self.model
        ]
        if hasattr(wrapper, "destroy"):  # DeepSpeed's engine
            wrapper.destroy()
        held = emptied(self.model)
        self.model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return held


def _pairs_of(batch: _Batch) -> Pairs:
    ids, mask, labels = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
    chosen, rejected = ids.chunk(2)
    chosen_mask, rejected_mask = mask.chunk(2)
    # Where the answers start: the tokens before the first label.
    answers = (labels.chunk(2)[0] >= 0).long()
    before = (answers.cumsum(1) == 0).long() * chosen_mask.to(answers)
    return Pairs(chosen, chosen_mask, rejected, rejected_mask, before.sum(1).tolist())
