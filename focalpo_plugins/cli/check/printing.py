"""The answer of ``focalpo check``, as text and as JSON."""

from __future__ import annotations

import math
import statistics
from typing import Any

from ...plan import Pair, Plan, Tokens
from .counts import Counts, share, tokens_per_step
from .memory import FORMULA, GIB, LEFT_OUT, Estimate

_SHOWN = 80  # tokens of a prompt


def print_text(
    name: str,
    plan: Plan,
    counts: Counts | None,
    shown: Pair | None,
    memory: Estimate | None,
    number: int,
) -> None:
    """Print the answer; if ``counts`` and ``shown`` are None, print only what needs no data."""

    def line(title: str, text: str) -> None:
        print(f"{title:<9}{text}")

    line("run", f"{name}, read by {plan.host}")
    for note in plan.notes:
        line("", note)
    star = plan.reversal()
    described = f"{plan.host_loss} (the host's own)"
    if plan.loss is not None:
        options = (f"{key}={value}" for key, value in plan.loss.shown().items())
        described = " ".join([plan.loss.name, *options])
    line("loss", f"{described}, beta={plan.beta:g}, label smoothing {plan.label_smoothing:g}")
    first = plan.first_loss()
    if plan.margin != "dpo":
        line("", f"margin {plan.margin}, without a reference: the first loss can't be predicted")
    elif first is None:
        line("", "the first loss can't be predicted: it isn't only the loss of a margin of 0")
    else:
        line("", f"predicted first loss {first:.4f} (DPO: 0.6931)")
    if star > -math.inf and plan.margin != "dpo":
        line("", f"z* = {star:.2f}: pairs with a lower margin are pushed further the wrong way")
    elif star > -math.inf:
        line(
            "",
            f"z* = {star:.2f}: pairs whose log-ratios differ by more than {-star / plan.beta:.4g} "
            "nats the wrong way are pushed further",
        )
    ranks = f"{plan.data_ranks} rank{'s' * (plan.data_ranks != 1)}"
    among = "--gpus" if plan.data_ranks == plan.ranks else f"of --gpus {plan.ranks}"
    batch = (
        f"{plan.micro_batch} pairs x {plan.accumulation} accumulated x {ranks} ({among}) = "
        f"{_batch(plan)} pairs a step"
    )
    if counts is None or shown is None:
        line("data", f"not read; sequences taken as {plan.max_length} tokens long, the limit")
        line("batch", batch)
        _print_memory(plan, memory, line)
        return
    dropped = plan.rows - plan.kept
    line("data", f"{plan.rows} pairs, {dropped} dropped by the host ({share(dropped, plan.rows)})")
    shares = [
        f"{what} {share(getattr(counts, what), counts.pairs)}"
        for what in ("truncated", "identical", "empty")
    ]
    for text in plan.formats:
        line("", text)
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
            f"{n} in {share(times, 2 * counts.pairs)}" for n, times in sorted(counter.items())
        )
        line("", f"{title} {token!r}, times in the tokens {what}: {times}")
    line("batch", batch)
    line("", f"{_steps(plan.epoch_steps)} an epoch, {_steps(plan.steps)} in the run")
    tokens = tokens_per_step(plan, counts)
    line(
        "",
        f"{tokens.padded:,.0f} tokens a step as the host pads them, {tokens.unpadded:,.0f} without "
        f"padding, {tokens.shared:,.0f} with shared prompts "
        f"({share(round(tokens.shared), round(tokens.padded))})",
    )
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
    wider = ", embeddings, norms and output layer fp32" if state.in_float32 else ""
    line(
        "", f"{memory.parameters:,} parameters, {memory.trained:,} trained, {plan.precision}{wider}"
    )
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


def _rendered(tokenizer: Any, sequence: Tokens) -> str:
    """The tokens as text, with a bar between tokens and brackets around masked runs."""
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


def as_json(
    name: str,
    plan: Plan,
    counts: Counts | None,
    shown: Pair | None,
    memory: Estimate | None,
    warnings: list[str],
) -> dict[str, Any]:
    """The answer; everything about data is left out if none was read."""
    star = plan.reversal()
    answer = {
        "run": name,
        "host": plan.host,
        "notes": plan.notes,
        "loss": plan.host_loss if plan.loss is None else plan.loss.name,
        "options": {} if plan.loss is None else dict(plan.loss.options),
        "margin": plan.margin,
        "beta": plan.beta,
        "label_smoothing": plan.label_smoothing,
        "z_star": star if star > -math.inf else None,
        "first_loss": plan.first_loss(),
        "max_length": plan.max_length,
        "micro_batch": plan.micro_batch,
        "accumulation": plan.accumulation,
        "ranks": plan.ranks,
        "batch": _batch(plan),
        "precision": plan.precision,
        "zero_stage": plan.state.zero_stage,
        "memory_bytes": None if memory is None else {**vars(memory), "state": memory.state},
        "warnings": warnings,
    }
    if counts is None or shown is None:
        return answer
    whole: dict[str, Any] = dict(vars(counts))  # asdict() can't copy a Counter
    del whole["longer"], whole["in_common"]
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
        **answer,
        "rows": plan.rows,
        "dropped": plan.rows - plan.kept,
        "formats": plan.formats,
        "counts": whole,
        "tokens_per_step": vars(tokens_per_step(plan, counts)),
        "epoch_steps": plan.epoch_steps,
        "steps": plan.steps,
        "pair": sides,
    }
