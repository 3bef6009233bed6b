"""The answer of ``focalpo check``, as text and as JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

from ...plan import Pair, Plan, Tokens
from .batches import FourWays, Way
from .counts import Counts, share
from .memory import FORMULA, GIB, LEFT_OUT, Estimate, Room

_SHOWN = 80  # tokens of a prompt


class Names(NamedTuple):
    """What the user calls the number of ranks, and the memory of a GPU in GiB."""

    gpus: str
    gpu_memory: str


OF_COMMAND = Names("--gpus", "--gpu-memory")
OF_FUNCTION = Names("gpus", "gpu_memory")

# A line's title, empty if it continues the line above; and its text.
_Lines = Iterator[tuple[str, str]]


def print_text(
    name: str,
    plan: Plan,
    counts: Counts | None,
    shown: Pair | None,
    ways: FourWays | None,
    memory: Estimate | None,
    room: Room | None,
    number: int,
    names: Names,
) -> None:
    """Print the answer; if ``counts`` and ``shown`` are None, print only what needs no data."""
    lines = [*_of_run(name, plan), *_of_loss(plan), *_of_data(plan, counts)]
    lines += [*_of_batch(plan, counts, names), *_of_ways(ways)]
    lines += _of_memory(plan, ways, memory, room, names)
    for title, text in lines:
        print(f"{title:<9}{text}")
    if shown is None:
        return
    print(f"\npair {number}, as the model gets it; [masked] tokens are not trained on")
    for side in ("chosen", "rejected"):
        sequence = getattr(shown, side)
        masked = sequence.trained.count(False)
        print(f"{side}: {masked} masked, {len(sequence.ids) - masked} trained on")
        print("  " + _rendered(plan.tokenizer, sequence))


def _of_run(name: str, plan: Plan) -> _Lines:
    yield "run", f"{name}, read by {plan.host}"
    for note in plan.notes:
        yield "", note


def _of_loss(plan: Plan) -> _Lines:
    described = f"{plan.host_loss} (the host's own)"
    if plan.loss is not None:
        options = (f"{key}={value}" for key, value in plan.loss.shown().items())
        described = " ".join([plan.loss.name, *options])
    yield "loss", f"{described}, beta={plan.beta:g}, label smoothing {plan.label_smoothing:g}"
    first, star = plan.first_loss(), plan.reversal()
    if plan.margin != "dpo":
        yield "", f"margin {plan.margin}, without a reference: the first loss can't be predicted"
    elif first is None:
        yield (
            "",
            "the first loss can't be predicted: terms are added, or the margins don't start at 0",
        )
    else:
        yield "", f"predicted first loss {first:.4f} (DPO: 0.6931)"
    if star > -math.inf and plan.margin != "dpo":
        yield "", f"z* = {star:.2f}: pairs with a lower margin are pushed further the wrong way"
    elif star > -math.inf:
        yield (
            "",
            f"z* = {star:.2f}: pairs whose log-ratios differ by more than {-star / plan.beta:.4g} "
            "nats the wrong way are pushed further",
        )


def _of_data(plan: Plan, counts: Counts | None) -> _Lines:
    if counts is None:
        yield "data", f"not read; sequences taken as {plan.max_length} tokens long, the limit"
        return
    dropped = plan.rows - plan.kept
    yield "data", f"{plan.rows} pairs, {dropped} dropped by the host ({share(dropped, plan.rows)})"
    for text in plan.formats:
        yield "", text
    shares = [
        f"{what} {share(getattr(counts, what), counts.pairs)}"
        for what in ("truncated", "identical", "empty")
    ]
    yield "", f"of the {counts.pairs} trained on: {', '.join(shares)}"
    limit = f"cut at {plan.max_length}" if plan.max_length else "never cut"
    lengths, trained = _spread(counts.lengths), _spread(counts.trained)
    yield "tokens", f"sequences {lengths}, {limit}; answers {trained}"
    for title, what, counter in (
        ("BOS", "of a sequence", counts.bos),
        ("EOS", "of an answer", counts.eos),
    ):
        token = getattr(plan.tokenizer, f"{title.lower()}_token")
        times = ", ".join(
            f"{n} in {share(times, 2 * counts.pairs)}" for n, times in sorted(counter.items())
        )
        yield "", f"{title} {token!r}, times in the tokens {what}: {times}"


def _of_batch(plan: Plan, counts: Counts | None, names: Names) -> _Lines:
    ranks = f"{plan.data_ranks} rank{'s' * (plan.data_ranks != 1)}"
    among = names.gpus if plan.data_ranks == plan.ranks else f"of {names.gpus} {plan.ranks}"
    yield (
        "batch",
        f"{_pairs(plan.micro_batch)} x {plan.accumulation} accumulated x {ranks} ({among}) = "
        f"{_pairs(_batch(plan))} a step",
    )
    if counts is None:
        return
    yield "", f"{_steps(plan.epoch_steps)} an epoch, {_steps(plan.steps)} in the run"


def _of_ways(ways: FourWays | None) -> _Lines:
    if ways is None:
        return
    plain, shown = ways.ways["plain"], []
    for name, way in ways.ways.items():
        said = [f"{way.tokens_per_step:,.0f} tokens"] if way is plain else []
        said += ["this run"] if name == ways.of_run else []
        ratio = way.tokens_per_step / plain.tokens_per_step
        said += [f"saves {1 - ratio:.0%}"] if ratio < 0.995 else []
        shown.append(f"{name} {ratio:.2f}" + (f" ({', '.join(said)})" if said else ""))
    yield "", f"critical path a step: {', '.join(shown)}"
    of_plain = "" if ways.planned is plain else f"; plain: {_largest(plain)}"
    yield "", f"largest micro-batch: {_largest(ways.planned)}{of_plain}"


def _largest(way: Way) -> str:
    largest = way.largest
    pairs = _pairs(largest.pairs)
    return f"{largest.tokens:,} tokens ({pairs}) in step {largest.step}, epoch {largest.epoch}"


def _pairs(number: int) -> str:
    return f"{number} pair{'s' * (number != 1)}"


def _of_memory(
    plan: Plan, ways: FourWays | None, memory: Estimate | None, room: Room | None, names: Names
) -> _Lines:
    if memory is None:
        yield "memory", f"not estimated with {plan.state.unknown or 'FSDP'}"
        return
    state = plan.state
    sharding = f"ZeRO stage {state.zero_stage}" if state.zero_stage else "no sharding"
    parts = [
        f"{part} {_size(getattr(memory, part))}"
        for part in ("weights", "gradients", "optimizer", "reference")
    ]
    yield "memory", f"{_size(memory.state)} of state a rank ({sharding}): {', '.join(parts)}"
    if memory.reference_before:
        before = _size(memory.reference_before)
        yield "", f"also reference {before}, but only before the first step"
    if state.offloaded:
        yield "", f"held by the CPU: {', '.join(sorted(state.offloaded))}"
    wider = ", embeddings, norms and output layer fp32" if state.in_float32 else ""
    numbers = f"{memory.parameters:,} parameters, {memory.trained:,} trained"
    yield "", f"{numbers}, {plan.precision}{wider}"
    logits = _size(memory.logits)
    if state.logits_at_once is not None:
        yield "", f"also logits, at most {logits}: the loss takes them in parts"
    elif memory.logits:
        yield (
            "",
            f"also logits {logits}: {_of_logits(plan, ways)} x vocabulary x 4 bytes, once; "
            "autograd keeps more",
        )
    least = f"a rank needs more than {_size(memory.least)}"
    if room is None:
        yield "", f"{least}; {names.gpu_memory}, in GiB, says whether that fits"
    elif memory.least > room.size:
        yield "", f"does not fit: {least}, and {room.said} has {_size(room.size)}"
    else:
        left = _size(room.size - memory.least)
        yield "", f"may fit: {least}; {room.said} leaves {left} for what is left out"
    yield "", f"formula: {FORMULA}"
    yield "", f"left out: {LEFT_OUT}"


def _of_logits(plan: Plan, ways: FourWays | None) -> str:
    if ways is None:
        return f"2 x {plan.micro_batch} sequences of {plan.max_length} tokens"
    return f"{ways.planned.logits:,} tokens at most in a micro-batch of the run"


def _batch(plan: Plan) -> int:
    return plan.micro_batch * plan.accumulation * plan.data_ranks


def _steps(number: float) -> str:
    return f"{number:.6g} step{'s' * (number != 1)}"


def _spread(values: list[int]) -> str:
    return f"{min(values)} to {max(values)} (median {statistics.median(values):g})"


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
    ways: FourWays | None,
    memory: Estimate | None,
    warnings: list[str],
) -> dict[str, Any]:
    """The answer; everything about data is left out if none was read."""
    star = plan.reversal()
    answer: dict[str, Any] = {
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
    if counts is not None and shown is not None:
        answer |= _json_of_data(plan, counts, shown) | _json_of_ways(ways)
    return answer


def _json_of_data(plan: Plan, counts: Counts, shown: Pair) -> dict[str, Any]:
    whole: dict[str, Any] = dict(vars(counts))  # asdict() can't copy a Counter
    del whole["in_common"]
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
        "rows": plan.rows,
        "dropped": plan.rows - plan.kept,
        "formats": plan.formats,
        "counts": whole,
        "epoch_steps": plan.epoch_steps,
        "steps": plan.steps,
        "pair": sides,
    }


def _json_of_ways(ways: FourWays | None) -> dict[str, Any]:
    if ways is None:
        return {}
    return {
        "way": ways.of_run,
        "tokens_per_step": {name: way.tokens_per_step for name, way in ways.ways.items()},
        "largest_micro_batch": {name: vars(way.largest) for name, way in ways.ways.items()},
    }
