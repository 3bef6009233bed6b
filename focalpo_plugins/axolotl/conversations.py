"""Conversations as Axolotl trains them, and as the chat template renders them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from inspect import signature
from typing import Any

from ..guards import pairs, texts
from ..guards.faults import Fault
from ..yaml_keys import MARGIN
from .sources import TEMPLATE, Source, listed

# Why an answer is trained as other text, and what to do.
_OF_SIDES = "Axolotl trains the rejected answer after the chosen side's turns"
_OF_CUT = (
    "Axolotl looks for the answer's text in the rendering, and misses it if the template trims "
    "white space, rewrites reasoning, or contains the same words itself. Remove white space at the "
    "ends of the answers, or use another template"
)
# The types that read conversations; the others write a user's own format, or none.
_OF_CHAT = ("chat_template.", "chatml.", "llama3.")


def text_faults(
    cfg: Any, tokenizer: Any, evaluation: bool = False, marker: str | None = None
) -> list[Fault]:
    """The faults of rows that Axolotl would train differently from the chat template.

    Args:
        cfg: a validated config.
        evaluation: whether to check ``test_datasets`` instead of ``datasets``.
        marker: as in :func:`~focalpo_plugins.guards.texts.find`.
    """
    # Axolotl takes the names of columns, for test_datasets too, from the entries of datasets.
    of_columns = list(listed(cfg, "datasets"))
    found = listed(cfg, "test_datasets") if evaluation else of_columns
    # Axolotl stops at one that has no such entry.
    both = zip(found, enumerate(of_columns), strict=False)
    return texts.find(
        (row for source, columns in both for row in _rendered(source, *columns, tokenizer)),
        host="Axolotl",
        of_sides=_OF_SIDES,
        of_cut=_OF_CUT,
        marker=marker,
        evaluation=evaluation,
    )


def _rendered(source: Source, number: int, columns: Source, tokenizer: Any) -> Iterator[texts.Row]:
    """Rows spread over the data: their texts as Axolotl trains them, and as the template renders
    them.

    Args:
        number: the number of the entry whose names of columns are used.
        columns: that entry.
    """
    from axolotl.prompt_strategies.dpo import load as load_dpo
    from axolotl.prompt_strategies.orpo import load as load_orpo

    cfg, kind = source.cfg, source.entry.get("type")
    if not isinstance(kind, str) or not kind.startswith(_OF_CHAT):
        return
    load = load_orpo if "orpo" in (cfg.get("rl"), cfg.get(MARGIN)) else load_dpo
    transform = load(kind, cfg, dataset_idx=number)
    transform = transform[0] if isinstance(transform, tuple) else transform
    if "tokenizer" in signature(transform).parameters:
        transform = partial(transform, tokenizer=tokenizer)
    try:
        rows, whole = source.rows, _whole(cfg, columns.entry, kind, tokenizer)
    except Exception:  # the host reports it, or has its own copy of rows that are gone
        return
    for place, row in pairs.sampled(rows):
        try:
            chosen, rejected = whole(row, "chosen"), whole(row, "rejected")
            trained = transform(dict(row))
        except Exception:  # the template can't render the row: the host reports it
            continue
        prompt = trained["prompt"]
        if isinstance(prompt, str):  # else messages, which TRL renders
            yield texts.Row(
                f"row {place} of {source.key} {source.path!r}",
                texts.Side(prompt, trained["chosen"], chosen[1], chosen[2]),
                texts.Side(prompt, trained["rejected"], rejected[1], rejected[2]),
                turns_differ=chosen[0] != rejected[0],
            )


def _whole(
    cfg: Any, dataset: Any, kind: str, tokenizer: Any
) -> Callable[[Mapping[str, Any], str], tuple[list[dict[str, Any]], str, str | None]]:
    """A function of a row and a side: all messages but the last, what the last one says, and what
    the template renders of all of them; None if the type writes its own format."""
    from axolotl.utils.chat_templates import extract_chat_template_args, get_chat_template
    from axolotl.utils.schemas.utils import handle_legacy_message_fields_logic

    dataset = handle_legacy_message_fields_logic(dataset)
    own_format = not kind.startswith("chat_template.")
    of_orpo, of_prompt = kind.endswith(".argilla"), kind == TEMPLATE
    choice = extract_chat_template_args(cfg=cfg, ds_cfg=None if of_orpo else dataset)
    template = None if own_format else get_chat_template(*choice, tokenizer=tokenizer)
    names = dict(dataset.get("message_property_mappings") or {})
    names = {"role": "role", "content": "content", **names}
    roles = {
        source: role for role, sources in (dataset.get("roles") or {}).items() for source in sources
    }

    def messages(value: Any, role: str) -> list[dict[str, Any]]:
        if isinstance(value, str):
            return [{"role": role, "content": value}]
        found = []
        for message in [value] if isinstance(value, Mapping) else value:
            mapped = {to: message[name] for to, name in names.items() if name in message}
            found.append({**mapped, "role": roles.get(mapped["role"], mapped["role"])})
        return found

    def whole(row: Mapping[str, Any], side: str) -> tuple[list[dict[str, Any]], str, str | None]:
        said = messages(row[dataset.get(f"field_{side}") or side], "assistant")
        # An answer may also be a whole conversation, which begins with its prompt.
        if of_prompt and said[0]["role"] == "assistant":
            said = [*messages(row[dataset.get("field_messages") or "messages"], "user"), *said]
        if of_orpo and row.get("system"):
            said = [*messages(row["system"], "system"), *said]
        rendered = None
        if not own_format:
            rendered = tokenizer.apply_chat_template(said, chat_template=template, tokenize=False)
        return said[:-1], said[-1]["content"], rendered

    return whole
