"""``focalpo score``: implicit rewards and margins of a preference file."""

from __future__ import annotations

import hashlib
import json
import math
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import FocalPOError, InvalidValue
from ...loss import check_beta
from .. import CommandError
from ..output import Output, write
from .beta import DEFAULT, beta_of
from .scores_file import NAMES, append, identity_of, read_scores
from .summary import draw, groups_of, histogram, print_summary, with_rewards

_START_OF_SUMMARY = json.dumps({"focalpo_score": 1}, indent=2).removesuffix("\n}")
_COLUMNS = ["from", "to", "reference_right", "reference_wrong"]


def run(args: Namespace) -> int:
    _check(args)
    header: dict[str, Any] = {"focalpo_score": 1}
    header |= {"policy": identity_of(args.model), "reference": identity_of(args.ref)}
    others = {"summary.json": _START_OF_SUMMARY}
    output = Output(args, "scores", {"histogram": ",".join(_COLUMNS)}, others)
    try:
        from ...trl.score import PairScorer
        from ...trl.score_models import resolve
    except ImportError as error:
        raise CommandError(
            f"scoring needs TRL, which prepares the data, and {error.name} is not installed: "
            "pip install 'focalpo_plugins[trl]'."
        ) from None
    with _library_errors("MODEL and --ref were looked up", args.debug):
        sources = resolve(args.model, args.ref)
    beta, why = beta_of(args.beta, Path(args.model))
    for note in (*(source.note for source in sources if source.note), why):
        print(note)
    header |= {"data": hashlib.sha256(Path(args.data).read_bytes()).hexdigest(), "beta": beta}
    header |= {"max_length": args.max_length, "dtype": args.dtype}
    given = (("policy", "MODEL", args.model), ("reference", "--ref", args.ref))
    header[NAMES] = {key: [word, path] for key, word, path in (*given, ("data", "DATA", args.data))}
    for role, source in zip(("policy", "reference"), sources, strict=True):
        if source.base is not None:
            header[f"{role}_base"] = identity_of(source.base)

    scores = output.folder / "scores.jsonl"
    done = read_scores(scores, header)
    if done:
        print(f"{scores} has {len(done)} pairs already; resuming after them")
    with _library_errors("MODEL, --ref and DATA were loaded", args.debug):
        scorer = PairScorer(*sources, Path(args.data), max_length=args.max_length, dtype=args.dtype)
    print(f"{len(scorer.rows)} pairs of {args.data}: {scorer.form}")
    if not scores.exists() or scores.stat().st_size == 0:
        append(scores, [header])
    done |= _score(args, scorer, scores, beta, done)

    records = [done[row] for row in sorted(done)]
    dropped = scorer.total - len(records)
    summary = {**header, "rows": scorer.total, "dropped": dropped, "groups": groups_of(records)}
    of_summary = write(output.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    print_summary(summary)
    edges, counts = histogram(records)
    table = [_COLUMNS, *zip(edges, edges[1:], *counts, strict=False)]
    of_histogram = output.save("histogram", table, partial(draw, edges=edges, counts=counts))
    output.say([scores, of_summary, *of_histogram])
    return 0


def _check(args: Namespace) -> None:
    try:
        check_beta(DEFAULT if args.beta is None else args.beta)
    except InvalidValue as error:
        raise CommandError(f"--{error}") from None
    for flag in ("batch_size", "max_length"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise CommandError(f"--{flag.replace('_', '-')} must be at least 1, got {value}.")
    if not Path(args.data).is_file():
        raise CommandError(f"DATA must be a file, got {args.data!r}: there is none.")


def _score(
    args: Namespace, scorer: Any, scores: Path, beta: float, done: dict[int, dict[str, Any]]
) -> dict[int, dict[str, Any]]:
    """The records of the pairs that are not ``done``, by row; each batch is written at once."""
    from tqdm import tqdm

    found: dict[int, dict[str, Any]] = {}
    waiting = [place for place, row in enumerate(scorer.rows) if row not in done]
    with tqdm(total=len(scorer.rows), initial=len(done), unit="pair") as bar:
        for start in range(0, len(waiting), args.batch_size):
            batch = waiting[start : start + args.batch_size]
            rows = ", ".join(str(scorer.rows[place]) for place in batch)
            with _library_errors(f"rows {rows} were scored", args.debug, scores):
                scored = scorer.score(batch)
            _check_finite(scored)
            records = [with_rewards(each, beta) for each in scored]
            append(scores, records)
            found |= {record["row"]: record for record in records}
            bar.update(len(batch))
    return found


@contextmanager
def _library_errors(doing: str, debug: bool, scores: Path | None = None) -> Iterator[None]:
    """Make a library's error one line with its type; this package's own are left as they are.

    Args:
        doing: what was being done, in the past.
        debug: leave the error as it is, with its traceback.
        scores: the file from which the next run continues, if there is one.
    """
    try:
        yield
    except FocalPOError:
        raise
    except Exception as error:
        if debug:
            raise
        rest = "" if scores is None else f" Run it again to go on after the pairs in {scores}."
        text = " ".join(str(error).split())
        raise CommandError(
            f"{type(error).__name__}: {text}. A library raised it while {doing}; --debug shows "
            f"where.{rest}"
        ) from error


def _check_finite(scored: Sequence[dict[str, Any]]) -> None:
    for found in scored:
        for name, prefix in (("MODEL", ""), ("--ref", "ref_")):
            for side in ("chosen", "rejected"):
                if not math.isfinite(logp := found[f"{prefix}{side}_logp"]):
                    raise CommandError(
                        f"{name} must give finite log-probabilities, got {logp} for the {side} "
                        f"answer of row {found['row']}: its weights are not finite, or leave the "
                        "range of their dtype. Give another model, or --dtype float32."
                    )
