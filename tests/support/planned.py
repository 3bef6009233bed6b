"""Prints last, in a line of JSON, a run as `focalpo check` plans it.

``pairs`` has the token ids of each pair's chosen and rejected sequence, ``batches`` a list for each
rank with the pairs of its batches before they are balanced, ``tokens_per_step`` and ``largest`` what
is said of the run's own way.  The first argument is the number of ranks, the second a YAML of
Axolotl's or LLaMA-Factory's, or `--` before OpenRLHF's flags or before `swift rlhf` with its keys.
"""

import contextlib
import json
import math
import sys
import tempfile
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path


def read(gpus, words, scratch):
    if words[:3] == ["--", "swift", "rlhf"]:
        from focalpo_plugins.swift.dry_run import plan

        return plan(words[3:], gpus, scratch)
    if words[0] == "--":
        from focalpo_plugins.openrlhf.dry_run import plan

        return plan(words[1:], gpus)
    host = "axolotl" if find_spec("axolotl") else "llamafactory"
    plan = import_module(f"focalpo_plugins.{host}.dry_run").plan
    return plan(Path(words[0]), gpus, scratch)


def main():
    from focalpo_plugins.cli.check.batches import four_ways
    from focalpo_plugins.cli.check.counts import count

    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        planned = read(int(sys.argv[1]), sys.argv[2:], Path(scratch))
        planned = replace(planned, pairs=list(planned.pairs), windows=list(planned.windows))
        way = four_ways(planned, count(planned, 0)[0]).planned
    pairs = [(pair.chosen.ids, pair.rejected.ids) for pair in planned.pairs]
    batches = [[] for _ in range(planned.data_ranks)]
    for window in planned.windows:
        for place, rows in enumerate(batches_of(window.pairs, planned.geometry)):
            batches[place % planned.data_ranks].append([pairs[row] for row in rows])
    said = {"tokens_per_step": way.tokens_per_step, "largest": vars(way.largest)}
    print(json.dumps({"pairs": pairs, "batches": batches, **said}))


def batches_of(rows, geometry):
    """The batches of a window, micro-step after micro-step and rank after rank; the last ones may be
    smaller."""
    for start in range(0, len(rows), geometry.micro_step):
        step = rows[start : start + geometry.micro_step]
        each = -(-len(step) // geometry.ranks)
        yield from (step[at : at + each] for at in range(0, len(step), each))


def check_trained(plan, files, ranks, balanced):
    """More than an epoch of 12 pairs, five a batch and two batches a step, as accelerate divides them:
    the batches are those that were planned, unless they are balanced, and cost what was said.

    Args:
        plan: what `main` printed.
        files: of each rank, the pairs of its batches in lines of JSON.
    """
    trained = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    sizes = [[5, 5, 2, 5, 5]] if ranks == 1 else [[5] * 4] * 2
    assert [[*map(len, of_rank)] for of_rank in trained] == sizes, trained
    assert trained[0][0] != trained[0][4 - ranks], "the second epoch has the order of the first"
    assert (plan["batches"] == trained) is not balanced, plan["batches"]
    said = plan["tokens_per_step"], plan["largest"]["tokens"], plan["largest"]["pairs"]
    expected = computed(trained, 2)
    assert math.isclose(said[0], expected[0], rel_tol=1e-6), (said, expected)
    assert said[1:] == expected[1:]


def computed(batches, accumulation):
    """The cost of a run with these batches on its ranks, padded: tokens on the critical path of a
    step, and the largest batch with its number of pairs."""
    tokens = [
        [2 * len(batch) * max(len(ids) for pair in batch for ids in pair) for batch in of_rank]
        for of_rank in batches
    ]
    slowest = [max(of_ranks) for of_ranks in zip(*tokens, strict=True)]
    largest = max(map(max, tokens))
    sizes = [
        len(batch)
        for of_rank, sums in zip(batches, tokens, strict=True)
        for batch, total in zip(of_rank, sums, strict=True)
        if total == largest
    ]
    return sum(slowest) / len(slowest) * accumulation, largest, sizes[0]
