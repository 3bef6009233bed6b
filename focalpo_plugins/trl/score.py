"""Log-probabilities of preference pairs, with TRL's own preparation of the data.

A ``DPOTrainer`` is built with a stand-in for the model, and never trained.  Its prepared data set
and its collator give the batches that a run would have trained on.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets, load_dataset
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers import logging as transformers_logging
from transformers.utils import find_adapter_config_file
from trl import DPOConfig, DPOTrainer, extract_prompt

from ..errors import InvalidValue
from .stand_in import stand_in

_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_UNDERSTOOD = (
    "chosen and rejected as texts or as lists of messages (role and content), and prompt, a text "
    "or messages, unless it is the start of both"
)
# Columns that Axolotl's strategies put into a prompt with their own templates.
_OTHER_PROMPTS = ("instruction", "input", "question", "system", "conversations")
# Columns of TRL's other data forms: TRL's test for conversations may read them, not the pair's.
_OTHER_FORMS = ("messages", "completion")
_NAMED = 3  # weights in a message


@dataclass(frozen=True)
class Source:
    """A model to load.

    Attributes:
        name: folder or hub name of the model, or of an adapter if ``base`` is set.
        base: folder or hub name of the model that the adapter is loaded over.
        note: a remark for the user.
    """

    name: str
    base: str | None = None
    note: str = ""


def resolve(policy: str, reference: str) -> tuple[Source, Source]:
    """Tell adapters from whole models, and find the base model of each adapter.

    The base is the model that the adapter's config names, or the reference if that is missing.

    Raises:
        ValueError: an adapter has no base.
    """
    ref = _resolve(reference, "--ref", None)
    return _resolve(policy, "MODEL", None if ref.base else ref.name), ref


def _resolve(name: str, role: str, otherwise: str | None) -> Source:
    try:
        path = find_adapter_config_file(name)
    except (OSError, ValueError):  # not a hub's name: the error comes when it is loaded
        path = None
    if path is None:
        return Source(name)
    try:
        named = json.loads(Path(path).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InvalidValue(
            f"{role} must be a model or an adapter, got {name!r}, whose adapter_config.json can't "
            "be read or names no base_model_name_or_path."
        ) from None
    if named and _is_there(named):
        if find_adapter_config_file(named) is not None:
            raise InvalidValue(
                f"{role} must be an adapter of a whole model, got {name!r}, whose base {named!r} "
                "is an adapter itself. Merge that one into its model first."
            )
        return Source(name, named, f"{role} is an adapter, loaded over {named}, which it names")
    if otherwise is None:
        raise InvalidValue(
            f"{role} must be a model, or an adapter whose base is there, got {name!r}, an adapter "
            f"of {named!r}, which is not. Change base_model_name_or_path in its "
            "adapter_config.json, or give a whole model as --ref."
        )
    why = f"the base that it names, {named}, is not there"
    return Source(name, otherwise, f"{role} is an adapter, loaded over --ref {otherwise}: {why}")


def _is_there(name: str) -> bool:
    if Path(name).is_dir():
        return True
    try:
        AutoConfig.from_pretrained(name)
    except Exception:  # not a hub's name, not on the hub, or no connection
        return False
    return True


class PairScorer:
    """The pairs of a preference file under two models.

    Args:
        policy: folder or hub name of the model, or of an adapter; see :func:`resolve`.
        reference: the same of the reference model.
        data: a preference file with ``chosen`` and ``rejected``, and ``prompt`` unless it is the
            start of both; each is a text or a list of messages. A text ``prompt`` beside whole
            conversations is left out, and beside answers alone it is the user's message.
        max_length: tokens that a sequence is cut to, as TRL does; None cuts nothing.
        dtype: dtype of the weights; ``auto`` for the one in which they are saved.

    Attributes:
        rows: the numbers of the file's rows that TRL keeps, from 0; TRL drops rows whose prompt
            fills ``max_length``.
        total: number of rows in the file.
        form: how the pairs were read, for the user.

    Raises:
        ValueError: the file's format, its columns or a row can't be used; a model can't be loaded,
            lacks weights, or has other ones; or the two have different vocabularies.
    """

    def __init__(
        self, policy: str, reference: str, data: Path, *, max_length: int | None, dtype: str
    ) -> None:
        sources = resolve(policy, reference)
        pairs, self.form = _pairs(data)
        self.total = len(pairs)
        # A name that no column of the file has.
        row = "row"
        while row in pairs.column_names:
            row += "_"
        pairs = pairs.add_column(row, list(range(self.total)))
        tokenizer = _tokenizer(*sources)
        trainer: Any = _trainer(pairs, tokenizer, max_length, str(data))
        self._pairs = trainer.train_dataset
        self._collate = trainer.data_collator
        self._device = trainer.accelerator.device
        self.rows: list[int] = list(self._pairs[row])
        self._models = [
            _model(source, role, dtype).to(self._device).eval()
            for source, role in zip(sources, ("MODEL", "--ref"), strict=True)
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


def _trainer(
    pairs: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None, data: str
) -> DPOTrainer:
    """A trainer with a tiny model: how TRL prepares the data doesn't depend on the model."""
    with TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder,
            max_length=max_length,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
        )
        try:
            return DPOTrainer(
                stand_in(len(tokenizer)),
                stand_in(len(tokenizer)),
                args=config,
                train_dataset=pairs,
                processing_class=tokenizer,
            )
        except Exception as error:  # a chat template can raise any error
            raise InvalidValue(
                f"DATA must be pairs that TRL {version('trl')} can prepare, got {data!r}: "
                f"{_one_line(error)}"
            ) from error


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _model(source: Source, role: str, dtype: str) -> Any:
    """The model; its weights and the weights in its files must be the same set."""
    verbosity = transformers_logging.get_verbosity()
    # Our error replaces transformers' table of missing weights.
    transformers_logging.set_verbosity_error()
    try:
        name = source.base or source.name
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
        model, info = loaded
        what = type(model).__name__
        wrong = {
            "lack": list(info["missing_keys"]),
            "have besides": list(info["unexpected_keys"]),
            "have in another shape": [key for key, *_ in info["mismatched_keys"]],
        }
        if source.base and not any(wrong.values()):
            name, what = source.name, "adapter"
            model, wrong["lack"], wrong["have besides"] = _with_adapter(model, name)
    except Exception as error:  # broken files raise errors of many kinds
        lines = str(error).splitlines() if isinstance(error, OSError) else []
        why = lines[0] if lines else _one_line(error)
        raise InvalidValue(
            f"{role} must be a model that can be loaded, got {source.name!r}: {why}"
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    if any(wrong.values()):
        found = [f"{verb} {_listed(keys)}" for verb, keys in wrong.items() if keys]
        raise InvalidValue(
            f"{role} must have the weights of its {what} and no others, got {name!r}, whose files "
            f"{' and '.join(found)}: missing weights would be random. Give a whole model, or the "
            "folder of an adapter."
        )
    return model


def _listed(keys: list[str]) -> str:
    few = sorted(keys)[:_NAMED]
    return f"{len(keys)} ({', '.join(few)}{', ...' * (len(keys) > len(few))})"


def _with_adapter(model: Any, name: str) -> tuple[Any, list[str], list[str]]:
    """The adapter over its base, the weights its files lack, and the unexpected ones in them."""
    try:
        from peft import PeftConfig, get_peft_model
        from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
    except ImportError:
        raise InvalidValue(
            "it is an adapter, which needs peft, and that is not installed: pip install peft."
        ) from None
    config = PeftConfig.from_pretrained(name)
    if config.is_prompt_learning:
        raise InvalidValue(
            f"it is a {config.peft_type.value} adapter, which puts tokens of its own before a "
            "text, and only adapters on the model's layers can be scored."
        )
    config.inference_mode = False  # the files have to hold the weights that the adapter trains
    model = get_peft_model(model, config)
    trained = {key for key, weight in model.named_parameters() if weight.requires_grad}
    found: Any = set_peft_model_state_dict(model, load_peft_weights(name, device="cpu"))
    return model, sorted(trained & set(found.missing_keys)), list(found.unexpected_keys)


def _tokenizer(policy: Source, reference: Source) -> PreTrainedTokenizerBase:
    """The policy's tokenizer if it has one, else the reference's; their vocabularies must agree."""
    found = [each for each in (_own_tokenizer(policy), _own_tokenizer(reference)) if each]
    if not found:
        raise InvalidValue(f"neither {policy.name} nor {reference.name} has a tokenizer.")
    if len(found) == 2 and found[0].get_vocab() != found[1].get_vocab():
        raise InvalidValue(
            f"MODEL and --ref must have one vocabulary, got {policy.name!r} and "
            f"{reference.name!r}, which differ: a reward compares the two on the same tokens."
        )
    return found[0]


def _own_tokenizer(source: Source) -> PreTrainedTokenizerBase | None:
    for name in (source.name, source.base):
        if name is not None:
            try:
                return AutoTokenizer.from_pretrained(name)
            except Exception:  # it has no tokenizer: the kind of error depends on its files
                continue
    return None


def _pairs(data: Path) -> tuple[Dataset, str]:
    """The file's rows as TRL's DPO takes them, and how they were read.

    All columns are kept, because TRL puts some others into the prompt too (``tools``).
    """
    loaded = _read(data)
    columns = loaded.column_names
    if {"chosen", "rejected"} - set(columns) or len(loaded) == 0:
        raise InvalidValue(
            f"DATA must have rows with chosen and rejected, got {str(data)!r} with {len(loaded)} "
            f"rows of {', '.join(columns) or 'nothing'}. Rename its columns; read are "
            f"{_UNDERSTOOD}."
        )
    for column in ("image", "images"):
        if column in columns:
            raise InvalidValue(
                f"DATA must be pairs of texts, got {str(data)!r} with the column {column}: what a "
                "model of images makes of a pair can't be scored."
            )
    asked = next((column for column in ("prompt", "messages") if column in columns), None)
    named = ["chosen", "rejected", *([asked] if asked else [])]
    rows: list[_Row] = []
    as_it_is = True  # then TRL prepares the file as it does in training
    for number, row in enumerate(loaded.select_columns(named)):
        try:
            rows.append(_row(row, asked))
            if rows[-1].texts != rows[0].texts:
                raise InvalidValue(
                    "has texts where row 0 has messages, or messages where it has texts"
                )
        except ValueError as error:
            raise InvalidValue(
                f"DATA must hold a pair in each row, got {str(data)!r}, where row {number} (the "
                f"first is 0) {error}. Fix that row, or remove it."
            ) from None
        as_it_is = as_it_is and rows[-1] == _seen_by_trl(row)
    texts = rows[0].texts
    other = [column for column in _OTHER_PROMPTS if column in columns]
    if texts and asked is None and other:
        raise InvalidValue(
            f"DATA must have a prompt, got {str(data)!r} with {other[0]} in place of it, which "
            "Axolotl puts into a template of its own: write what it makes of a row into prompt, "
            f"chosen and rejected. Read are {_UNDERSTOOD}."
        )
    if not as_it_is:
        pair = ("prompt", "chosen", "rejected")
        read = Dataset.from_dict({name: [getattr(row, name) for row in rows] for name in pair})
        rest = loaded.remove_columns(named)
        loaded = concatenate_datasets([read, rest], axis=1) if rest.column_names else read
    form = "texts as they are" if texts else "conversations by the chat template"
    notes = sorted({row.note for row in rows if row.note})
    return (
        loaded.remove_columns([c for c in _OTHER_FORMS if c in loaded.column_names]),
        "; ".join([form, *notes]),
    )


def _read(data: Path) -> Dataset:
    if data.suffix not in _FORMATS:
        raise InvalidValue(
            f"DATA must end in {', '.join(_FORMATS)}, got {str(data)!r}: convert it to one of them."
        )
    try:
        if data.suffix == ".csv":
            import pandas

            # As str, because an answer of digits is a text.
            return Dataset.from_pandas(pandas.read_csv(data, dtype=str), preserve_index=False)
        with TemporaryDirectory() as cache:
            named = Path(cache, f"data{data.suffix}")  # `data_files` is a pattern, and a path isn't
            named.symlink_to(data.absolute())
            return load_dataset(
                _FORMATS[data.suffix], data_files=glob.escape(str(named)), split="train",
                cache_dir=cache, keep_in_memory=True,
            )  # fmt: skip
    except Exception as error:  # the readers raise errors of many kinds
        if isinstance(error.__cause__ or error, OSError):  # of the machine, not of what is in it
            raise
        why = " ".join(str(error.__cause__ or error).split())
        raise InvalidValue(f"DATA must be a preference file, got {str(data)!r}: {why}") from None


@dataclass
class _Row:
    """A pair; ``prompt`` is None if TRL has to find it in the two texts."""

    prompt: Any
    chosen: Any
    rejected: Any
    note: str = field(default="", compare=False)

    @property
    def texts(self) -> bool:
        return isinstance(self.chosen, str)


def _row(row: Mapping[str, Any], asked: str | None) -> _Row:
    """The pair of a row, in the form in which one of the hosts trains on it.

    Args:
        asked: the column beside ``chosen`` and ``rejected`` that may hold the prompt.

    Raises:
        ValueError: the row holds no pair; the message continues a text such as "row 3".
    """
    chosen, rejected = (_content(side, row[side]) for side in ("chosen", "rejected"))
    texts = isinstance(chosen, str)
    if texts != isinstance(rejected, str):
        raise InvalidValue("has a text as one answer and messages as the other")
    whole = 0 if texts else _common_start(chosen, rejected)
    if whole and not (asked == "prompt" and isinstance(row[asked], list)):
        note = "the prompt is their common start, and the column prompt is not used"
        note = note if asked == "prompt" else ""
        return _Row(chosen[:whole], chosen[whole:], rejected[whole:], note)
    if asked is None:
        if not texts:
            raise InvalidValue("has no prompt: its two conversations begin with different messages")
        if not (chosen and rejected):
            raise InvalidValue("has an empty text as an answer, and no prompt")
        return _Row(None, chosen, rejected)
    prompt = _content(asked, row[asked])
    if texts and asked == "prompt" and isinstance(prompt, str):
        return _Row(prompt, chosen, rejected)
    note = "the prompt is messages" if asked == "messages" else ""
    if isinstance(prompt, str):
        prompt, note = [{"role": "user", "content": prompt}], f"{asked} is the user's message"
    if texts:
        chosen, rejected = ([{"role": "assistant", "content": it}] for it in (chosen, rejected))
    return _Row(prompt, chosen, rejected, note)


def _content(column: str, value: Any) -> Any:
    """A cell's text or messages; a single message becomes a list."""
    if value is None:
        raise InvalidValue(
            f"has nothing in {column} (in a CSV, an empty cell, None and NA are read as nothing)"
        )
    if isinstance(value, str):
        return value
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list):
        raise InvalidValue(f"has {value!r} in {column}, which is no text and no list of messages")
    if not messages:
        raise InvalidValue(f"has no message in {column}")
    for message in messages:
        held = (
            []
            if not isinstance(message, dict)
            else [k for k, v in message.items() if v is not None]
        )
        if "role" not in held or len(held) < 2:
            raise InvalidValue(
                f"has {message!r} in {column}, which is no message with a role and a content"
            )
    return messages


def _common_start(chosen: list[Any], rejected: list[Any]) -> int:
    """Number of messages that both conversations begin with, without the last one of each."""
    count = 0
    for pair in zip(chosen[:-1], rejected[:-1], strict=False):
        # In a table, a key that a message lacks is None if another message has it.
        ours, theirs = ({k: v for k, v in m.items() if v is not None} for m in pair)
        if ours != theirs:
            break
        count += 1
    return count


def _seen_by_trl(row: Mapping[str, Any]) -> _Row:
    sides: dict[str, Any] = {side: row[side] for side in ("chosen", "rejected")}
    if "prompt" not in row and all(isinstance(messages, list) for messages in sides.values()):
        extracted: dict[str, Any] = extract_prompt(sides)
        return _Row(**extracted)
    return _Row(row.get("prompt"), **sides)
