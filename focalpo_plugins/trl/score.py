"""Log-probabilities of preference pairs, with TRL's own preparation of the data.

A ``DPOTrainer`` is built and never trained: what it makes of the data set, and its collator, are
what a run would have trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import load_dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


class PairScorer:
    """The pairs of a preference file under two models.

    Args:
        policy: folder or hub name of the model.
        reference: the same of the reference model.
        data: a preference file with ``chosen`` and ``rejected``, and ``prompt`` unless it is the
            start of both; each a text or a list of messages.
        max_length: tokens that a sequence is cut to, as TRL does; None cuts nothing.
        dtype: of the weights, ``auto`` for that which they are saved in.

    Attributes:
        rows: the numbers of the file's rows that TRL keeps, from 0; with ``max_length`` it drops
            those whose prompt fills it.
        total: rows in the file.

    Raises:
        ValueError: the file's format, its columns or the tokenizer won't do.
        OSError: a model can't be loaded.
    """

    def __init__(
        self, policy: str, reference: str, data: Path, *, max_length: int | None, dtype: str
    ) -> None:
        pairs = _pairs(data)
        tokenizer = _tokenizer(policy, reference)
        cpu = not torch.cuda.is_available()
        models = [
            AutoModelForCausalLM.from_pretrained(name, dtype=dtype) for name in (policy, reference)
        ]
        with TemporaryDirectory() as folder:
            config = DPOConfig(
                output_dir=folder, max_length=max_length, bf16=False, use_cpu=cpu, report_to=[]
            )
            trainer = DPOTrainer(
                models[0],
                models[1],
                args=config,
                train_dataset=pairs,
                processing_class=tokenizer,
            )
        self._pairs, self._collate = trainer.train_dataset, trainer.data_collator
        self._models = [trainer.model.eval(), trainer.ref_model.eval()]
        self._device = trainer.accelerator.device
        self.total = len(pairs)
        self.rows: list[int] = list(self._pairs["row"])

    def score(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        """For each position in :attr:`rows`, the answers' summed log-probabilities, in nats."""
        batch = self._collate([self._pairs[position] for position in positions])
        mask = batch["completion_mask"][:, 1:]
        columns: dict[str, Tensor] = {}
        lengths = mask.sum(-1).chunk(2)
        for prefix, model in zip(("", "ref_"), self._models, strict=True):
            sums = self._log_probs(model, batch, mask).chunk(2)
            columns |= {f"{prefix}chosen_logp": sums[0], f"{prefix}rejected_logp": sums[1]}
        columns |= {"chosen_tokens": lengths[0], "rejected_tokens": lengths[1]}
        values = zip(*(column.tolist() for column in columns.values()), strict=True)
        return [
            {"row": self.rows[position], **dict(zip(columns, found, strict=True))}
            for position, found in zip(positions, values, strict=True)
        ]

    @torch.no_grad()
    def _log_probs(self, model: Any, batch: dict[str, Tensor], mask: Tensor) -> Tensor:
        """``(2B,)``, in float64: summed over the answer's tokens, the chosen answers first."""
        ids = batch["input_ids"].to(self._device)
        attention = batch["attention_mask"].to(self._device)
        logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1]
        # A row at a time: the logits in float32 are the largest thing here by far.
        found = [
            row.float().log_softmax(-1).gather(-1, label[:, None]).squeeze(-1)
            for row, label in zip(logits, ids[:, 1:], strict=True)
        ]
        picked = torch.stack(found).cpu().double()
        return torch.where(mask.bool(), picked, 0.0).sum(-1)


def _pairs(data: Path) -> Any:
    if data.suffix not in _FORMATS:
        raise ValueError(
            f"DATA must end in {', '.join(_FORMATS)}, got {str(data)!r}: convert it to one of them."
        )
    try:
        with TemporaryDirectory() as cache:
            loaded = load_dataset(
                _FORMATS[data.suffix], data_files=str(data), split="train", cache_dir=cache,
                keep_in_memory=True,
            )  # fmt: skip
    except Exception as error:  # the readers raise errors of many kinds
        why = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"DATA must be a preference file, got {str(data)!r}: {why}") from None
    missing = {"chosen", "rejected"} - set(loaded.column_names)
    if missing or len(loaded) == 0:
        raise ValueError(
            f"DATA must have rows with chosen and rejected, got {str(data)!r} with {len(loaded)} "
            f"rows of {', '.join(loaded.column_names) or 'nothing'}. Rename its columns."
        )
    keep = [c for c in ("prompt", "chosen", "rejected") if c in loaded.column_names]
    return loaded.select_columns(keep).add_column("row", list(range(len(loaded))))


def _tokenizer(policy: str, reference: str) -> PreTrainedTokenizerBase:
    """The reference's tokenizer where it has one, else the policy's; they have to agree."""
    found = []
    for name in (reference, policy):
        try:
            found.append(AutoTokenizer.from_pretrained(name))
        except (OSError, ValueError):
            continue
    if not found:
        raise ValueError(f"neither {policy} nor {reference} has a tokenizer.")
    if len(found) == 2 and found[0].get_vocab() != found[1].get_vocab():
        raise ValueError(
            f"MODEL and --ref must have one vocabulary, got {policy!r} and {reference!r}, which "
            "differ: a reward compares the two on the same tokens."
        )
    return found[-1]
