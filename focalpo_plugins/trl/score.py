"""Log-probabilities of preference pairs, with TRL's own preparation of the data.

A ``DPOTrainer`` is built with a stand-in for the model, and never trained.  Its prepared data set
and its collator give the batches that a run would have trained on.  If TRL is too old for that,
:mod:`~focalpo_plugins.trl.score_rows` does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import trl
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import InvalidValue
from .score_data import read_pairs
from .score_models import Source, load_model, tokenizer_of
from .score_rows import Collator, by_template, trl_has_it
from .stand_in import stand_in


class PairScorer:
    """The pairs of a preference file under two models.

    Args:
        policy: the model, as :func:`~focalpo_plugins.trl.score_models.resolve` finds it.
        reference: the reference model.
        data: a preference file with ``chosen`` and ``rejected``, and ``prompt`` unless it is the
            start of both; each is a text or a list of messages. A text ``prompt`` beside whole
            conversations is left out; beside answers it is the user's message.
        max_length: tokens that a sequence is cut to, as TRL does; None cuts nothing.
        dtype: dtype of the weights; ``auto`` for the one they are saved in.

    Attributes:
        rows: the numbers of the file's rows that TRL keeps, from 0; TRL drops rows whose prompt
            fills ``max_length``.
        total: number of rows in the file.
        form: how the pairs were read, for the user.

    Raises:
        ValueError: the file's format, its columns or a row can't be used; a model can't be loaded,
            or its files lack weights or hold others; or the two have different vocabularies.
    """

    def __init__(
        self, policy: Source, reference: Source, data: Path, *, max_length: int | None, dtype: str
    ) -> None:
        pairs, self.form = read_pairs(data)
        self.total = len(pairs)
        # A name that no column of the file has.
        row = "row"
        while row in pairs.column_names:
            row += "_"
        pairs = pairs.add_column(row, list(range(self.total)))
        tokenizer = tokenizer_of(policy, reference)
        prepared = _prepared(pairs, tokenizer, max_length, str(data))
        self._pairs, self._collate = prepared.rows, prepared.collate
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self.rows: list[int] = list(self._pairs[row])
        self._models = [
            load_model(source, role, dtype).to(self._device).eval()
            for source, role in ((policy, "MODEL"), (reference, "--ref"))
        ]

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
        """Log-probs ``(2B,)`` in float64, summed over the answer's tokens, chosen answers first."""
        ids = batch["input_ids"].to(self._device)
        attention = batch["attention_mask"].to(self._device)
        logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1]
        # One row at a time: the logits in float32 are by far the largest tensor here.
        found = [
            row.float().log_softmax(-1).gather(-1, label[:, None]).squeeze(-1)
            for row, label in zip(logits, ids[:, 1:], strict=True)
        ]
        picked = torch.stack(found).cpu().double()
        return torch.where(mask.bool(), picked, 0.0).sum(-1)


class _Prepared(NamedTuple):
    rows: Dataset
    collate: Callable[[list[Any]], dict[str, Tensor]]


def _prepared(
    pairs: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None, data: str
) -> _Prepared:
    if trl_has_it():
        trainer: Any = prepared_by_trl(pairs, tokenizer, max_length, data)
        return _Prepared(trainer.train_dataset, trainer.data_collator)
    with _named(data, "the chat template"):
        rows = by_template(pairs, tokenizer, max_length)
    padding = tokenizer.pad_token_id
    return _Prepared(rows, Collator(0 if padding is None else padding, max_length))


def prepared_by_trl(
    pairs: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None, data: str
) -> Any:
    """A trainer with a tiny model: how TRL prepares the data doesn't depend on the model."""
    from trl import DPOConfig, DPOTrainer

    with TemporaryDirectory() as folder, _named(data, f"TRL {trl.__version__}"):
        config = DPOConfig(
            output_dir=folder,
            max_length=max_length,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
        )
        return DPOTrainer(
            stand_in(len(tokenizer)),
            stand_in(len(tokenizer)),
            args=config,
            train_dataset=pairs,
            processing_class=tokenizer,
        )


@contextmanager
def _named(data: str, who: str) -> Iterator[None]:
    """Name the data in what is raised inside: a chat template can raise any error."""
    try:
        yield
    except Exception as error:
        raise InvalidValue(
            f"DATA must be pairs that {who} can prepare, got {data!r}: "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
