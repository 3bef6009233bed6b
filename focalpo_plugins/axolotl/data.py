"""Why Axolotl could not read a config's data, and which names may be on a hub."""

from __future__ import annotations

from typing import Any

from ..guards import sources
from ..guards.messages import modules_of
from .conversations import text_faults
from .sources import listed


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
    found = [source.wrong() for source in listed(cfg)]
    if not any(found):  # an answer that was cut to nothing stops Axolotl as a missing one does
        found = _text_faults_as_written(cfg)
    return "; ".join(filter(None, found)) or None


def remote_names(cfg: Any) -> dict[str, str]:
    """The names in the config that may come from a hub, by key."""
    keys = ("base_model", "tokenizer_config", "base_model_config")
    return sources.remote_names({key: str(cfg[key]) for key in keys if cfg.get(key)}, listed(cfg))


def _text_faults_as_written(cfg: Any) -> list[str | None]:
    """The faults of a config that was not validated; none if Axolotl can't use it so."""
    from axolotl.loaders import load_tokenizer
    from axolotl.utils.dict import DictDefault

    try:
        written = DictDefault(cfg)
        return [str(fault) for fault in text_faults(written, load_tokenizer(written))]
    except Exception:
        return []
