"""The data sets that a config names, as Axolotl reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..guards import sources
from ..guards.rows import (
    CONVERSATIONS,
    MESSAGES,
    ONE_MESSAGE,
    PROMPT_BESIDE,
    STRINGS,
    TEXTS,
    Description,
)
from ..guards.sources import Advice
from ..yaml_keys import MARGIN

TEMPLATE = "chat_template.default"
_TYPES = {
    CONVERSATIONS: "chat_template.argilla_chat",
    PROMPT_BESIDE: "chat_template.argilla_chat",
    MESSAGES: TEMPLATE,
    ONE_MESSAGE: TEMPLATE,
    STRINGS: TEMPLATE,
    TEXTS: "passthrough",
}
# Axolotl has no other type under `rl: orpo`.
_OF_ORPO = {CONVERSATIONS: "chat_template.argilla", PROMPT_BESIDE: "chat_template.argilla"}


@dataclass(frozen=True)
class Source(sources.Source):
    """An entry of a config's ``datasets`` or ``test_datasets``.

    Attributes:
        entry: the entry.
        cfg: the config.
    """

    entry: Mapping[str, Any]
    cfg: Any

    def load(self) -> Any:
        from axolotl.utils.data.shared import load_dataset_with_config
        from axolotl.utils.dict import DictDefault

        token = bool(self.cfg.get("hf_use_auth_token"))
        loaded = load_dataset_with_config(DictDefault(self.entry), token)
        if not isinstance(loaded, dict):
            return loaded
        return loaded.get("train", next(iter(loaded.values())))  # "train" is Axolotl's choice

    def in_use(self) -> str:
        return f"type is {self.entry.get('type')}"

    def advice(self, rows: Description) -> Advice:
        needed = self._needed(rows)
        if not needed:
            return Advice(
                "make them whole conversations, and set type: chat_template.argilla", False
            )
        taken = all(
            value in (self.entry.get(key), self.cfg.get(key)) for key, value in needed.items()
        )
        words = " and ".join(
            f"{key}: {str(value).lower() if value is True else value}"
            for key, value in needed.items()
        )
        if rows.format == STRINGS:
            taken = taken or self.entry.get("type") == "passthrough"
            words += ", or type: passthrough for a model without a chat template"
        return Advice(f"set {words}", taken)

    def _needed(self, rows: Description) -> dict[str, Any]:
        """The keys, with their values, by which Axolotl reads such rows; none if no type does."""
        types = _OF_ORPO if self.cfg.get(MARGIN) == "orpo" else _TYPES
        if rows.format not in types:
            return {}
        needed: dict[str, Any] = {"type": types[rows.format]}
        if rows.format == TEXTS:
            needed["skip_prepare_dataset"] = True  # what would be prepared has to have a prompt
        if needed["type"] == TEMPLATE and rows.prompt != "messages":
            needed["field_messages"] = str(rows.prompt)
        if needed["type"] != "passthrough" and not self.cfg.get("chat_template"):
            needed["chat_template"] = "tokenizer_default"
        return needed


def listed(cfg: Any, *keys: str) -> Iterator[Source]:
    """The entries of the config's ``datasets`` and ``test_datasets``, or of some of them."""
    for key in keys or ("datasets", "test_datasets"):
        entries = cfg.get(key)
        for number, entry in enumerate(entries if isinstance(entries, list) else []):
            if not isinstance(entry, Mapping):
                continue
            columns = {side: entry.get(f"field_{side}") or side for side in ("chosen", "rejected")}
            if entry.get("field_messages"):
                columns["prompt"] = entry["field_messages"]
            path = str(entry.get("path"))
            evaluation = key == "test_datasets"
            yield Source(f"{key}[{number}].path", path, evaluation, columns, entry, cfg)
