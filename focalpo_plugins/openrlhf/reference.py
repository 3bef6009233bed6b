"""The reference's log-probabilities from OpenRLHF's own batches and forward pass.

:mod:`focalpo_plugins.reference` computes and keeps them.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deepspeed import zero
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.utils.data import ConcatDataset

from ..errors import InvalidValue
from ..reference import Pairs, ReferenceLogps, describe_model, emptied
from ..reference import precompute as precompute_with
from .ranks import StrategyRanks, stop_all


def precompute(
    trainer: Any, strategy: Any, folder: Path, flag: str, shared: bool
) -> ReferenceLogps:
    """Read or compute the log-probabilities of all pairs of ``trainer``, and free its reference.

    Call it on all ranks.  An ``Actor`` without a model stays in the reference's place.

    Args:
        trainer: OpenRLHF's trainer, ready to train.
        strategy: OpenRLHF's strategy.
        folder: the folder of the file.
        flag: the flag by which the user named ``folder``.
        shared: whether the forward pass shares prompts, which rounds differently.

    Raises:
        SystemExit: the folder can't be written to, or a log-probability is not finite.
    """
    ranks, actor = StrategyRanks(strategy), trainer.ref_model
    settings = {
        **describe_model(
            actor.model.module, ranks, lambda weight: zero.GatheredParameters([weight])
        ),
        "packing": trainer.packing_samples,
        **({"shared": True} if shared else {}),
        "temperature": getattr(actor, "temperature", 1.0),
        **{
            name: getattr(strategy, name, None)
            for name in ("ring_attn_size", "ring_head_stride", "ds_tensor_parallel_size")
        },
        "device": next(trainer.model.parameters()).device.type,
        "openrlhf": version("openrlhf"),
    }
    try:
        return precompute_with(_Source(trainer), ranks, settings, folder, flag)
    except InvalidValue as error:
        stop_all(strategy, str(error))


class _Source:
    """The pairs of a trainer's data sets, and its reference."""

    def __init__(self, trainer: Any) -> None:
        loaders = [trainer.train_dataloader, trainer.eval_dataloader]
        data = [loader.dataset for loader in loaders if loader is not None]
        self._data: ConcatDataset[Any] = ConcatDataset(data)
        self._trainer = trainer
        self._device = next(trainer.model.parameters()).device
        self.pairs = len(self._data)
        self.batch_size: int = loaders[0].batch_size
        self.share: tuple[int, int] = loaders[0].sampler.rank, loaders[0].sampler.num_replicas
        trainer.ref_model.eval()

    def batch(self, numbers: Sequence[int]) -> Pairs:
        """The batch as ``DPOTrainer`` takes it from its data loader."""
        collate = self._trainer.train_dataloader.collate_fn
        *tensors, prompt_lengths = collate([self._data[number] for number in numbers])
        chosen, chosen_mask, rejected, rejected_mask = (tensor.squeeze(1) for tensor in tensors)
        return Pairs(chosen, chosen_mask, rejected, rejected_mask, prompt_lengths)

    def logps(self, batch: Pairs) -> tuple[Tensor, Tensor]:
        *tensors, prompt_lengths = batch
        tensors = [tensor.to(self._device) for tensor in tensors]
        model = self._trainer.ref_model
        chosen, rejected, *_ = self._trainer.concatenated_forward(model, *tensors, prompt_lengths)
        return chosen, rejected

    def name(self, number: int) -> str:
        trained = self._data.cumulative_sizes[0]
        pair = f"pair {number} of the training data"
        if number >= trained:
            pair = f"pair {number - trained} of the evaluation data"
        return f"{pair} that OpenRLHF kept, counted from 0"

    def text(self, number: int) -> str:
        text: str = self._trainer.tokenizer.decode(self.batch([number]).chosen_ids[0])
        return text

    def free(self) -> int:
        """Free the engine, and return the bytes of weights that it held on this rank."""
        actor = self._trainer.ref_model
        engine, actor.model = actor.model, None
        engine.destroy()
        held = emptied(engine)
        del engine
        gc.collect()
        get_accelerator().empty_cache()
        return held
