"""``scores.jsonl``: a header that says what was scored, then one line for each pair."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import CommandError
from ..output import writing

#: The key of the words and paths that the command line gave, by the key that depends on them.
NAMES = "given"
# What the file begins with.
_START = json.dumps({"focalpo_score": 1}).removesuffix("}")
# Weights, config, tokenizer and chat template.
_OF_A_MODEL = (".json", ".safetensors", ".bin", ".jinja", ".model", ".txt")


def identity_of(model: str) -> str:
    """An identifier of a model: a hash of a folder's contents, or a hub name."""
    folder = Path(model)
    if not folder.is_dir():
        if folder.is_absolute() or model.startswith("."):
            raise CommandError(f"a model must be a folder or a hub name, got {model!r}.")
        return model
    files = [p for p in sorted(folder.iterdir()) if p.suffix in _OF_A_MODEL and p.is_file()]
    if not any(p.name in ("config.json", "adapter_config.json") for p in files):
        raise CommandError(f"a model folder must hold config.json, got {model!r} without one.")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def read_scores(scores: Path, header: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The pairs that an earlier run has scored; an incomplete last line is cut off.

    Raises:
        CommandError: the file is from another run, or is not one of our files.
    """
    if not scores.is_file():
        return {}
    content = scores.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        # Also if the first line is not whole: it is cut off below.
        if not content.startswith(_START.encode()[: len(content)]):
            raise ValueError
        records = [json.loads(line) for line in whole.splitlines()]
        done = {int(record["row"]): record for record in records[1:]}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CommandError(
            f"{scores} is there already, is not a file of `focalpo score`, and is left as it is: "
            "move it, or give another --out."
        ) from None
    if records:
        compared = header.keys() - {NAMES}
        differing = [
            key for key in header if key in compared and records[0].get(key) != header[key]
        ]
        if differing:
            changes = ", ".join(_change(key, records[0], header) for key in differing)
            raise CommandError(
                f"{scores} belongs to another run: {changes}. Give another --out, or remove that "
                "folder."
            )
    if len(whole) < len(content):
        with writing(scores), scores.open("r+b") as file:
            file.truncate(len(whole))
    return done


def _change(key: str, before: dict[str, Any], now: dict[str, Any]) -> str:
    """How a value of an earlier run's header differs, in the words of the command line."""
    if key not in now.get(NAMES, {}):
        return f"{key} was {before.get(key)}, got {now[key]}"
    word, given = now[NAMES][key]
    was = before.get(NAMES, {}).get(key, (word, None))[1]
    if was in (given, None):
        return f"the files of {word} {given!r} have changed"
    return f"{word} was {was!r}, got {given!r}"


def append(scores: Path, records: Iterable[dict[str, Any]]) -> None:
    with writing(scores), scores.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))
