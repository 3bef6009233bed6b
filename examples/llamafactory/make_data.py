"""Makes LLaMA-Factory's data of whole conversations: the prompt in one column, each answer in one.

    python examples/llamafactory/make_data.py examples/tiny/train.jsonl examples/tiny/test.jsonl \
        --out outputs/llamafactory

writes ``train.jsonl``, ``test.jsonl`` and ``dataset_info.json``, which names both, into the
folder.  A source is a file of JSON lines, or a data set on the Hugging Face hub with a split, as in
``trl-lib/ultrafeedback_binarized:train``.  Each row has conversations in ``chosen`` and
``rejected``.

With ``--tokenizer MODEL`` it writes token ids instead, those of the model's own chat template, for
models that LLaMA-Factory has no such template for.  They are for ``tokenized_path``: the first
source is trained on, a second one is evaluated on.
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
IGNORED = -100  # the label of a token that isn't learned


def read(source: str) -> Iterable[dict[str, Any]]:
    """The rows of a file of JSON lines, or of a data set on the hub."""
    if Path(source).is_file():
        lines = Path(source).read_text(encoding="utf-8").splitlines()
        return (json.loads(line) for line in lines if line.strip())
    from datasets import load_dataset

    name, _, split = source.partition(":")
    rows: Iterable[dict[str, Any]] = load_dataset(name, split=split or "train")
    return rows


def converted(
    rows: Iterable[dict[str, Any]], source: str, strip: bool = False
) -> Iterator[dict[str, Any]]:
    """Each row as LLaMA-Factory reads it.

    Args:
        strip: whether a message loses the white space around it.

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
        turns = [*chosen, rejected[-1]]
        if strip:
            turns = [{**turn, "content": turn["content"].strip()} for turn in turns]
        yield {"messages": turns[:-2], "chosen": turns[-2], "rejected": turns[-1]}


def tokens(
    row: dict[str, Any], tokenizer: Any, cutoff: int, empty_system: bool
) -> dict[str, list[int]]:
    """The columns of a row that LLaMA-Factory trains, cut at their end.

    Args:
        row: as :func:`converted` yields it.
        cutoff: the most tokens of a sequence.
        empty_system: whether a conversation without a system turn gets an empty one.
    """
    turns = row["messages"]
    if empty_system and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": ""}, *turns]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    columns: dict[str, Any] = dict.fromkeys(("images", "videos", "audios"))
    for side in ("chosen", "rejected"):
        # What some templates write after the end of the turn is not the model's to learn.
        whole = tokenizer.apply_chat_template([*turns, row[side]], tokenize=False).rstrip()
        ids, before = (encoded(text, tokenizer)[:cutoff] for text in (whole, prompt))
        columns[f"{side}_input_ids"] = ids
        columns[f"{side}_attention_mask"] = [1] * len(ids)
        columns[f"{side}_labels"] = [IGNORED] * len(before) + ids[len(before) :]
    return columns


def encoded(text: str, tokenizer: Any) -> list[int]:
    """The token ids of a text with one BOS, if the tokenizer has one."""
    bos = tokenizer.bos_token
    ids: list[int] = tokenizer(text.removeprefix(bos or ""), add_special_tokens=False).input_ids
    return ids if bos is None else [tokenizer.bos_token_id, *ids]


def write_tokens(args: argparse.Namespace) -> None:
    """Write token ids as LLaMA-Factory keeps its own."""
    from datasets import Dataset, DatasetDict
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    splits = {}
    for source, split in zip(args.sources, ("train", "validation"), strict=False):
        rows = Dataset.from_list(list(converted(read(source), source)))
        how = {"tokenizer": tokenizer, "cutoff": args.cutoff, "empty_system": args.empty_system}
        splits[split] = rows.map(tokens, fn_kwargs=how, remove_columns=rows.column_names)
    DatasetDict(splits).save_to_disk(args.out)
    print(f"wrote {args.out}: {', '.join(f'{len(rows)} pairs' for rows in splits.values())}")


def write_rows(args: argparse.Namespace) -> None:
    """Write messages, and the entries that name their files."""
    args.out.mkdir(parents=True, exist_ok=True)
    entries = {}
    for source in args.sources:
        name = Path(source).stem.replace(":", "_")
        path = args.out / f"{name}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for row in converted(read(source), source, args.strip):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        entries[name] = {"file_name": path.name, **ENTRY}
    info = args.out / "dataset_info.json"
    info.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {info}: {', '.join(entries)}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="+", metavar="SOURCE")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER")
    parser.add_argument(
        "--strip",
        action="store_true",
        help="take the white space around each message away, as Llama-3's own template does",
    )
    parser.add_argument("--tokenizer", metavar="MODEL", help="write token ids, by this tokenizer")
    parser.add_argument(
        "--cutoff", type=int, metavar="TOKENS", help="cut a longer sequence at its end"
    )
    parser.add_argument(
        "--empty-system",
        action="store_true",
        help="put an empty system turn before a conversation without one, as Zephyr's recipe did",
    )
    args = parser.parse_args(argv)
    if args.tokenizer is None:
        if args.cutoff is not None or args.empty_system:
            parser.error("--cutoff and --empty-system go with --tokenizer")
        write_rows(args)
        return
    if args.strip or args.cutoff is None or len(args.sources) > 2:
        parser.error("--tokenizer needs --cutoff and one or two sources, and takes no --strip")
    write_tokens(args)


if __name__ == "__main__":
    main()
