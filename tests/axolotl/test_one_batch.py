"""Axolotl's trainer on the batch that every host gets: losses and gradients of each pair."""

from __future__ import annotations

import one_batch
import pytest
import torch
from datasets import Dataset

from focalpo_plugins.registry import get_loss


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory):
    from axolotl.core.trainers.dpo.args import AxolotlDPOConfig
    from axolotl.utils.dict import DictDefault
    from tiny_trl import tokenizer  # of fewer tokens than the models have embeddings

    from focalpo_plugins.axolotl import FocalPOPlugin
    from focalpo_plugins.axolotl.trainer import AxolotlPairwiseTrainer

    pair = {"prompt": "w0", "chosen": " w1", "rejected": " w2"}
    cfg = DictDefault({"focalpo_rl": "focalpo"})
    return AxolotlPairwiseTrainer(
        one_batch.model(1),
        one_batch.model(2),
        args=AxolotlDPOConfig(
            str(tmp_path_factory.mktemp("one_batch")),
            beta=one_batch.BETA,
            use_cpu=True,
            bf16=False,
            report_to="none",
        ),
        train_dataset=Dataset.from_list([pair]),
        processing_class=tokenizer(),
        # Axolotl gives the callbacks of this package's plugin to its trainer in this way.
        callbacks=FocalPOPlugin().add_callbacks_pre_trainer(cfg, None),
    )


def inputs(rows: list[int]) -> dict[str, torch.Tensor]:
    """The rows as TRL's collator lays them out: chosen first, padded on the right."""
    pairs = [one_batch.sequences()[row] for row in rows]
    flat = [
        (prompt, answer) for side in (1, 2) for prompt, answer in ((p[0], p[side]) for p in pairs)
    ]
    width = max(len(prompt) + len(answer) for prompt, answer in flat)

    def padded(row: list[int]) -> list[int]:
        return row + [one_batch.PAD] * (width - len(row))

    return {
        "input_ids": torch.tensor([padded([*p, *a]) for p, a in flat]),
        "attention_mask": torch.tensor([padded([1] * len([*p, *a])) for p, a in flat]),
        "completion_mask": torch.tensor([padded([0] * len(p) + [1] * len(a)) for p, a in flat]),
    }


@one_batch.LOSSES
def test_losses_and_gradients(trainer, monkeypatch, options: dict, label_smoothing: float):
    trainer.set_loss(get_loss("focalpo").bind(**options))
    trainer.label_smoothing = label_smoothing
    seen: list[torch.Tensor] = []
    count = trainer._count
    monkeypatch.setattr(trainer, "_count", lambda z: (z.retain_grad(), seen.append(z), count(z)))

    def step(rows: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        loss = trainer.compute_loss(trainer.model, inputs(rows))
        loss.backward()
        return loss, seen[-1], seen[-1].grad

    one_batch.check_losses_and_gradients(step, options, label_smoothing)
