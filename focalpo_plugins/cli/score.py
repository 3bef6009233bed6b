"""``focalpo score``: implicit rewards and margins of a preference file."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

from ..errors import FocalPOError, InvalidValue
from ..guards.resume import RECORD_FILE, of_trainer_state
from . import CommandError, named, output_folder, write, writing
from .plots import pyplot, save

_BETA = 0.1  # TRL's, Axolotl's and OpenRLHF's default
_BINS = 40
# Weights, config, tokenizer and chat template.
_OF_A_MODEL = (".json", ".safetensors", ".bin", ".jinja", ".model", ".txt")
# What our files begin with.
_OF_SCORES = json.dumps({"focalpo_score": 1}).removesuffix("}")
_OF_SUMMARY = json.dumps({"focalpo_score": 1}, indent=2).removesuffix("\n}")
_COLUMNS = ["from", "to", "reference_right", "reference_wrong"]
_GROUPS = {"all pairs": None, "reference ranks right": True, "reference ranks wrong": False}


def run(args: Namespace) -> int:
    from ..loss import check_beta

    try:
        check_beta(_BETA if args.beta is None else args.beta)
    except InvalidValue as error:
        raise CommandError(f"--{error}") from None
    for flag in ("batch_size", "max_length"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise CommandError(f"--{flag.replace('_', '-')} must be at least 1, got {value}.")
    data = Path(args.data)
    if not data.is_file():
        raise CommandError(f"DATA must be a file, got {args.data!r}: there is none.")
    identities = [_identity(args.model), _identity(args.ref)]
    draws = {"png", "svg"} & set(args.format)
    plt = pyplot() if draws else None
    pictures = named({"histogram": ",".join(_COLUMNS)}, args.format)
    folder = output_folder(args.out, {"summary.json": _OF_SUMMARY, **pictures})
    try:
        from ..trl.score import PairScorer, resolve
    except ImportError as error:
        raise CommandError(
            f"scoring needs TRL, which prepares the data, and {error.name} is not installed: "
            "pip install 'focalpo_plugins[trl]'."
        ) from None
    with _library_errors("MODEL and --ref were looked up", args.debug):
        sources = resolve(args.model, args.ref)
    beta, why = _beta(args.beta, Path(args.model))
    for note in (*(source.note for source in sources if source.note), why):
        print(note)

    header = {
        "focalpo_score": 1,
        "policy": identities[0],
        "reference": identities[1],
        "data": hashlib.sha256(data.read_bytes()).hexdigest(),
        "beta": beta,
        "max_length": args.max_length,
        "dtype": args.dtype,
    }
    for role, source in zip(("policy", "reference"), sources, strict=True):
        if source.base is not None:
            header[f"{role}_base"] = _identity(source.base)
    scores = folder / "scores.jsonl"
    done = _resume(scores, header)
    if done:
        print(f"{scores} has {len(done)} pairs already; going on from there")
    with _library_errors("MODEL, --ref and DATA were loaded", args.debug):
        scorer = PairScorer(
            args.model, args.ref, data, max_length=args.max_length, dtype=args.dtype
        )
    print(f"{len(scorer.rows)} pairs of {data}: {scorer.form}")

    from tqdm import tqdm

    waiting = [place for place, row in enumerate(scorer.rows) if row not in done]
    if not scores.exists() or scores.stat().st_size == 0:
        _append(scores, [header])
    with tqdm(total=len(scorer.rows), initial=len(done), unit="pair") as bar:
        for start in range(0, len(waiting), args.batch_size):
            batch = waiting[start : start + args.batch_size]
            rows = ", ".join(str(scorer.rows[place]) for place in batch)
            with _library_errors(f"rows {rows} were scored", args.debug, scores):
                scored = scorer.score(batch)
            for found in scored:
                _check_finite(found)
            records = [_with_rewards(found, beta) for found in scored]
            _append(scores, records)
            done |= {record["row"]: record for record in records}
            bar.update(len(batch))

    records = [done[row] for row in sorted(done)]
    summary = {**header, "rows": scorer.total, "dropped": scorer.total - len(records)}
    summary["groups"] = {name: _summary(records, right) for name, right in _GROUPS.items()}
    written = [scores, write(folder / "summary.json", json.dumps(summary, indent=2) + "\n")]
    _print_summary(summary)
    edges, counts = _histogram(records)
    if "csv" in args.format:
        table = StringIO()
        writer = csv.writer(table)
        writer.writerow(_COLUMNS)
        writer.writerows(zip(edges, edges[1:], *counts, strict=False))
        written.append(write(folder / "histogram.csv", table.getvalue()))
    if plt is not None:
        written += save(_draw(plt, edges, counts), folder, "histogram", args.format)
    print("wrote " + ", ".join(map(str, written)))
    return 0


@contextmanager
def _library_errors(doing: str, debug: bool, scores: Path | None = None) -> Iterator[None]:
    """Make a library's error one line with its type; this package's own are left as they are.

    Args:
        doing: what was being done, in the past.
        debug: leave the error as it is, with its traceback.
        scores: the file that the next run goes on with, if there is one.
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


def _append(scores: Path, records: Iterable[dict[str, Any]]) -> None:
    with writing(scores), scores.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))


def _beta(asked: float | None, model: Path) -> tuple[float, str]:
    """The beta to score with, and a note: where it is from, or that training used another."""
    recorded, place = _recorded_beta(model)
    if recorded is None:
        if asked is not None:
            return asked, f"beta {asked:g}, from --beta"
        why = "MODEL does not say what it was trained with" + f" ({place})" * bool(place)
        return _BETA, f"beta {_BETA:g}, the default: {why}"
    if asked is None:
        return recorded, f"beta {recorded:g}, which MODEL was trained with ({place})"
    if asked != recorded:
        return asked, (
            f"warning: beta {asked:g}, from --beta, where MODEL was trained with {recorded:g} "
            f"({place})"
        )
    return asked, f"beta {asked:g}, from --beta, which MODEL was trained with ({place})"


def _recorded_beta(model: Path) -> tuple[float | None, str]:
    """The beta of the newest record that can be read, None without one; and the record's file.

    Records are in the model's folder and in checkpoints inside it.  If the model was made from a
    checkpoint or an adapter, they are also in the folder of that.  The newest is the one written
    last: a folder that is used again keeps checkpoints of the run before, maybe of a longer one.
    """
    from ..loss import check_beta

    if not model.is_dir():
        return None, ""
    folders = [model]
    if model.name == "merged":  # Axolotl's merge-lora, in the adapter's folder
        folders.append(model.parent)
    elif model.name.endswith("_hf"):  # OpenRLHF's --ckpt.save_hf, beside the checkpoint
        folders.append(model.with_name(model.name.removesuffix("_hf")))
    for folder in folders:
        inside = [place for pattern in _CHECKPOINTS for place in folder.glob(pattern)]
        found: list[tuple[int, int, float | None, Path]] = []
        for place in (folder, *inside):
            for name, record_of in _RECORDS.items():
                try:
                    record = record_of(json.loads((place / name).read_text(encoding="utf-8")))
                    beta = None if record is None else record["beta"]  # not a run with this package
                    if beta is not None:
                        check_beta(beta)
                    written = (place / name).stat().st_mtime_ns
                except (OSError, ValueError, TypeError, LookupError, AttributeError):
                    continue  # there is no record, or the run was killed while it wrote one
                step = int("".join(re.findall(r"\d+$", place.name)) or -1)
                found.append((written, step, beta, place / name))
        if found:
            *_, beta, newest = max(found, key=lambda each: each[:2])
            older = {of: file for *_, of, file in sorted(found, key=lambda each: each[:2])}
            said = [
                f"{file}, which is older, {'has none' if of is None else f'says {of:g}'}"
                for of, file in older.items() if of != beta
            ]  # fmt: skip
            if beta is not None or said:
                return beta, "; ".join([str(newest), *said])
    return None, ""


# Where hosts write what a checkpoint was trained with, and how to read it.
_CHECKPOINTS = ("checkpoint-*", "global_step*", "*/global_step*")
_RECORDS: dict[str, Callable[[Any], Any]] = {
    "trainer_state.json": of_trainer_state,
    RECORD_FILE: dict,
}


def _identity(model: str) -> str:
    """An identifier of a model: a hash of a folder's contents, or a hub name."""
    folder = Path(model)
    if not folder.is_dir():
        if folder.is_absolute() or model.startswith("."):
            raise CommandError(f"a model must be a folder or a hub name, got {model!r}.")
        return model
    files = [p for p in sorted(folder.iterdir()) if p.suffix in _OF_A_MODEL and p.is_file()]
    if not any(p.name in ("config.json", "adapter_config.json") for p in files):
        raise CommandError(f"a model folder must hold config.json, got {model!r} without one.")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def _resume(scores: Path, header: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The pairs that an earlier run has scored; an incomplete last line is cut off.

    Raises:
        CommandError: the file is from another run, or is not one of our files.
    """
    if not scores.is_file():
        return {}
    content = scores.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        # Also if the first line is not whole: it is cut off below.
        if not content.startswith(_OF_SCORES.encode()[: len(content)]):
            raise ValueError
        records = [json.loads(line) for line in whole.splitlines()]
        done = {int(record["row"]): record for record in records[1:]}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CommandError(
            f"{scores} is there already, is not a file of `focalpo score`, and is left as it is: "
            "move it, or give another --out."
        ) from None
    if records:
        differing = [key for key in header if records[0].get(key) != header[key]]
        if differing:
            raise CommandError(
                f"{scores} was made with another {differing[0]}, {records[0].get(differing[0])} "
                f"where this run has {header[differing[0]]}: give another --out, or remove it."
            )
    if len(whole) < len(content):
        with writing(scores), scores.open("r+b") as file:
            file.truncate(len(whole))
    return done


def _check_finite(found: dict[str, Any]) -> None:
    for name, prefix in (("MODEL", ""), ("--ref", "ref_")):
        for side in ("chosen", "rejected"):
            if not math.isfinite(logp := found[f"{prefix}{side}_logp"]):
                raise CommandError(
                    f"{name} must give finite log-probabilities, got {logp} for the {side} answer "
                    f"of row {found['row']}: its weights are not finite, or leave the range of "
                    "their dtype. Give another model, or --dtype float32."
                )


def _with_rewards(found: dict[str, Any], beta: float) -> dict[str, Any]:
    """Add rewards ``beta * (log p - log p_ref)``, the margin, and if the reference ranks right."""
    chosen = beta * (found["chosen_logp"] - found["ref_chosen_logp"])
    rejected = beta * (found["rejected_logp"] - found["ref_rejected_logp"])
    return {
        **found,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "margin": chosen - rejected,
        "ref_right": found["ref_chosen_logp"] > found["ref_rejected_logp"],
    }


def _summary(records: Sequence[dict[str, Any]], ref_right: bool | None) -> dict[str, Any]:
    group = [r for r in records if ref_right is None or r["ref_right"] is ref_right]
    n = len(group)
    if n == 0:
        return {"pairs": 0}
    margins = [r["margin"] for r in group]
    mean = sum(margins) / n
    variance = sum((m - mean) ** 2 for m in margins) / (n - 1) if n > 1 else math.nan
    error = math.sqrt(variance / n)
    return {
        "pairs": n,
        "accuracy": sum(m > 0 for m in margins) / n,
        "margin": mean,
        "margin_standard_error": None if math.isnan(error) else error,
        "chosen_reward": sum(r["chosen_reward"] for r in group) / n,
        "rejected_reward": sum(r["rejected_reward"] for r in group) / n,
    }


def _print_summary(summary: dict[str, Any]) -> None:
    print(f"\n{'':<22} {'pairs':>6} {'accuracy':>9} {'margin':>9} {'+- s.e.':>8} "
          f"{'chosen':>9} {'rejected':>9}")  # fmt: skip
    for name, group in summary["groups"].items():
        line = f"{name:<22} {group['pairs']:>6}"
        if group["pairs"]:
            error = group["margin_standard_error"]
            line += f" {group['accuracy']:>9.4f} {group['margin']:>9.4f} "
            line += f"{'-' if error is None else f'{error:.4f}':>8} "
            line += f"{group['chosen_reward']:>9.4f} {group['rejected_reward']:>9.4f}"
        print(line)
    print(
        "\nRewards and margins in nats, at beta "
        f"{summary['beta']:g}. The reference ranks a pair right where the summed\nlog-probability "
        "of the chosen answer is above that of the rejected one; accuracy is the share\nof margins "
        "above 0."
    )
    if summary["dropped"]:
        print(
            f"{summary['dropped']} of {summary['rows']} rows were dropped: their prompt alone "
            "fills --max-length."
        )


def _histogram(records: Sequence[dict[str, Any]]) -> tuple[list[float], list[list[int]]]:
    """Edges of the bins, and each bin's numbers of pairs that the reference ranks right, wrong."""
    margins = [record["margin"] for record in records]
    reach = max(map(abs, margins), default=0) or 1.0
    # Symmetric around 0, so that 0 is an edge: no bin holds margins of both signs.
    edges = [reach * (2 * i / _BINS - 1) for i in range(_BINS + 1)]
    counts = [[0] * _BINS, [0] * _BINS]
    for record in records:
        place = min(int((record["margin"] / reach + 1) / 2 * _BINS), _BINS - 1)
        counts[not record["ref_right"]][place] += 1
    return edges, counts


def _draw(plt: Any, edges: list[float], counts: list[list[int]]) -> Any:
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    names = [
        f"{name} ({sum(group)})" for name, group in zip(list(_GROUPS)[1:], counts, strict=True)
    ]
    axis.stairs(counts[0], edges, fill=True, color="#a6cbe3", edgecolor="#0072B2", label=names[0])
    axis.stairs(counts[1], edges, color="#D55E00", linewidth=1.8, label=names[1])
    axis.axvline(0, color="#888888", linewidth=1)
    axis.set_xlabel("reward margin z (nats); right of 0 the model ranks the pair right")
    axis.set_ylabel("pairs")
    axis.legend(loc="upper left", bbox_to_anchor=(0, 1.14), ncols=2)
    return figure
