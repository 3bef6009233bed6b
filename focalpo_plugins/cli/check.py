"""``focalpo check``: what a run will train on, and what it will take, before it is started."""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import tempfile
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..pairs import blank, faults
from ..plan import Pair, Plan, Sequence
from . import CommandError
from .memory import FORMULA, GIB, LEFT_OUT, Estimate, estimate

# A pair is pushed the wrong way once its log-ratios differ by z*/beta nats.  In an ordinary run the
# log-probability of an answer of a few hundred tokens moves by tens of nats from its reference, and
# the margins of pairs ranked wrong reach -1 to -3.
_FEW_NATS = 50.0
_NEAR_MARGIN = 3.0
_MUCH_CUT = 0.1  # share of pairs
_SHOWN = 80  # tokens of a prompt


@dataclass
class Counts:
    """What was counted over all pairs that are trained on."""

    pairs: int = 0
    truncated: int = 0
    identical: int = 0
    empty: int = 0
    doubled_bos: int = 0
    bos_in_answer: int = 0
    bos: Counter[int] = field(default_factory=Counter)
    eos: Counter[int] = field(default_factory=Counter)
    starts_with_bos: int = 0
    uncut_without_eos: int = 0
    lengths: list[int] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)


def run(args: Namespace) -> int:
    if (args.config is None) == (args.host_argv is None):
        raise CommandError(
            "give an Axolotl YAML, or `--` and the flags of openrlhf.cli.train_dpo after it."
        )
    with _stdout_to_stderr():
        plan, name = _plan(args)
        counts, shown = _count(plan, args.pair)
        longest = max(counts.lengths)
        memory = estimate(plan, min(longest, plan.max_length or longest))
    warnings = [*_warnings(plan, counts), *plan.warnings]
    if args.json:
        print(json.dumps(_as_json(name, plan, counts, shown, memory, warnings), indent=2))
    else:
        _print(name, plan, counts, shown, memory, args.pair)
        print()
        for warning in warnings:
            print(f"WARNING  {warning}")
        print(f"{len(warnings)} warning{'s' * (len(warnings) != 1)}, no errors")
    return 1 if warnings and args.strict else 0


def _plan(args: Namespace) -> tuple[Plan, str]:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    gpus = max(1, torch.cuda.device_count()) if args.gpus is None else args.gpus
    if gpus < 1:
        raise CommandError(f"--gpus must be at least 1, got {args.gpus}.")
    name = "the OpenRLHF command line"
    try:
        if args.host_argv is not None:
            _need("openrlhf", "an OpenRLHF command line")
            from ..openrlhf import check as openrlhf_check

            return openrlhf_check.plan(args.host_argv, gpus), name
        name = args.config
        if not Path(name).is_file():
            raise CommandError(f"CONFIG must be a YAML file, got {name!r}: there is none.")
        _need("axolotl", "an Axolotl YAML")
        from ..axolotl import check as axolotl_check

        with tempfile.TemporaryDirectory() as scratch:
            return axolotl_check.plan(Path(name), gpus, Path(scratch)), name
    except CommandError:
        raise
    except Exception as error:  # whatever the host finds wrong, it is the user's answer
        if args.debug:
            raise
        raise CommandError(f"{name}: {_one_line(error)}") from None


def _need(module: str, what: str) -> None:
    from importlib.util import find_spec

    if find_spec(module) is None:
        raise CommandError(
            f"{what} is read by {module} itself, which is not installed: "
            f"pip install 'focalpo_plugins[{module}]'."
        )


def _one_line(error: Exception) -> str:
    """The message, in one line; pydantic's validation errors one after the other."""
    errors = getattr(error, "errors", None)
    if callable(errors):
        found = [
            f"{'.'.join(map(str, e['loc']))}: {e['msg']}" if e["loc"] else e["msg"]
            for e in errors()
        ]
        return "; ".join(found)
    message = " ".join(str(error).split())
    return message if isinstance(error, ValueError) else f"{type(error).__name__}: {message}"


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """What hosts print goes to stderr: stdout is for the answer, which may be JSON."""
    python_level, saved = sys.stdout, os.dup(1)
    python_level.flush()
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout = python_level  # Axolotl puts a tee in its place
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


def _count(plan: Plan, number: int) -> tuple[Counts, Pair]:
    """Count over all pairs, and pick the one that is shown."""
    from tqdm import tqdm

    if not 0 <= number < plan.kept:
        raise CommandError(f"--pair must be from 0 to {plan.kept - 1}, got {number}.")
    bos, eos = plan.tokenizer.bos_token_id, plan.tokenizer.eos_token_id
    is_blank = blank(plan.tokenizer)
    counts, shown = Counts(), None
    for place, pair in enumerate(tqdm(plan.pairs, total=plan.kept, unit="pair", leave=False)):
        if place == number:
            shown = pair
        counts.pairs += 1
        counts.truncated += pair.truncated
        sides = (pair.chosen, pair.rejected)
        answers = [_answer(side) for side in sides]
        wrong = faults(answers[0], answers[1], is_blank)
        counts.identical += "identical" in wrong
        counts.empty += "empty" in wrong
        for side, answer in zip(sides, answers, strict=True):
            counts.lengths.append(len(side.ids))
            counts.trained.append(len(answer))
            counts.bos[side.ids.count(bos)] += 1
            counts.eos[answer.count(eos)] += 1
            counts.starts_with_bos += side.ids[:1] == [bos]
            counts.doubled_bos += bos != eos and side.ids[:2] == [bos, bos]
            counts.bos_in_answer += bos != eos and bos in answer
            counts.uncut_without_eos += not pair.truncated and eos not in answer
    assert shown is not None
    return counts, shown


def _answer(side: Sequence) -> list[int]:
    return [token for token, trained in zip(side.ids, side.trained, strict=True) if trained]


def _reversal(plan: Plan) -> float:
    return -math.inf if plan.loss is None else plan.loss.reversal()


def _first_loss(plan: Plan) -> float:
    """At margin 0; label smoothing changes nothing there."""
    import torch

    return math.log(2) if plan.loss is None else plan.loss(torch.zeros(1).double()).item()


def _warnings(plan: Plan, counts: Counts) -> list[str]:
    found = []
    if plan.loss is None:
        found.append(
            f"the loss is the host's own, {plan.host_loss}: no loss of focalpo_plugins is asked "
            "for (rl: focalpo in Axolotl, --loss focalpo in OpenRLHF)."
        )
    if plan.precision == "fp16":
        found.append(
            "fp16: summed log-probabilities and their gradients leave its range easily. Use bf16."
        )
    star = _reversal(plan)
    if star > -math.inf and (-star / plan.beta < _FEW_NATS or -star < _NEAR_MARGIN):
        found.append(
            f"beta {plan.beta:g} is large for this gamma: z* = {star:.2f} is reached where the "
            f"log-ratios differ by {-star / plan.beta:.3g} nats, which many pairs could pass; from "
            "there on they are pushed the wrong way. Lower gamma or beta, and watch the log's "
            "share `reversed`."
        )
    if counts.doubled_bos:
        found.append(
            f"BOS doubled at the start of {_share(counts.doubled_bos, 2 * counts.pairs)} of the "
            "sequences: template and tokenizer both write it. Take it out of the template."
        )
    if counts.bos_in_answer:
        found.append(
            f"BOS in {_share(counts.bos_in_answer, 2 * counts.pairs)} of the answers: the host "
            "took more than the answer for it, as Axolotl's chat_template strategies do where an "
            "answer is empty. Remove those pairs."
        )
    bos = plan.tokenizer.bos_token_id
    adds_bos = bos is not None and plan.tokenizer("a")["input_ids"][:1] == [bos]
    without_bos = 2 * counts.pairs - counts.starts_with_bos
    if adds_bos and without_bos:
        found.append(
            f"no BOS at the start of {_share(without_bos, 2 * counts.pairs)} of the sequences, "
            "though this tokenizer puts one before a text."
        )
    if counts.uncut_without_eos:
        found.append(
            f"no EOS ({plan.tokenizer.eos_token}) in "
            f"{_share(counts.uncut_without_eos, 2 * counts.pairs)} of the answers, uncut ones: the "
            "model is not taught to stop. The template has to end an answer with the tokenizer's "
            "EOS."
        )
    for what, why in (
        ("empty", "there is nothing in one answer to train on"),
        ("identical", "their margin stays 0, and they only dilute the batch"),
    ):
        number = getattr(counts, what)
        if number:
            found.append(f"{_share(number, counts.pairs)} of the pairs are {what}: {why}.")
    if counts.truncated > _MUCH_CUT * counts.pairs:
        found.append(
            f"{_share(counts.truncated, counts.pairs)} of the pairs are truncated to "
            f"{plan.max_length} tokens."
        )
    dropped = plan.rows - plan.kept
    if dropped > _MUCH_CUT * plan.rows:
        found.append(f"{_share(dropped, plan.rows)} of the pairs are dropped as too long.")
    return found


def _share(number: int, total: int) -> str:
    return f"{100 * number / max(total, 1):.3g} %"


def _print(
    name: str, plan: Plan, counts: Counts, shown: Pair, memory: Estimate | None, number: int
) -> None:
    def line(title: str, text: str) -> None:
        print(f"{title:<9}{text}")

    line("run", f"{name}, read by {plan.host}")
    for note in plan.notes:
        line("", note)
    star = _reversal(plan)
    described = f"{plan.host_loss} (the host's own)"
    if plan.loss is not None:
        options = (
            f"{key}={value}" for key, value in plan.loss.options.items() if value is not False
        )
        described = " ".join([plan.loss.name, *options])
    line("loss", f"{described}, beta={plan.beta:g}, label smoothing {plan.label_smoothing:g}")
    line("", f"predicted first loss {_first_loss(plan):.4f} (DPO: 0.6931)")
    if star > -math.inf:
        line(
            "",
            f"z* = {star:.2f}: pairs whose log-ratios differ by more than {-star / plan.beta:.4g} "
            "nats the wrong way are pushed further",
        )
    dropped = plan.rows - plan.kept
    line("data", f"{plan.rows} pairs, {dropped} dropped by the host ({_share(dropped, plan.rows)})")
    shares = [
        f"{what} {_share(getattr(counts, what), counts.pairs)}"
        for what in ("truncated", "identical", "empty")
    ]
    limit = f"cut at {plan.max_length}" if plan.max_length else "never cut"
    line("", f"of the {counts.pairs} trained on: {', '.join(shares)}")
    line(
        "tokens", f"sequences {_spread(counts.lengths)}, {limit}; answers {_spread(counts.trained)}"
    )
    for title, what, counter in (
        ("BOS", "of a sequence", counts.bos),
        ("EOS", "of an answer", counts.eos),
    ):
        token = getattr(plan.tokenizer, f"{title.lower()}_token")
        times = ", ".join(
            f"{n} in {_share(times, 2 * counts.pairs)}" for n, times in sorted(counter.items())
        )
        line("", f"{title} {token!r}, times in the tokens {what}: {times}")
    ranks = f"{plan.data_ranks} rank{'s' * (plan.data_ranks != 1)}"
    among = "--gpus" if plan.data_ranks == plan.ranks else f"of --gpus {plan.ranks}"
    line(
        "batch",
        f"{plan.micro_batch} pairs x {plan.accumulation} accumulated x {ranks} ({among}) = "
        f"{_batch(plan)} pairs a step",
    )
    line("", f"{_steps(plan.epoch_steps)} an epoch, {_steps(plan.steps)} in the run")
    _print_memory(plan, memory, line)
    print(f"\npair {number}, as the model gets it; [masked] tokens are not trained on")
    for side in ("chosen", "rejected"):
        sequence = getattr(shown, side)
        masked = sequence.trained.count(False)
        print(f"{side}: {masked} masked, {len(sequence.ids) - masked} trained on")
        print("  " + _rendered(plan.tokenizer, sequence))


def _batch(plan: Plan) -> int:
    return plan.micro_batch * plan.accumulation * plan.data_ranks


def _steps(number: float) -> str:
    return f"{number:.6g} step{'s' * (number != 1)}"


def _spread(values: list[int]) -> str:
    return f"{min(values)} to {max(values)} (median {statistics.median(values):g})"


def _print_memory(plan: Plan, memory: Estimate | None, line: Any) -> None:
    if memory is None:
        line("memory", "not estimated under FSDP")
        return
    state = plan.state
    sharding = f"ZeRO stage {state.zero_stage}" if state.zero_stage else "no sharding"
    parts = [
        f"{part} {_size(getattr(memory, part))}"
        for part in ("weights", "gradients", "optimizer", "reference")
    ]
    line("memory", f"{_size(memory.state)} of state a rank ({sharding}): {', '.join(parts)}")
    if memory.reference_before:
        line("", f"reference {_size(memory.reference_before)} besides, before the first step alone")
    if state.offloaded:
        line("", f"held by the CPU: {', '.join(sorted(state.offloaded))}")
    line("", f"{memory.parameters:,} parameters, {memory.trained:,} trained, {plan.precision}")
    if state.logits_at_once is not None:
        line("", f"logits at most {_size(memory.logits)} besides: the loss takes them in parts")
    elif memory.logits:
        line(
            "",
            f"logits {_size(memory.logits)} besides: 2 x {plan.micro_batch} sequences of "
            f"the longest length x vocabulary x 4 bytes, once; autograd keeps more",
        )
    line("", f"formula: {FORMULA}")
    line("", f"left out: {LEFT_OUT}")


def _size(number: float) -> str:
    return f"{number / GIB:.2f} GiB" if number >= GIB / 10 else f"{number / 2**20:.1f} MiB"


def _rendered(tokenizer: Any, sequence: Sequence) -> str:
    """Token by token, a bar between them and brackets around runs that are masked."""
    runs: list[tuple[bool, list[str]]] = []
    for text, trained in zip(_texts(tokenizer, sequence.ids), sequence.trained, strict=True):
        if not runs or runs[-1][0] != trained:
            runs.append((trained, []))
        runs[-1][1].append(text)
    parts = []
    for trained, texts in runs:
        if len(texts) > _SHOWN:
            skipped = len(texts) - _SHOWN
            half = _SHOWN // 2
            texts = [*texts[:half], f" ... {skipped} tokens ... ", *texts[-half:]]
        joined = "|".join(texts)
        parts.append(joined if trained else f"[{joined}]")
    return " ".join(parts)


def _texts(tokenizer: Any, ids: list[int]) -> list[str]:
    return [tokenizer.decode([token]).replace("\n", "\\n") for token in ids]


def _as_json(
    name: str,
    plan: Plan,
    counts: Counts,
    shown: Pair,
    memory: Estimate | None,
    warnings: list[str],
) -> dict[str, Any]:
    star = _reversal(plan)
    whole: dict[str, Any] = dict(vars(counts))  # asdict() can't copy a Counter
    for key in ("lengths", "trained"):
        values = whole.pop(key)
        whole[key] = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    sides = {
        side: {
            "ids": (sequence := getattr(shown, side)).ids,
            "tokens": _texts(plan.tokenizer, sequence.ids),
            "trained": sequence.trained,
        }
        for side in ("chosen", "rejected")
    }
    return {
        "run": name,
        "host": plan.host,
        "notes": plan.notes,
        "loss": plan.host_loss if plan.loss is None else plan.loss.name,
        "options": {} if plan.loss is None else dict(plan.loss.options),
        "beta": plan.beta,
        "label_smoothing": plan.label_smoothing,
        "z_star": star if star > -math.inf else None,
        "first_loss": _first_loss(plan),
        "rows": plan.rows,
        "dropped": plan.rows - plan.kept,
        "max_length": plan.max_length,
        "counts": whole,
        "micro_batch": plan.micro_batch,
        "accumulation": plan.accumulation,
        "ranks": plan.ranks,
        "batch": _batch(plan),
        "epoch_steps": plan.epoch_steps,
        "steps": plan.steps,
        "precision": plan.precision,
        "zero_stage": plan.state.zero_stage,
        "memory_bytes": None if memory is None else {**vars(memory), "state": memory.state},
        "pair": sides,
        "warnings": warnings,
    }
