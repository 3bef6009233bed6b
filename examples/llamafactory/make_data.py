"""Makes LLaMA-Factory's data of whole conversations: the prompt in one column, each answer in one.

    python examples/llamafactory/make_data.py examples/tiny/train.jsonl examples/tiny/test.jsonl \
        --out outputs/llamafactory

writes ``train.jsonl``, ``test.jsonl`` and ``dataset_info.json``, which names both, into the
folder.  A source is a file of JSON lines, or a data set on the Hugging Face hub with a split, as in
``trl-lib/ultrafeedback_binarized:train``.  Each row has conversations in ``chosen`` and
``rejected``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ENTRY = {
    "formatting": "sharegpt",
    "ranking": True,
    "columns": {"messages": "messages", "chosen": "chosen", "rejected": "rejected"},
    "tags": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
    },
}


def read(source: str) -> Iterable[dict[str, Any]]:
    """The rows of a file of JSON lines, or of a data set on the hub."""
    if Path(source).is_file():
        lines = Path(source).read_text(encoding="utf-8").splitlines()
        return (json.loads(line) for line in lines if line.strip())
    from datasets import load_dataset

    name, _, split = source.partition(":")
    rows: Iterable[dict[str, Any]] = load_dataset(name, split=split or "train")
    return rows


def converted(rows: Iterable[dict[str, Any]], source: str) -> Iterator[dict[str, Any]]:
    """Each row as LLaMA-Factory reads it.

    Raises:
        SystemExit: both sides of a row have different turns before their answers.
    """
    for number, row in enumerate(rows):
        chosen, rejected = row["chosen"], row["rejected"]
        if chosen[:-1] != rejected[:-1]:
            sys.exit(
                f"{source}, row {number}: both sides must have the same turns before the last one, "
                "since LLaMA-Factory has one prompt for both. Fix or remove that row."
            )
        yield {"messages": chosen[:-1], "chosen": chosen[-1], "rejected": rejected[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="+", metavar="SOURCE")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    entries = {}
    for source in args.sources:
        name = Path(source).stem.replace(":", "_")
        path = args.out / f"{name}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for row in converted(read(source), source):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        entries[name] = {"file_name": path.name, **ENTRY}
    info = args.out / "dataset_info.json"
    info.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {info}: {', '.join(entries)}")


if __name__ == "__main__":
    main()
