"""What the rows of a config's data look like to Axolotl, and why it could not read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from inspect import signature
from itertools import islice
from pathlib import Path
from typing import Any

from ..guards import jsonl, pairs, texts
from ..guards.last_line import modules_of
from ..guards.rows import (
    CONVERSATIONS,
    MESSAGES,
    ONE_MESSAGE,
    PROMPT_BESIDE,
    STRINGS,
    TEXTS,
    Look,
    look,
)
from . import ALLOW_DATA, MARGIN

_TEMPLATE = "chat_template.default"
_TYPES = {
    CONVERSATIONS: "chat_template.argilla_chat",
    PROMPT_BESIDE: "chat_template.argilla_chat",
    MESSAGES: _TEMPLATE,
    ONE_MESSAGE: _TEMPLATE,
    STRINGS: _TEMPLATE,
    TEXTS: "passthrough",
}
# Why an answer is trained as other text, and what to do.
_OF_SIDES = "Axolotl trains the rejected answer after the chosen side's turns"
_OF_CUT = (
    "Axolotl looks for the answer's text in the rendering, and misses it if the template trims "
    "white space or rewrites reasoning, or if the template itself has the same words. Remove white "
    "space at the ends of the answers, or use another template"
)
# The types that read conversations; the others write a user's own format, or none.
_OF_CHAT = ("chat_template.", "chatml.", "llama3.")
# Axolotl has no other type under `rl: orpo`.
_OF_ORPO = {CONVERSATIONS: "chat_template.argilla", PROMPT_BESIDE: "chat_template.argilla"}


def explain(cfg: Any, error: BaseException) -> str | None:
    """Explain an error that was raised while Axolotl, or TRL for it, read the data.

    None if the error came from elsewhere, or if the rows fit their ``type``.
    """
    reading = any(
        module.startswith(("axolotl.utils.data", "axolotl.common.datasets"))
        or (module.startswith("trl.") and function == "_prepare_dataset")
        for module, function in modules_of(error)
    )
    if not reading:
        return None
    found = [_mismatch(cfg, key, dataset) for key, dataset in _listed(cfg)]
    if not any(found):  # an answer that was cut to nothing stops Axolotl as a missing one does
        found = [fault.words for fault in _faults_as_written(cfg)]
    return "; ".join(filter(None, found)) or None


def described(cfg: Any) -> list[str]:
    """A line for each dataset: its rows, their format, and the ``type`` that reads it."""
    looks = ((key, _look(cfg, dataset, 1)) for key, dataset in _listed(cfg))
    return [
        seen.line(key, f"{seen.format}, for {_advice(seen, cfg)}") for key, seen in looks if seen
    ]


def hub_names(cfg: Any) -> dict[str, str]:
    """The names in the config that may come from a hub, by key."""
    keys = ("base_model", "tokenizer_config", "base_model_config")
    names = {key: str(cfg[key]) for key in keys if cfg.get(key)}
    return names | {f"{key}.path": str(dataset.get("path")) for key, dataset in _listed(cfg)}


def faults(
    cfg: Any, tokenizer: Any, key: str = "datasets", marker: str | None = None
) -> list[texts.Fault]:
    """What Axolotl would train of the rows otherwise than the chat template renders it.

    Args:
        cfg: a validated config.
        key: ``datasets`` or ``test_datasets``.
        marker: as in :func:`~focalpo_plugins.guards.texts.find`.
    """
    return texts.find(
        _rendered(cfg, tokenizer, key),
        host="Axolotl",
        of_sides=_OF_SIDES,
        of_cut=_OF_CUT,
        allow=f"{ALLOW_DATA}: true",
        marker=marker,
    )


def _faults_as_written(cfg: Any) -> list[texts.Fault]:
    """The faults of a config that was not validated; none if Axolotl can't use it so."""
    from axolotl.loaders import load_tokenizer
    from axolotl.utils.dict import DictDefault

    try:
        return faults(DictDefault(cfg), load_tokenizer(DictDefault(cfg)))
    except Exception:
        return []


def _rendered(cfg: Any, tokenizer: Any, key: str) -> Iterator[texts.Row]:
    """Rows spread over the data: their texts as Axolotl trains them, and as the template renders
    them."""
    from axolotl.prompt_strategies.dpo import load as load_dpo
    from axolotl.prompt_strategies.orpo import load as load_orpo

    load = load_orpo if "orpo" in (cfg.get("rl"), cfg.get(MARGIN)) else load_dpo
    # Axolotl takes the names of columns, for test_datasets too, from the entries of datasets.
    of_data = [dataset for _, dataset in _listed(cfg, "datasets")]
    for number, (name, dataset) in enumerate(_listed(cfg, key)):
        kind = dataset.get("type")
        if number >= len(of_data) or not isinstance(kind, str) or not kind.startswith(_OF_CHAT):
            continue
        transform = load(kind, cfg, dataset_idx=number)
        transform = transform[0] if isinstance(transform, tuple) else transform
        try:
            rows, whole = _table(cfg, dataset), _whole(cfg, of_data[number], kind, tokenizer)
        except Exception:  # the host reports it, or has its own copy of rows that are gone
            continue
        if "tokenizer" in signature(transform).parameters:
            transform = partial(transform, tokenizer=tokenizer)
        path = f"{name}.path {str(dataset.get('path'))!r}"
        for place in pairs.places(len(rows)):
            row = rows[place]
            try:
                chosen, rejected = whole(row, "chosen"), whole(row, "rejected")
                trained = transform(dict(row))
            except Exception:  # the template can't render the row: the host reports it
                continue
            prompt = trained["prompt"]
            if isinstance(prompt, str):  # else messages, which TRL renders
                yield texts.Row(
                    f"row {place} of {path}",
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
    of_orpo, of_prompt = kind.endswith(".argilla"), kind == _TEMPLATE
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


def _listed(cfg: Any, *keys: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for key in keys or ("datasets", "test_datasets"):
        listed = cfg.get(key)
        for number, dataset in enumerate(listed if isinstance(listed, list) else []):
            if isinstance(dataset, Mapping):
                yield f"{key}[{number}]", dataset


def _look(cfg: Any, dataset: Mapping[str, Any], rows: int | None = None) -> Look | None:
    names = {
        name: dataset.get(f"field_{field}") for name, field in
        (("chosen", "chosen"), ("rejected", "rejected"), ("prompt", "messages"))
    }  # fmt: skip
    try:
        return look(islice(_rows(cfg, dataset), rows), **{k: v for k, v in names.items() if v})
    except Exception:  # the rows can't be read: the host reports it
        return None


def _rows(cfg: Any, dataset: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    path = Path(str(dataset.get("path")))
    if path.suffix in jsonl.SUFFIXES and path.is_file():
        return jsonl.rows(path)
    return iter(_table(cfg, dataset))


def _table(cfg: Any, dataset: Mapping[str, Any]) -> Any:
    """The rows as Axolotl loads them, by number."""
    from axolotl.utils.data.shared import load_dataset_with_config
    from axolotl.utils.dict import DictDefault

    loaded = load_dataset_with_config(DictDefault(dataset), bool(cfg.get("hf_use_auth_token")))
    return next(iter(loaded.values())) if isinstance(loaded, dict) else loaded


def _mismatch(cfg: Any, key: str, dataset: Mapping[str, Any]) -> str | None:
    seen = _look(cfg, dataset)
    if seen is None:
        return None
    start = (
        f"{key}.path {str(dataset.get('path'))!r}: its first row has {seen.words}, and type is "
        f"{dataset.get('type')}"
    )
    fitting = _fitting(seen, cfg)
    fits = bool(fitting) and all(
        value in (dataset.get(name), cfg.get(name)) for name, value in fitting.items()
    )
    fits = fits or (seen.format == STRINGS and dataset.get("type") == "passthrough")
    why = seen.mismatch(start, fits, f"set {_advice(seen, cfg)}")
    if why is not None and fits and str(dataset.get("path")).endswith(".csv"):
        why += " In a CSV, words such as None, NA and null are read as nothing."
    return why


def _fitting(seen: Look, cfg: Any) -> dict[str, Any]:
    """The keys, with their values, by which Axolotl reads rows of this format; none if no type
    does."""
    types = _OF_ORPO if cfg.get(MARGIN) == "orpo" else _TYPES
    if seen.format not in types:
        return {}
    fitting: dict[str, Any] = {"type": types[seen.format]}
    if seen.format == TEXTS:
        fitting["skip_prepare_dataset"] = True  # what would be prepared has to have a prompt
    if fitting["type"] == _TEMPLATE and seen.prompt != "messages":
        fitting["field_messages"] = str(seen.prompt)
    if fitting["type"] != "passthrough" and not cfg.get("chat_template"):
        fitting["chat_template"] = "tokenizer_default"
    return fitting


def _advice(seen: Look, cfg: Any) -> str:
    fitting = _fitting(seen, cfg)
    said = " and ".join(
        f"{name}: {str(v).lower() if v is True else v}" for name, v in fitting.items()
    )
    if not said:
        return "type: chat_template.argilla, once they are made whole conversations"
    plain = ", or type: passthrough for a model without a chat template"
    return said + plain * (seen.format == STRINGS)
