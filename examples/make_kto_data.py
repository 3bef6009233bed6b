"""Split preference pairs for KTO, which learns from single answers with a label.

    python examples/make_kto_data.py MODEL DATA --split train --out outputs/kto/train.jsonl

DATA has whole conversations in ``chosen`` and ``rejected``: a name on the hub, or a JSONL file.
Each line written has ``prompt`` and ``completion``, as the chat template of MODEL's tokenizer
renders them, and ``label``.  All chosen answers come first, then all rejected ones: KTO estimates
its KL term from each answer's neighbours, which must not share its prompt.
"""

import argparse
import glob
import json
import sys
from pathlib import Path

from datasets import load_dataset
from transformers import AutoTokenizer


def render(tokenizer, messages: list[dict[str, str]], empty_system: bool) -> tuple[str, str]:
    """Prompt and completion of one conversation, as text."""
    if empty_system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": ""}, *messages]
    prompt = tokenizer.apply_chat_template(
        messages[:-1], add_generation_prompt=True, tokenize=False
    )
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    if not whole.startswith(prompt):
        sys.exit(
            f"the chat template of {tokenizer.name_or_path} changes the prompt with the answer"
        )
    # Some templates write text after the end of the turn, which the model must not learn.
    completion = whole[len(prompt) :].rstrip()
    # The tokenizer adds a BOS itself: one is enough.
    if tokenizer.bos_token_id in tokenizer("").input_ids:
        prompt = prompt.removeprefix(tokenizer.bos_token)
    return prompt, completion


def is_conversation(messages: object) -> bool:
    """Whether the messages are a prompt and an answer."""
    return (
        isinstance(messages, list)
        and len(messages) > 1
        and all(
            isinstance(message, dict)
            and all(isinstance(message.get(key), str) for key in ("role", "content"))
            for message in messages
        )
    )


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="the tokenizer's name or folder")
    parser.add_argument("data", help="a data set's name, or a .jsonl file")
    parser.add_argument("--split", default="train")
    parser.add_argument(
        "--empty-system",
        action="store_true",
        help="put an empty system turn before a conversation without one, as Zephyr's recipe did",
    )
    parser.add_argument("--out", type=Path, required=True, help="the JSONL file to write")
    args = parser.parse_args(argv)

    if args.out.is_dir():
        parser.error(f"--out must be a file, got {args.out}")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out must be a file in a folder, got {args.out}: {error}")
    try:
        if args.data.endswith(".jsonl"):
            pairs = load_dataset("json", data_files=glob.escape(args.data), split="train")
        else:
            pairs = load_dataset(args.data, split=args.split)
    except Exception as error:  # of datasets
        sys.exit(f"{args.data} can't be read as preference pairs: {first_line(error)}")
    missing = {"chosen", "rejected"} - set(pairs.column_names)
    if missing:
        sys.exit(f"{args.data} has no column {sorted(missing)}, only {pairs.column_names}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        tokenizer.get_chat_template()
    except Exception as error:  # of transformers
        sys.exit(f"{args.model} has no tokenizer with a chat template: {first_line(error)}")
    # Written completely or not at all: training must not start on half a file.
    half = args.out.with_suffix(".part")
    with half.open("w", encoding="utf-8") as out:
        for label, column in ((True, "chosen"), (False, "rejected")):
            for number, messages in enumerate(pairs[column], 1):
                if not is_conversation(messages):
                    sys.exit(
                        f"{args.data}, row {number}: {column} must be a whole conversation, a list "
                        f"of messages with role and content, got {str(messages)[:80]!r}"
                    )
                prompt, completion = render(tokenizer, messages, args.empty_system)
                line = {"prompt": prompt, "completion": completion, "label": label}
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
    half.replace(args.out)
    print(f"{args.out}: {2 * len(pairs)} answers of {len(pairs)} pairs")


if __name__ == "__main__":
    main()
