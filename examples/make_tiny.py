"""Make everything that the tiny CPU runs need: preference data, a tokenizer and a reference model.

Nothing is downloaded. The text comes from the tables below, and the tokenizer is trained on it. A
Llama of under a million parameters is fine-tuned on both the chosen and the rejected answers: it
writes both kinds, so preference training can still teach it something.

    python examples/make_tiny.py

The same seed gives the same data everywhere, and the same weights on the same machine and torch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

# torch, tokenizers and transformers are imported only when they are used: importing them takes
# seconds, and most calls have nothing to do.
if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

# torch reads this when it is loaded. With it, threads that wait for each other sleep: on busy cores
# they would spin for longer than they compute.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

TRAIN_PAIRS, TEST_PAIRS = 2400, 304
SWAPPED = 0.08  # share of pairs whose labels are swapped, as by careless annotators
SFT_EPOCHS, SFT_BATCH, SFT_LR = 2, 32, 2e-3
THREADS = 2  # on any number of cores: it decides how sums are split, and so the weights
# Axolotl's telemetry and the model hub need a network, so both are off.
LAUNCH = "AXOLOTL_DO_NOT_TRACK=1 HF_HUB_OFFLINE=1 axolotl train"
STAMP = "made.json"  # written last: a folder without it was not made by this script

SPECIALS = {
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|eot_id|>",
    "pad_token": "<|pad|>",
    "additional_special_tokens": ["<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"],
}
# The template writes the one BOS; the tokenizer has no post-processor that could add a second.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def both_ways(*opposites: tuple[str, str]) -> dict[str, str]:
    """Each word of a pair, with the other one as its value."""
    return dict([*opposites, *((b, a) for a, b in opposites)])


# Each topic: ways to ask, ways to answer, a longer reason, and value -> things that have it.
FACTS = [
    (
        ["What colour is a {x}?", "Tell me the colour of a {x}.", "What is the colour of a {x}?"],
        ["A {x} is {v}.", "The colour of a {x} is {v}."],
        "If you paint a {x}, take {v} from the box first.",
        {
            "yellow": "lemon banana canary sunflower daffodil",
            "red": "tomato cherry strawberry ladybird poppy",
            "green": "cucumber frog lettuce cactus pea",
            "white": "snowman swan igloo pearl daisy",
            "black": "raven panther tyre blackbird mole",
            "brown": "chestnut beaver walnut potato acorn",
            "orange": "carrot pumpkin tangerine goldfish apricot",
        },
    ),
    (
        ["What is the opposite of {x}?", "Name the opposite of {x}.", "Give the reverse of {x}."],
        ["The opposite of {x} is {v}.", "{v} is the other side of {x}."],
        "Where something stops being {x} altogether, we call it {v}.",
        both_ways(
            ("cold", "hot"),
            ("small", "big"),
            ("slow", "fast"),
            ("dark", "light"),
            ("wet", "dry"),
            ("old", "new"),
            ("low", "high"),
            ("sad", "happy"),
            ("soft", "hard"),
            ("weak", "strong"),
            ("poor", "rich"),
            ("thin", "thick"),
            ("loud", "quiet"),
            ("near", "far"),
            ("full", "empty"),
        ),  # fmt: skip
    ),
    (
        ["What kind of thing is a {x}?", "Where does a {x} belong?", "How would you class a {x}?"],
        ["A {x} is a kind of {v}.", "It is a {v}; a {x} always is."],
        "You would find the {x} in a book about every {v} there is.",
        {
            "fish": "trout salmon herring pike shark",
            "bird": "sparrow robin eagle heron owl",
            "tree": "willow birch maple pine cedar",
            "tool": "hammer chisel wrench saw spade",
            "boat": "canoe ferry yacht kayak barge",
            "fruit": "plum mango peach grape melon",
            "instrument": "violin trumpet flute piano drum",
        },
    ),
]
LEADS = [
    "",
    "Please help me. ",
    "A quick question. ",
    "My son would like to know. ",
    "For a quiz. ",
]
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
CURT = [
    "Look it up yourself.",
    "Why do you ask me that?",
    "I have no time for such simple things.",
    "Anybody ought to know this by now.",
    "Take a book and read it for once.",
]
VAGUE = [
    "That is hard to say.",
    "It depends on many things.",
    "People see it in different ways.",
    "There may be an answer, or there may not.",
    "One could look at it from more than one side.",
]


def with_articles(text: str) -> str:
    """'a owl' -> 'an owl'."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def fact_question(rng: random.Random) -> tuple[str, list[str], list[str]]:
    """A question from the tables: prompt, right answer (short, long), wrong answer (same)."""
    asks, answers, reason, table = rng.choice(FACTS)
    value = rng.choice(list(table))
    thing = rng.choice(table[value].split())
    other = rng.choice([v for v in table if v not in (value, thing)])

    def answer(v: str) -> list[str]:
        core = rng.choice(answers).format(x=thing, v=v)
        core = core[0].upper() + core[1:]
        return [core, f"{core} {reason.format(x=thing, v=v)}"]

    return rng.choice(asks).format(x=thing), answer(value), answer(other)


def count_question(rng: random.Random) -> tuple[str, list[str], list[str]]:
    """How many words are in a list: harder for a small model than a fact."""
    things = [t for *_, table in FACTS for ts in table.values() for t in ts.split()]
    shown = rng.sample(things, rng.randint(2, 6))
    wrong = rng.choice([n for n in range(2, 7) if n != len(shown)])

    def answer(n: int) -> list[str]:
        core = f"There are {NUMBERS[n]} words in the list."
        return [core, f"{core} Count them one by one and you will come to {NUMBERS[n]} as well."]

    ask = rng.choice(["How many words are here: {}?", "Count the words in this list: {}."])
    return ask.format(", ".join(shown)), answer(len(shown)), answer(wrong)


def make_pair(rng: random.Random) -> dict:
    """One preference pair. Both sides draw their length alike, so it doesn't show the label."""
    prompt, right, wrong = (count_question if rng.random() < 0.15 else fact_question)(rng)
    prompt = rng.choice(LEADS) + prompt
    flaw = rng.choices([None, CURT, VAGUE], [0.5, 0.25, 0.25])[0]
    chosen = rng.choice(right)
    rejected = " ".join(rng.sample(flaw, rng.randint(1, 3))) if flaw else rng.choice(wrong)
    high, low = round(rng.uniform(6.5, 9.5), 1), round(rng.uniform(1.0, 6.0), 1)
    if rng.random() < SWAPPED:
        chosen, rejected, high, low = rejected, chosen, 6.0, 5.5

    def chat(text: str) -> list[dict]:
        turns = (("user", prompt), ("assistant", text))
        return [{"role": role, "content": with_articles(content)} for role, content in turns]

    return {
        "chosen": chat(chosen),
        "rejected": chat(rejected),
        "score_chosen": high,
        "score_rejected": low,
    }


def make_pairs(seed: int) -> tuple[list[dict], list[dict]]:
    """Train and test pairs; no prompt occurs twice, so the test prompts are unseen."""
    rng, by_prompt = random.Random(seed), {}
    while len(by_prompt) < TRAIN_PAIRS + TEST_PAIRS:
        pair = make_pair(rng)
        by_prompt.setdefault(pair["chosen"][0]["content"], pair)
    pairs = list(by_prompt.values())
    rng.shuffle(pairs)
    return pairs[:TRAIN_PAIRS], pairs[TRAIN_PAIRS:]


def make_tokenizer(pairs: list[dict]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; a run of newlines stays one piece, so that the prompt's tokens do not change
    when an answer follows it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r" ?[A-Za-z]+|[0-9]|\n+| ?[^\sA-Za-z0-9]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    *named, extra = SPECIALS.values()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[*named, *extra],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [m["content"] for p in pairs for side in ("chosen", "rejected") for m in p[side]]
    tokenizer.train_from_iterator([*texts, "user\n\n", "assistant\n\n", "system\n\n"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        **SPECIALS,
    )


def encode(tokenizer: PreTrainedTokenizerFast, chat: list[dict]) -> tuple[list[int], list[int]]:
    """Token ids, and labels in which the prompt does not count."""
    prompt = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    ids, skip = tokenizer(whole)["input_ids"], len(tokenizer(prompt)["input_ids"])
    return ids, [-100] * skip + ids[skip:]


def make_model(
    tokenizer: PreTrainedTokenizerFast, pairs: list[dict], seed: int
) -> tuple[LlamaForCausalLM, float]:
    """A small Llama fine-tuned on both answers of every pair, and its last mean loss."""
    import torch
    from tqdm import tqdm
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    rows = [encode(tokenizer, pair[side]) for pair in pairs for side in ("chosen", "rejected")]
    steps = SFT_EPOCHS * (len(rows) // SFT_BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=SFT_LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, SFT_LR, steps, pct_start=0.1)
    rng, losses = random.Random(seed), []
    bar = tqdm(total=steps, desc="fine-tuning the model", unit="step", mininterval=1)
    for _ in range(SFT_EPOCHS):
        rng.shuffle(rows)
        for start in range(0, len(rows) - SFT_BATCH + 1, SFT_BATCH):
            batch = rows[start : start + SFT_BATCH]
            width = max(len(ids) for ids, _ in batch)
            # Padding is on the right, so a causal model needs no mask for it.
            ids = [i + [tokenizer.pad_token_id] * (width - len(i)) for i, _ in batch]
            labels = [lab + [-100] * (width - len(lab)) for _, lab in batch]
            loss = model(input_ids=torch.tensor(ids), labels=torch.tensor(labels)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            bar.update()
    bar.close()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    tail = losses[-50:]
    return model.eval(), sum(tail) / len(tail)


def settings(seed: int) -> dict:
    """The settings that decide the result: the seed and this script."""
    return {"seed": seed, "script": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}


def build(folder: Path, seed: int) -> None:
    """Write every file into `folder`, the stamp last."""
    clock = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - clock:5.1f} s] {text}", flush=True)

    train, test = make_pairs(seed)
    for name, pairs in (("train", train), ("test", test)):
        lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    say(f"data: {len(train)} train and {len(test)} test pairs")
    tokenizer = make_tokenizer(train)
    tokenizer.save_pretrained(folder / "model")
    say(f"tokenizer: {len(tokenizer)} tokens")
    model, loss = make_model(tokenizer, train, seed)
    model.save_pretrained(folder / "model")
    say(f"model: {model.num_parameters():,} parameters, fine-tuned to a loss of {loss:.3f}")
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    stamp = {"settings": settings(seed), "files": files}
    (folder / STAMP).write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")


def next_command(out: Path) -> str:
    """The command that trains on the files in ``out``; the YAML has the default folder's paths."""
    examples = Path(__file__).resolve().parent
    config, steps = "examples/tiny_focalpo.yml", []
    if Path.cwd() != examples.parent:
        steps.append(f"cd {shlex.quote(str(examples.parent))}")
    if out.resolve() != examples / "tiny":
        folder = out.resolve()
        escaped = re.sub(r"[\\&|]", r"\\\g<0>", str(folder))  # characters with a meaning for sed
        edit = shlex.quote(rf"s|\./examples/tiny/|{escaped}/|")
        copy = shlex.quote(str(folder / "tiny_focalpo.yml"))
        steps.append(f"sed {edit} {config} > {copy}")
        config = copy
    return " && ".join([*steps, f"{LAUNCH} {config}"])


def main() -> None:
    """Build into a sibling folder and rename it, so that a half-built one is never in the way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "tiny")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--force", action="store_true", help="build again what is there already")
    args = parser.parse_args()
    out: Path = args.out

    if not 0 <= args.seed < 2**63:  # torch's range
        parser.error(f"--seed must be at least 0 and below 2**63, got {args.seed}")
    if out.exists() and not out.is_dir():
        parser.error(f"--out must be a folder, got {out}")
    if out.exists() and any(out.iterdir()):
        if not (out / STAMP).is_file():
            parser.error(f"{out} was not made by this script; choose another --out")
        try:
            stamp = json.loads((out / STAMP).read_text(encoding="utf-8"))
            whole = all((out / name).is_file() for name in stamp["files"])
        except (ValueError, LookupError, TypeError):  # cut off, while it was copied for example
            stamp, whole = {}, False
        if not args.force and whole and stamp["settings"] == settings(args.seed):
            print(f"{out} is complete and up to date; nothing to do (--force builds it again)")
            return
        if not args.force:
            parser.error(f"{out} is incomplete or has other settings; --force builds it again")

    import torch

    torch.set_num_threads(THREADS)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out must be a folder, got {out}: {error}")
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        build(partial, args.seed)
        partial.chmod(0o755)
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"made {out}: train.jsonl, test.jsonl, model/")
    print(f"next: {next_command(out)}")


if __name__ == "__main__":
    main()
