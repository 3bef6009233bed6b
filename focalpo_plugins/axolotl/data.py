"""What the rows of a config's data look like to Axolotl, and why it could not read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from ..guards import jsonl
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
from . import MARGIN

_TEMPLATE = "chat_template.default"
_TYPES = {
    CONVERSATIONS: "chat_template.argilla_chat",
    PROMPT_BESIDE: "chat_template.argilla_chat",
    MESSAGES: _TEMPLATE,
    ONE_MESSAGE: _TEMPLATE,
    STRINGS: _TEMPLATE,
    TEXTS: "passthrough",
}
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
    found = (_mismatch(cfg, key, dataset) for key, dataset in _listed(cfg))
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


def _listed(cfg: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for key in ("datasets", "test_datasets"):
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
    from axolotl.utils.data.shared import load_dataset_with_config
    from axolotl.utils.dict import DictDefault

    loaded = load_dataset_with_config(DictDefault(dataset), bool(cfg.get("hf_use_auth_token")))
    return iter(next(iter(loaded.values())) if isinstance(loaded, dict) else loaded)


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
    return seen.mismatch(start, fits, f"set {_advice(seen, cfg)}")


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
