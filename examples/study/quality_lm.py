"""Which loss gives the better language model if the true answers are known?

The question of quality.py with the small Llama of examples/make_tiny.py, asked how many words a
list has.  For each seed other data are made and another reference is fine-tuned on them; it answers
the training prompts itself, each pair is a right and a wrong answer of its own, and a share of the
labels is flipped.  Every loss is trained on the same pairs, and its model judged on prompts that no
training saw.

    python examples/study/quality_lm.py --out outputs/quality_lm

README.md in this folder has the results and their limits.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import os
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from focalpo_plugins.loss import focalpo_loss

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import make_tiny  # noqa: E402
from quality import LOSSES, Loss, check_out, end_with_parent, half_width, pyplot  # noqa: E402

SAMPLES = 4  # answers of the reference to each training prompt
LONGEST = 64  # tokens of an answer
BATCH, SCORED_AT_ONCE = 32, 250
SIMPO_BETA = 2.5  # SimPO's margin is a mean over tokens, so it asks for a larger beta
PILOT = 0  # the seed whose data and reference only choose the learning rate
RATES = (1e-4, 3e-4, 1e-3)
BETA, EPOCHS = 1.0, 2
METRICS = ("right", "win_rate", "kl")


# ---- the truth of the made-up data


def listed(prompt: str) -> list[str] | None:
    """The words that ``prompt`` asks to count; None if it asks something else."""
    found = re.search(
        r"(?:How many words are here|Count the words in this list): (.*)[?.]$", prompt
    )
    return found[1].split(", ") if found else None


def right_answers(prompt: str) -> set[str]:
    """The two that make_tiny.py gives as right ones to its own ``prompt`` to count."""
    words = listed(prompt)
    if words is None:
        raise ValueError(f"prompt must ask to count a list, got {prompt!r}.")
    count = make_tiny.NUMBERS[len(words)]
    core = f"There are {count} words in the list."
    return {core, f"{core} Count them one by one and you will come to {count} as well."}


# ---- one seed: prompts, a reference, and its own answers as pairs

Answered = tuple[list[int], list[int]]  # token ids of a prompt, and of its answer with its end


class World:
    """Other prompts, another reference and other pairs for each seed.

    ``pairs`` are chosen and rejected answers to one prompt, ``flipped`` says which of them have
    swapped labels.  ``right`` are all right answers to the unseen prompts, and
    ``right_of`` the prompt of each.
    """

    def __init__(self, seed: int, prompts: int, unseen: int, noise: float) -> None:
        rng, by_prompt = random.Random(seed), {}
        while len(by_prompt) < prompts + unseen:
            pair = make_tiny.make_pair(rng)
            # So small a model gets about 2 in 1000 facts on unseen prompts right: too few to
            # compare.
            if listed(pair["chosen"][0]["content"]):
                by_prompt.setdefault(pair["chosen"][0]["content"], pair)
        texts = list(by_prompt)
        rng.shuffle(texts)
        seen, self.seed = texts[:prompts], seed
        # Right and wrong answers alike: it doesn't matter here which one a row calls chosen.
        rows = [by_prompt[text] for text in seen]
        self.tokenizer = make_tiny.make_tokenizer(rows)
        self.reference, _ = make_tiny.make_model(self.tokenizer, rows, seed)
        self.unseen = texts[prompts:]
        self.right, self.right_of = [], []
        for place, text in enumerate(self.unseen):
            for answer in sorted(right_answers(text)):
                self.right.append(self.encode(text, answer))
                self.right_of.append(place)
        self.reference_right = share_right(self, self.reference).mean()
        self.pairs: list[tuple[Answered, Answered]] = []
        answers = sample(self.reference, self.tokenizer, seen * SAMPLES, seed)
        for place, text in enumerate(seen):
            groups: dict[bool, list[Answered]] = {True: [], False: []}
            for one in answers[place :: len(seen)]:
                if one[1][-1] == self.tokenizer.eos_token_id:  # a whole answer
                    groups[self.decode(one) in right_answers(text)].append(one)
            if all(groups.values()):
                self.pairs.append((groups[True][0], groups[False][0]))
        self.flipped = [rng.random() < noise for _ in self.pairs]
        self.pairs = [
            pair[::-1] if flip else pair
            for pair, flip in zip(self.pairs, self.flipped, strict=True)
        ]

    def encode(self, prompt: str, answer: str) -> Answered:
        chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        ids, labels = make_tiny.encode(self.tokenizer, chat)
        skip = labels.count(-100)
        return ids[:skip], ids[skip:]

    def decode(self, one: Answered) -> str:
        return self.tokenizer.decode(one[1][:-1])


@torch.no_grad()
def sample(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], seed: int
) -> list[Answered]:
    """An answer to each prompt at temperature 1; one cut at LONGEST has no end of turn."""
    torch.manual_seed(seed)
    found = []
    for start in range(0, len(prompts), SCORED_AT_ONCE):
        asked = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            for text in prompts[start : start + SCORED_AT_ONCE]
        ]
        batch = tokenizer(asked, return_tensors="pt", padding=True, padding_side="left")
        written = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=True,
            top_k=0,
            max_new_tokens=LONGEST,
        )
        width = batch["input_ids"].shape[1]
        lengths = batch["attention_mask"].sum(1).tolist()
        for ids, real in zip(written.tolist(), lengths, strict=True):
            answer = ids[width:]
            if tokenizer.eos_token_id in answer:
                answer = answer[: answer.index(tokenizer.eos_token_id) + 1]
            found.append((ids[width - real : width], answer))
    return found


def answer_log_probs(model: LlamaForCausalLM, rows: Sequence[Answered]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of every token that could follow, (N, L, vocabulary), and (N, L) ids of
    those that do, -1 where there is no token of the answer."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    targets = torch.full((len(rows), width), -1)
    for place, (prompt, answer) in enumerate(rows):
        # Padding is on the right: a causal model needs no mask for it.
        ids[place, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        targets[place, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    scores = model(input_ids=ids[:, :-1]).logits
    return torch.log_softmax(scores.float(), -1), targets[:, 1:]


def sequence_log_probs(
    model: LlamaForCausalLM, rows: Sequence[Answered], mean: bool = False
) -> Tensor:
    """Log-probabilities of whole answers, (N,); ``mean`` divides by their lengths in tokens."""
    log_probs, targets = answer_log_probs(model, rows)
    inside = targets >= 0
    each = log_probs.gather(2, targets.clamp(min=0)[..., None])[..., 0] * inside
    return each.sum(1) / (inside.sum(1) if mean else 1)


def in_parts(rows: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(rows), SCORED_AT_ONCE):
        yield rows[start : start + SCORED_AT_ONCE]


# ---- training and judging


def train(
    world: World, loss: Loss, beta: float, rate: float, epochs: int
) -> tuple[LlamaForCausalLM, np.ndarray]:
    """A model trained from the reference, and the margins of all pairs at its last epoch."""
    model = copy.deepcopy(world.reference)
    adam = torch.optim.Adam(model.parameters(), lr=rate)
    mean = loss.target is not None
    offset = torch.full((len(world.pairs),), loss.target or 0.0)
    if not mean:
        with torch.no_grad():
            sides = [
                torch.cat([sequence_log_probs(model, part) for part in in_parts(side)])
                for side in zip(*world.pairs, strict=True)
            ]
        offset = sides[0] - sides[1]
    batches = len(world.pairs) // BATCH
    steps, step = epochs * batches, 0
    warm_up, margins = max(1, steps // 10), np.full(len(world.pairs), np.nan)
    order = torch.Generator().manual_seed(world.seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(world.pairs), generator=order).split(BATCH)[:batches]:
            chosen, rejected = zip(*(world.pairs[i] for i in batch), strict=True)
            policy = sequence_log_probs(model, [*chosen, *rejected], mean)
            z = policy[: len(batch)] - policy[len(batch) :] - offset[batch]
            z = (SIMPO_BETA if mean else beta) * z
            focalpo_loss(z, loss.gamma_at(step, steps), loss.variant).mean().backward()
            step += 1
            share = min(step / warm_up, 1.0)
            share *= 0.5 + 0.5 * math.cos(math.pi * max(0, step - warm_up) / (steps - warm_up + 1))
            adam.param_groups[0]["lr"] = rate * share
            adam.step()
            adam.zero_grad()
            margins[batch.numpy()] = z.detach().numpy()
    return model, margins


@torch.no_grad()
def share_right(world: World, model: LlamaForCausalLM) -> np.ndarray:
    """The probability of a right answer to each unseen prompt, (unseen,): the sum over all of them,
    in the tokens that the tokenizer gives them."""
    each = torch.cat([sequence_log_probs(model, part) for part in in_parts(world.right)]).exp()
    return np.bincount(world.right_of, each.numpy(), len(world.unseen))


@torch.no_grad()
def kl_to_reference(world: World, model: LlamaForCausalLM) -> float:
    """Nats of an answer, over one sampled answer to each unseen prompt; exact token by token."""
    total = 0.0
    for rows in in_parts(sample(model, world.tokenizer, world.unseen, world.seed)):
        log_pi, targets = answer_log_probs(model, rows)
        log_ref, _ = answer_log_probs(world.reference, rows)
        each = (log_pi.exp() * (log_pi - log_ref)).sum(-1) * (targets >= 0)
        total += each.sum().item()
    return total / len(world.unseen)


def judge(world: World, model: LlamaForCausalLM) -> dict[str, float]:
    """The METRICS on the unseen prompts.  An answer is right or not: the win rate against the
    reference is 1/2 and half of the difference between the two shares."""
    right = share_right(world, model).mean()
    win_rate = 0.5 + (right - world.reference_right) / 2
    return {
        "right": float(right),
        "win_rate": float(win_rate),
        "kl": kl_to_reference(world, model),
    }


def run_seed(
    seed: int, losses: Sequence[Loss], rates: Sequence[float], settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row for the reference of one seed, and one for each loss and rate."""
    torch.set_num_threads(1)
    clock = time.perf_counter()
    world = World(seed, settings["prompts"], settings["unseen"], settings["noise"])
    if len(world.pairs) < BATCH:
        raise ValueError(
            f"prompts must give at least {BATCH} pairs of a right and a wrong answer, got "
            f"{len(world.pairs)} from {settings['prompts']}: give more --prompts."
        )
    about = {"seed": seed, "pairs": len(world.pairs), "flipped": sum(world.flipped)}
    rows = [{**about, "loss": "reference", "rate": None, **judge(world, world.reference)}]
    for loss in losses:
        for rate in rates:
            model, margins = train(world, loss, settings["beta"], rate, settings["epochs"])
            flipped = np.array(world.flipped) & np.isfinite(margins)
            row = {**about, "loss": loss.name, "rate": rate, **judge(world, model)}
            # How well the wrong labels were learnt: their share with a margin above 0.
            row["flipped_learnt"] = float((margins[flipped] > 0).mean()) if flipped.any() else None
            rows.append(row)
            shown = ", ".join(f"{name} {row[name]:.4f}" for name in METRICS)
            print(f"seed {seed}, {loss.name}, {rate:g}: {shown} "
                  f"({time.perf_counter() - clock:.0f} s)", flush=True)  # fmt: skip
    return rows


# ---- the results


def power(spread: float, seeds: int) -> float:
    """The true difference that is found in four of five studies, at 5 % and two-sided.

    ``spread`` is the standard deviation, over seeds, of one seed's difference.  It takes the mean's
    t interval plus the t quantile of 80 %, the usual approximation.
    """
    values = np.tile([-1.0, 1.0], seeds)[:seeds]
    t = half_width(values) / float(np.std(values, ddof=1)) * math.sqrt(seeds)
    z, n = 0.8416, seeds - 1
    at_80 = z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
    return (t + at_80) * spread / math.sqrt(seeds)


def summarise(runs: Sequence[dict[str, Any]], losses: Sequence[Loss]) -> list[dict[str, Any]]:
    """A row for each loss: means over the seeds, in per cent and nats, and the paired differences
    of the share right from the base's, in points, with half of their 95 % interval.

    A loss without runs of its base is its own base.  ``flipped_learnt`` is None if no label was
    flipped.
    """
    by = {(run["loss"], run["seed"]): run for run in runs}
    seeds = sorted({run["seed"] for run in runs})
    rows = []
    for name, base in [("reference", "reference"), *((loss.name, loss.base) for loss in losses)]:
        base = base if (base, seeds[0]) in by else name
        of = {key: np.array([by[name, seed][key] for seed in seeds]) for key in METRICS}
        gap = 100 * (of["right"] - [by[base, seed]["right"] for seed in seeds])
        row: dict[str, Any] = {"loss": name, "base": base}
        row |= {"right": 100 * of["right"].mean(), "right_95": half_width(100 * of["right"])}
        row |= {"win_rate": 100 * of["win_rate"].mean(), "kl": of["kl"].mean()}
        row |= {"difference": gap.mean(), "difference_95": half_width(gap)}
        row |= {"spread": gap.std(ddof=1), "each_seed": gap.round(3).tolist()}
        if name != "reference":
            learnt = [by[name, seed]["flipped_learnt"] for seed in seeds]
            known = [share for share in learnt if share is not None]
            row["flipped_learnt"] = np.mean(known) if known else None
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| loss | right (%) | less the base's (points) | each seed | win rate (%) | KL | flipped "
        "labels learnt (%) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [row["loss"], f"{row['right']:.2f} ± {row['right_95']:.2f}", "", ""]
        if row["loss"] != row["base"]:
            cells[2] = f"{row['difference']:+.2f} ± {row['difference_95']:.2f}"
            cells[3] = " ".join(f"{value:+.2f}" for value in row["each_seed"])
        cells += [f"{row['win_rate']:.2f}", f"{row['kl']:.3f}"]
        learnt = row.get("flipped_learnt")
        blank = "-" if "flipped_learnt" in row else ""
        cells.append(blank if learnt is None else f"{100 * learnt:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[dict[str, Any]], title: str) -> Any:
    """Differences seed by seed, and share right against KL."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    of = [row for row in rows if row["loss"] != row["base"]]
    for place, row in enumerate(of):
        left.errorbar(row["difference"], place, xerr=row["difference_95"], color="#0072B2",
                      marker="o", label="mean, 95 % over seeds" * (place == 0))  # fmt: skip
        left.plot(row["each_seed"], [place + 0.2] * len(row["each_seed"]), "|", color="#555555",
                  markersize=9, label="one seed" * (place == 0))  # fmt: skip
    # Also in numbers: one loss that breaks its models sets the scale.
    gaps = [f"{row['difference']:+.2f} ± {row['difference_95']:.2f}" for row in of]
    names = [f"{row['loss']}\n{gap}" for row, gap in zip(of, gaps, strict=True)]
    left.set_yticks(range(len(of)), names, fontsize=9)
    left.invert_yaxis()
    left.axvline(0, color="#888888", linewidth=1)
    left.set_xlabel("share right less the base's (points)")
    left.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, 1.12), ncols=2)
    for row in rows:
        # The other rows have the ten colours that there are.
        color = "#000000" if row["loss"] == "reference" else None
        right.plot(row["kl"], row["right"], "o", color=color, label=row["loss"])
    # A broken model is a hundred nats away, and the others would all read as 0.
    right.set_xscale("symlog", linthresh=1)
    right.xaxis.set_major_formatter("{x:g}")
    right.set_xlabel("KL to the reference (nats)")
    right.set_ylabel("right answers (%)")
    right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    for axis in (left, right):
        axis.grid(color="#dddddd")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(title, fontsize=9)
    return figure


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    names = [loss.name for loss in LOSSES]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--losses", nargs="+", default=names, choices=names, metavar="LOSS",
                        help=f"of {', '.join(names)}; their bases are always there")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=4, metavar="N", help="4 at least")
    parser.add_argument("--prompts", type=int, default=1600, help="to train on")
    parser.add_argument("--unseen", type=int, default=500, help="prompts to judge on")
    parser.add_argument("--noise", type=float, default=0.2, help="share of the labels flipped")
    parser.add_argument("--beta", type=float, default=BETA, help="but for SimPO")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, metavar="RATE",
                        help="DPO's best of them on the pilot's data is taken for all")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--out", type=Path, default=Path("outputs/quality_lm"))
    args = parser.parse_args(argv)
    least = {"seeds": 4, "prompts": 200, "unseen": 1, "epochs": 1, "jobs": 1}
    for name, bound in least.items():
        if getattr(args, name) < bound:
            parser.error(f"--{name} must be at least {bound}, got {getattr(args, name)}.")
    if not 0 <= args.noise < 0.5:
        parser.error(f"--noise must be at least 0 and below 0.5, got {args.noise:g}.")
    for name, values in (("beta", [args.beta]), ("rates", args.rates)):
        for value in values:
            if not 0 < value < math.inf:
                parser.error(f"--{name} must be above 0, got {value:g}.")
    check_out(parser, args.out)
    return args


def asked_losses(names: Sequence[str]) -> list[Loss]:
    """DPO, those of the names, and the bases that these are compared with."""
    wanted = {"DPO", *names} | {loss.base for loss in LOSSES if loss.name in names}
    return [loss for loss in LOSSES if loss.name in wanted]


def best_rate(pilot: Sequence[dict[str, Any]]) -> float:
    """The rate with the most right answers; one that breaks the model has none."""
    finite = [row for row in pilot if row["rate"] and math.isfinite(row["right"])]
    if not finite:
        raise ValueError("each of --rates breaks DPO's model: give smaller ones.")
    found: float = max(finite, key=lambda row: row["right"])["rate"]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    pyplot()
    try:
        return study(args)
    except ValueError as error:
        sys.exit(f"quality_lm: error: {error}")


def study(args: argparse.Namespace) -> int:
    clock = time.perf_counter()
    losses = asked_losses(args.losses)
    settings = {key: getattr(args, key) for key in ("prompts", "unseen", "noise", "beta", "epochs")}
    # A process that is forked off one with torch's threads can hang.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=spawn, initializer=end_with_parent) as pool:
        pilot: list[dict[str, Any]] = []
        if len(args.rates) > 1:
            pilot = pool.submit(run_seed, PILOT, LOSSES[:1], args.rates, settings).result()
        rate = best_rate(pilot) if pilot else args.rates[0]
        why = f", DPO's best of {len(args.rates)} on the pilot's data" if pilot else ""
        print(f"learning rate {rate:g}{why}", flush=True)
        asked = [
            pool.submit(run_seed, PILOT + 1 + seed, losses, [rate], settings)
            for seed in range(args.seeds)
        ]
        runs = [row for future in asked for row in future.result()]
    rows = summarise(runs, losses)
    content = {**settings, "rate": rate, "pilot": pilot, "runs": runs, "rows": rows}
    (args.out / "quality_lm.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
    text = table(rows)
    (args.out / "table.md").write_text(text, encoding="utf-8")
    pairs = sorted({run["pairs"] for run in runs})
    title = (f"{args.seeds} seeds, {pairs[0]} to {pairs[-1]} pairs, {args.noise:.0%} flipped, beta "
             f"{args.beta:g}, learning rate {rate:g}, {args.epochs} epochs")  # fmt: skip
    draw(rows, title).savefig(args.out / "quality_lm.png", dpi=150, bbox_inches="tight")
    print(text)
    for row in (row for row in rows if row["loss"] != row["base"]):
        found = power(row["spread"], args.seeds)
        print(f"{row['loss']}: a difference of {found:.2f} points is found in four of five studies")
    files = ", ".join(str(args.out / name) for name in ("quality_lm.png", "table.md",
                                                        "quality_lm.json"))  # fmt: skip
    print(f"wrote {files} after {time.perf_counter() - clock:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
