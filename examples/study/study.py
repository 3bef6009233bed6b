"""How does each loss change the pairs that the reference ranks right, and those it ranks wrong?

Trains DPO, FocalPO at several gammas, `correct_exact` and `incorrect` with Axolotl, all from one
model and, seed by seed, on the same batches; scores held-out pairs with `focalpo score`; and
draws margins, accuracies and weights of both kinds of pairs, and the paired differences from DPO.

    python examples/make_tiny.py
    python examples/study/study.py --out outputs/study

    python examples/study/study.py --model MODEL --data pairs.jsonl --out outputs/my_study \\
        --set sequence_len=512 learning_rate=1e-4 max_steps=100 warmup_steps=10

If you run the same command again, it continues where it stopped; other --gamma and --seeds add
runs. README.md in this folder explains what such a study can show and what it can't.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tqdm import tqdm

from focalpo_plugins.loss import check_beta
from focalpo_plugins.registry import get_loss

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(EXAMPLES)]
from children import child  # noqa: E402

GROUPS = {"right": "reference ranks right", "wrong": "reference ranks wrong"}
RESAMPLES = 10_000
NO_WIDTH = 1e-9  # of an axis
# Evaluation during training would cost time and change nothing: every model is scored at its end.
NOT_IN_A_STUDY = ("test_datasets", "val_set_size", "eval_steps", "evals_per_epoch", "eval_strategy")
# One checkpoint is saved, at the end.
SAVING = ("save_steps", "save_strategy", "saves_per_epoch", "save_first_step", "save_only_model")
OWN_KEYS = ("rl", "seed", "base_model", "datasets", "output_dir", "logging_steps", *SAVING)
# Keys that make Axolotl read a part of a file, or another one: the study reads whole files.
PARTS = ("shards", "shards_idx", "data_files", "name", "revision")
# The one process on a CPU needs no launcher, which takes as long to start as Axolotl itself.
LAUNCHER = () if torch.cuda.is_available() else ("--launcher", "python")
INTERRUPTED = threading.Event()  # by Ctrl-C, which commands in their own session don't get


class StudyError(Exception):
    """An error in the arguments or in a run, in one line for the user."""


@dataclass(frozen=True)
class Loss:
    """One of the losses compared; gamma 0 is DPO to the last bit, with the same tokens."""

    variant: str
    gamma: float

    @property
    def name(self) -> str:
        if self.gamma == 0:
            return "DPO"
        prefix = {"correct": "FocalPO", "correct_exact": "exact", "incorrect": "incorrect"}
        return f"{prefix[self.variant]} {self.gamma:g}"

    @property
    def folder(self) -> str:
        return "dpo" if self.gamma == 0 else f"{self.variant}_{self.gamma:g}"

    def weights(self, margins: np.ndarray) -> np.ndarray:
        """The factor on DPO's gradient of each pair at its margin."""
        bound = get_loss("focalpo").bind(variant=self.variant, gamma=self.gamma)
        weights = bound.weight(torch.from_numpy(margins))
        assert weights is not None
        return weights.numpy()


@dataclass
class Scores:
    """The held-out pairs under one trained model; arrays over the pairs ``(N,)``."""

    margin: np.ndarray
    ranked: np.ndarray  # the policy itself prefers the chosen answer: log p_chosen > log p_rejected
    right: np.ndarray  # the same for the reference
    row: np.ndarray


DPO = Loss("correct", 0.0)


# ---- the material: one train file and one held-out file, with no prompt in both


def conversations(row: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    """The row's pair as two whole conversations.

    Raises:
        ValueError: the row is in none of the forms that preference files have.
    """
    prompt, pair = row.get("prompt"), {side: row.get(side) for side in ("chosen", "rejected")}
    if all(isinstance(answer, str) for answer in pair.values()) and isinstance(prompt, str):
        start = [{"role": "user", "content": prompt}]
        whole = {k: [*start, {"role": "assistant", "content": v}] for k, v in pair.items()}
    elif all(isinstance(answer, list) and answer for answer in pair.values()):
        start = prompt if isinstance(prompt, list) else []
        whole = {k: v if v[: len(start)] == start else [*start, *v] for k, v in pair.items()}
    else:
        raise ValueError("chosen and rejected must both be lists of messages, or both texts "
                         "beside a text prompt")  # fmt: skip
    for side, messages in whole.items():
        if not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages):
            raise ValueError(f"{side} must hold messages with role and content")
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise ValueError(f"{side} must be a prompt and end with the assistant's answer")
    if whole["chosen"][:-1] != whole["rejected"][:-1]:
        raise ValueError("chosen and rejected must answer the same prompt")
    return {
        side: [{"role": m["role"], "content": m["content"]} for m in messages]
        for side, messages in whole.items()
    }


def prompt_of(pair: dict[str, list[dict[str, str]]]) -> str:
    return json.dumps(pair["chosen"][:-1])


def read_pairs(path: Path) -> list[dict[str, list[dict[str, str]]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"{path} can't be read as a preference file: {error}.") from None
    pairs = []
    # A text in JSON may hold line breaks other than \n.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip(" \t"):
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("a row must be an object with chosen and rejected")
            pairs.append(conversations(row))
        except (ValueError, RecursionError) as error:
            raise StudyError(f"{path}, line {number}: {error}.") from None
    if not pairs:
        raise StudyError(f"{path} holds no pairs.")
    return pairs


def split(pairs: list[Any], share: float) -> tuple[list[Any], list[Any]]:
    """Hold out ``share`` of the prompts, with all their pairs; the choice depends only on their
    text."""
    prompts = {prompt_of(pair) for pair in pairs}
    ordered = sorted(prompts, key=lambda text: hashlib.sha256(text.encode()).digest())
    held_out = set(ordered[: round(share * len(ordered))])
    parts: tuple[list[Any], list[Any]] = ([], [])
    for pair in pairs:
        parts[prompt_of(pair) in held_out].append(pair)
    if not all(parts):
        raise StudyError(
            f"--held-out must leave prompts on both sides, got {share} of {len(prompts)} prompts."
        )
    return parts


# ---- the runs


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise StudyError(f"--config must be an Axolotl YAML, got {path}: {error}") from None
    if not isinstance(content, dict):
        raise StudyError(f"--config must be an Axolotl YAML, got {path} without any key.")
    return content


def of_the_loss(key: str) -> bool:
    """Whether the key decides what is trained, which the study sets; focalpo_fused doesn't."""
    return key.startswith("focalpo_") and key != "focalpo_fused"


def base_config(args: argparse.Namespace, config: dict[str, Any]) -> dict[str, Any]:
    """The keys of the YAML that all runs share, without those that a run or the study sets."""
    config = dict(config)
    for word in args.set:
        key, equals, value = word.partition("=")
        if not equals or key in OWN_KEYS or of_the_loss(key):
            raise StudyError(
                f"--set takes KEY=VALUE of Axolotl's keys, got {word!r}; {', '.join(OWN_KEYS)} and "
                "focalpo_*, but for focalpo_fused, are the study's own."
            )
        try:
            config[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise StudyError(f"--set takes KEY=VALUE with a value in YAML, got {word!r}.") from None
    if args.model is not None:
        config["base_model"] = args.model
    at_least_1(config, "max_steps", "The losses are compared after the same number of steps")
    at_least_1(config, "sequence_len", "Pairs are cut to it in training and in scoring")
    beta_of(config)
    return {
        key: value
        for key, value in config.items()
        if key not in (*NOT_IN_A_STUDY, *SAVING) and not of_the_loss(key)
    }


def at_least_1(config: dict[str, Any], key: str, why: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise StudyError(
            f"{key} must be a whole number of at least 1, got {value!r}. {why}. Give --set "
            f"{key}={'100' if key == 'max_steps' else '512'}, for example."
        )
    return value


def beta_of(config: dict[str, Any]) -> float:
    """The beta that Axolotl trains with, which the scores need too."""
    of_trl = config.get("trl") or {}
    if not isinstance(of_trl, dict):
        raise StudyError(f"trl must be a mapping such as {{beta: 0.1}}, got {of_trl!r}.")
    given = {"trl.beta": of_trl.get("beta"), "rl_beta": config.get("rl_beta")}
    if given["rl_beta"] is None:
        given["dpo_beta"] = config.get("dpo_beta")  # its name before
    found = {}
    for key, value in given.items():
        if value is not None:
            try:
                found[key] = float(value)
                check_beta(found[key])
            except (TypeError, ValueError):
                raise StudyError(f"{key} must be a number above 0, got {value!r}.") from None
    if len({*found.values()}) > 1:
        shown = " and ".join(f"{key} {value:g}" for key, value in found.items())
        raise StudyError(f"beta must have one value, got {shown}. Remove one of them.")
    return next(iter(found.values()), 0.1)


def check_model(config: dict[str, Any]) -> None:
    name = config.get("base_model")
    if not isinstance(name, str):
        raise StudyError(f"--model must name a model if the YAML has no base_model, got {name!r}.")
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(name, trust_remote_code=bool(config.get("trust_remote_code")))
    except Exception as error:  # of transformers or of the hub
        raise StudyError(
            f"--model must be a model's folder or its name on the hub, got {name!r}: "
            f"{str(error).strip().splitlines()[0]}"
        ) from None


def two_files(path: Path, content: dict[str, Any]) -> list[list[str]]:
    """The paths of the YAML's train sets, and those of its test sets."""
    try:
        sets = [[*content[key]] for key in ("datasets", "test_datasets")]
        found = [[entry["path"] for entry in entries] for entries in sets]
        if not all(found):
            raise KeyError
    except (KeyError, TypeError):
        raise StudyError(
            f"{path} must name a data set and a test set by their paths; or give --data."
        ) from None
    for entry in [*sets[0], *sets[1]]:
        part = [key for key in PARTS if entry.get(key) is not None]
        part += ["split"] * (entry.get("split", "train") != "train")
        if part:
            raise StudyError(
                f"{path} must name data sets that are whole files, got {entry['path']} with "
                f"{part[0]}: {entry[part[0]]!r}. Write its rows into a file, or give --data."
            )
    return found


def start(args: argparse.Namespace) -> tuple[dict[str, Any], Path]:
    """Write or find the study's data; what all runs share, and the held-out file.

    Raises:
        StudyError: something is wrong with the arguments, or the folder is of another study.
    """
    content = read_yaml(args.config)
    config = base_config(args, content)
    if args.data is not None:
        train, held_out = split(read_pairs(args.data), args.held_out)
    else:
        train, held_out = (
            [pair for path in paths for pair in read_pairs(Path(path))]
            for paths in two_files(args.config, content)
        )
        known = {prompt_of(pair) for pair in train}
        held_out = [pair for pair in held_out if prompt_of(pair) not in known]
        if not held_out:
            raise StudyError(f"{args.config}: each prompt of its test set is in its data set too.")
    check_model(config)
    data = args.out / "data"
    texts = {
        data / f"{name}.jsonl": "".join(json.dumps(pair) + "\n" for pair in pairs)
        for name, pairs in (("train", train), ("held_out", held_out))
    }
    digest = hashlib.sha256("".join(texts.values()).encode()).hexdigest()
    config["datasets"] = [
        {
            "path": str(data / "train.jsonl"),
            "ds_type": "json",
            "split": "train",
            "type": "chat_template.argilla_chat",
        }
    ]
    # TRL cuts long pairs the same way in every run, and no cache of another run is read.
    config["skip_prepare_dataset"] = True
    config |= {"rl": "focalpo", "save_steps": config["max_steps"], "save_only_model": True}
    config |= {"logging_steps": 1}

    stamp = args.out / "study.json"
    about = {"config": config, "data": digest}
    if stamp.is_file():
        try:
            before = json.loads(stamp.read_text(encoding="utf-8"))
            old_config, old_data = before["config"], before["data"]
        except (ValueError, KeyError, TypeError):
            raise StudyError(f"{stamp} isn't complete: give another --out.") from None
        for key in {**old_config, **config}:
            old, new = old_config.get(key), config.get(key)
            if old != new:
                raise StudyError(
                    f"{args.out} holds a study with {key} {old!r}, and this one has {new!r}: give "
                    "another --out."
                )
        if old_data != digest:
            raise StudyError(f"{args.out} holds a study with other data: give another --out.")
    # The stamp is written last: a folder with one has its data.
    data.mkdir(parents=True, exist_ok=True)
    texts[stamp] = json.dumps(about, indent=2) + "\n"
    for path, text in texts.items():
        half = path.with_suffix(".part")
        half.write_text(text, encoding="utf-8")
        half.replace(path)
    prompts = len({prompt_of(pair) for pair in held_out})
    print(f"{len(train)} pairs to train on, {len(held_out)} held out on {prompts} other prompts")
    return config, data / "held_out.jsonl"


def command(words: Sequence[str], log: Path, bar: tqdm, cores: int) -> None:
    """Run a command into ``log``, and move the bar with the training steps it reports.

    Raises:
        StudyError: the command failed; the message has its last lines.
    """
    env = {**os.environ, "OMP_NUM_THREADS": str(cores), "TOKENIZERS_PARALLELISM": "false"}
    steps = 0
    with (
        log.open("wb") as out,
        child(words, stdout=out, stderr=subprocess.STDOUT, env=env) as process,
    ):
        while process.returncode is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=1)
            seen = len(re.findall(rb"\{'loss': ", log.read_bytes()))
            bar.update(seen - steps)
            steps = seen
            if INTERRUPTED.is_set():
                raise StudyError(f"{words[0]} was interrupted.")
    if process.returncode != 0:
        tail = log.read_text(encoding="utf-8", errors="replace").split("\n")[-15:]
        raise StudyError(f"{' '.join(words)} failed; {log} ends:\n" + "\n".join(tail))


def train_and_score(
    loss: Loss, seed: int, config: dict[str, Any], held_out: Path, out: Path, bar: tqdm, cores: int
) -> None:
    """One run; each half only if its results don't exist yet."""
    folder = out / "runs" / loss.folder / f"seed_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "model"
    if model.is_dir():
        bar.update(config["max_steps"])
    else:
        own = {
            "focalpo_variant": loss.variant,
            "focalpo_gamma": loss.gamma,
            "seed": seed,
            "output_dir": str(folder / "unfinished"),
        }
        # Remove what a killed run left.
        shutil.rmtree(folder / "unfinished", ignore_errors=True)
        path = folder / "config.yml"
        path.write_text(yaml.safe_dump({**config, **own}, sort_keys=False), encoding="utf-8")
        command(["axolotl", "train", str(path), *LAUNCHER], folder / "train.log", bar, cores)
        (folder / "unfinished").rename(model)  # a folder of this name is a finished run
    beta = beta_of(config)
    length = at_least_1(config, "sequence_len", "Pairs are cut to it in training and in scoring")
    if not scored(folder / "scores" / "summary.json", beta):
        words = ["focalpo", "score", str(model), str(held_out), "--ref", config["base_model"]]
        words += ["--beta", str(beta), "--out", str(folder / "scores")]
        words += ["--max-length", str(length)]
        command([*words, "--format", "csv"], folder / "score.log", bar, cores)


def scored(summary: Path, beta: float) -> bool:
    """Whether a run has complete scores at the beta of training."""
    try:
        return json.loads(summary.read_text(encoding="utf-8"))["beta"] == beta
    except (OSError, ValueError, KeyError, TypeError):
        return False


def run_all(
    losses: Sequence[Loss], args: argparse.Namespace, config: dict[str, Any], held_out: Path
) -> None:
    runs = [(loss, seed) for seed in args.seeds for loss in losses]
    cores = max(1, (os.cpu_count() or 1) // args.jobs)
    stopped = threading.Event()
    with (
        tqdm(total=len(runs) * config["max_steps"], unit="step", smoothing=0) as bar,
        ThreadPoolExecutor(args.jobs) as pool,
    ):

        def one(run: tuple[Loss, int]) -> None:
            if stopped.is_set():
                return
            clock = time.perf_counter()
            try:
                train_and_score(*run, config, held_out, args.out, bar, cores)
            except BaseException:
                stopped.set()
                raise
            loss, seed = run
            seconds = time.perf_counter() - clock
            if seconds > 1:
                bar.write(f"{loss.name}, seed {seed}: trained and scored in {seconds:.0f} s")

        try:
            list(pool.map(one, runs))
        except KeyboardInterrupt:
            stopped.set()
            INTERRUPTED.set()
            raise


# ---- the results


def check_paired(losses: Sequence[Loss], seeds: Iterable[int], out: Path) -> None:
    """Every loss must have seen DPO's batches: the host logs the tokens of each step.

    Raises:
        StudyError: the runs of one seed differ.
    """
    for seed in seeds:
        seen = {}
        for loss in losses:
            folder = out / "runs" / loss.folder / f"seed_{seed}"
            states = [*folder.glob("model/checkpoint-*/trainer_state.json")]
            if len(states) != 1:
                raise StudyError(
                    f"{folder / 'model'} must have one checkpoint, got {len(states)}: delete the "
                    "folder, and its run is done again."
                )
            (state,) = states
            history = json.loads(state.read_text(encoding="utf-8"))["log_history"]
            steps = [entry for entry in history if "loss" in entry]
            first = tuple(round(steps[0][f"logps/{side}"], 3) for side in ("chosen", "rejected"))
            seen[loss.name] = (first, [entry["num_tokens"] for entry in steps])
        for name, found in seen.items():
            if found != seen["DPO"]:
                raise StudyError(
                    f"{name} and DPO were trained on other batches under seed {seed}: they can't "
                    "be compared pair by pair."
                )


def read_scores(loss: Loss, seed: int, out: Path) -> Scores:
    path = out / "runs" / loss.folder / f"seed_{seed}" / "scores" / "scores.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")
    records = [json.loads(line) for line in lines[1:] if line]
    records.sort(key=lambda record: record["row"])
    return Scores(
        margin=np.array([r["margin"] for r in records]),
        ranked=np.array([r["chosen_logp"] > r["rejected_logp"] for r in records]),
        right=np.array([r["ref_right"] for r in records]),
        row=np.array([r["row"] for r in records]),
    )


def quantities(loss: Loss, scores: Scores) -> dict[str, np.ndarray]:
    """Per pair ``(N,)``, what the results average over a group."""
    weights = loss.weights(scores.margin)
    return {
        "margin": scores.margin,
        "accuracy": (scores.margin > 0).astype(float),
        "ranking": scores.ranked.astype(float),
        "weight": weights,
        # |dL/dz|, except for its sign where the loss is reversed.
        "pull": weights / (1 + np.exp(scores.margin)),
    }


def bootstrap(
    values: np.ndarray, prompts: np.ndarray, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """95 % interval of the mean of ``values`` ``(N,)``, with whole prompts drawn again: the pairs
    of one prompt aren't independent."""
    _, where = np.unique(prompts, return_inverse=True)
    sums, counts = np.bincount(where, values), np.bincount(where).astype(float)
    k = len(sums)
    rng = np.random.default_rng(0)
    means = []
    for start in range(0, resamples, 500):
        drawn = rng.multinomial(k, np.full(k, 1 / k), size=min(500, resamples - start))
        means.append(drawn @ sums / (drawn @ counts))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def summarise(
    losses: Sequence[Loss], seeds: Sequence[int], held_out: Path, out: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of results.csv, and those of differences.csv."""
    names = np.array([prompt_of(pair) for pair in read_pairs(held_out)])
    found = {(loss, seed): read_scores(loss, seed, out) for loss in losses for seed in seeds}
    reference = found[DPO, seeds[0]]
    groups = {"right": reference.right, "wrong": ~reference.right}
    groups["all"] = np.ones_like(reference.right)
    prompts = names[reference.row]
    values = {key: quantities(key[0], scores) for key, scores in found.items()}
    results, differences = [], []
    for loss in losses:
        for group, inside in groups.items():
            if not inside.any():
                continue
            for seed in seeds:
                of_run = values[loss, seed]
                row: dict[str, Any] = {"loss": loss.name, "seed": seed, "group": group}
                row["pairs"] = int(inside.sum())
                row |= {k: of_run[k][inside].mean() for k in ("margin", "accuracy", "ranking")}
                row["weight"] = of_run["weight"][inside].mean()
                row["share_of_gradient"] = of_run["pull"][inside].sum() / of_run["pull"].sum()
                results.append(row)
            for quantity in ("margin", "accuracy", "ranking"):
                per_seed = np.stack(
                    [values[loss, s][quantity] - values[DPO, s][quantity] for s in seeds]
                )[:, inside]
                low, high = bootstrap(per_seed.mean(0), prompts[inside])
                row = {"loss": loss.name, "group": group, "quantity": quantity}
                row |= {"difference": per_seed.mean(), "low": low, "high": high}
                row |= {"pairs": int(inside.sum()), "prompts": len(set(prompts[inside]))}
                row["each_seed"] = " ".join(f"{mean:+.5f}" for mean in per_seed.mean(1))
                differences.append(row)
    return results, differences


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def fixed(value: float, digits: int, plus: bool = False) -> str:
    """``value`` with that many decimals; what rounds to 0 has no sign."""
    text = f"{value:{'+' * plus}.{digits}f}"
    return text if float(text) else text.lstrip("+-")


def print_table(losses: Sequence[Loss], results: list[Any], differences: list[Any]) -> None:
    print(f"\n{'':<15}{'margin':^17} {'accuracy':^15} {'ranking':^15} {'weight':^15} "
          f"margin less DPO's, right / wrong [95 % over prompts]")  # fmt: skip
    print(f"{'':<15}{'right':>8} {'wrong':>8}" + f" {'right':>7} {'wrong':>7}" * 3)
    for loss in losses:
        line = f"{loss.name:<15}"
        for quantity, width in (("margin", 8), ("accuracy", 7), ("ranking", 7), ("weight", 7)):
            for group in GROUPS:
                each = [
                    r[quantity] for r in results if (r["loss"], r["group"]) == (loss.name, group)
                ]
                line += f"{fixed(np.mean(each), 3) if each else '-':>{width}} "
        if loss != DPO:
            for group in GROUPS:
                shown = "-"  # a group without a pair
                for row in differences:
                    if (row["loss"], row["group"], row["quantity"]) == (loss.name, group, "margin"):
                        mean, low, high = (
                            fixed(row[key], 4, plus=True) for key in ("difference", "low", "high")
                        )
                        shown = f"{mean:>7} [{low:>7}, {high:>7}]"
                line += f" {shown:>26}"
        print(line.rstrip())


def draw(
    plt: Any, losses: Sequence[Loss], results: list[Any], differences: list[Any], title: str
) -> Any:
    """Six panels over the same rows of losses; filled marks are the pairs ranked right."""
    panels = (
        ("margin", "reward margin z (nats)", False),
        ("accuracy", "pairs with z above 0 (share)", False),
        ("ranking", "pairs the model itself ranks right (share)", False),
        ("weight", "weight on DPO's gradient (no unit)", False),
        ("margin", "margin less DPO's (nats), 95 % interval", True),
        ("accuracy", "accuracy less DPO's (share), 95 % interval", True),
    )
    looks = {
        "right": {"color": "#0072B2", "marker": "o", "markerfacecolor": "#0072B2"},
        "wrong": {"color": "#D55E00", "marker": "s", "markerfacecolor": "white"},
    }
    figure, axes = plt.subplots(
        2, 3, figsize=(12, 2.4 + 0.62 * len(losses)), sharey=True, layout="constrained"
    )
    for axis, (quantity, label, paired) in zip(axes.flat, panels, strict=True):
        axis.set_xlabel(label)
        axis.grid(axis="y", visible=False)
        axis.ticklabel_format(axis="x", style="plain", useOffset=False)
        axis.locator_params(axis="x", nbins=4)
        if paired:
            axis.axvline(0, color="#888888", linewidth=1)
        for place, loss in enumerate(losses):
            for group, offset in (("right", -0.17), ("wrong", 0.17)):
                at, look = place + offset, looks[group]
                if not any(r["group"] == group for r in results):
                    continue
                if paired:
                    (row,) = [
                        r for r in differences
                        if (r["loss"], r["group"], r["quantity"]) == (loss.name, group, quantity)
                    ]  # fmt: skip
                    if loss == DPO:
                        continue
                    each = [float(word) for word in row["each_seed"].split()]
                    axis.plot([row["low"], row["high"]], [at, at], color=look["color"])
                    mean = row["difference"]
                    # One large gamma sets the scale, and the others would all read as 0.
                    axis.text(
                        1.02, at, fixed(mean, 3, plus=True), transform=axis.get_yaxis_transform(),
                        color=look["color"], fontsize=8, va="center",
                    )  # fmt: skip
                else:
                    each = [
                        r[quantity] for r in results
                        if (r["loss"], r["group"]) == (loss.name, group)
                    ]  # fmt: skip
                    mean = np.mean(each)
                if len(each) > 1:
                    axis.plot(each, [at] * len(each), "|", color=look["color"], markersize=9)
                axis.plot([mean], [at], linestyle="", markersize=6, **look)
        if axis.dataLim.width < NO_WIDTH:
            # Equal values have no scale: rounding's 1e-17 would become one.
            middle = axis.dataLim.x0
            axis.set_xlim(middle - 0.01, middle + 0.01)
    axes[0, 0].set_yticks(range(len(losses)), [loss.name for loss in losses])
    axes[0, 0].set_ylim(len(losses) - 0.4, -0.6)
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linestyle="", label=GROUPS[group], **look) for group, look in looks.items()
    ]
    handles.append(Line2D([], [], linestyle="", marker="|", color="#555555", label="one seed"))
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    figure.supxlabel(title, fontsize=9)
    return figure


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="\n".join(__doc__.splitlines()[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=EXAMPLES / "tiny_focalpo.yml",
        help="Axolotl YAML that all runs share (default: examples/tiny_focalpo.yml)",
    )
    parser.add_argument("--model", help="the model to start from (default: the YAML's)")
    parser.add_argument(
        "--data",
        type=Path,
        help="preference file, .jsonl, split by prompt (default: the YAML's two data sets)",
    )
    parser.add_argument(
        "--held-out", type=float, default=0.25, metavar="SHARE", help="of --data's prompts"
    )
    parser.add_argument("--gamma", type=float, nargs="*", default=[0.05, 0.1, 0.25, 0.5, 1.0],
                        help="of FocalPO (default: 0.05 0.1 0.25 0.5 1)")  # fmt: skip
    parser.add_argument("--exact", type=float, nargs="*", default=[0.05], metavar="GAMMA",
                        help="gammas of correct_exact (default: 0.05)")  # fmt: skip
    parser.add_argument("--incorrect", type=float, nargs="*", default=[1.0], metavar="GAMMA",
                        help="gammas of incorrect (default: 1)")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE",
                        help="other values for the YAML's keys")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, on a CPU")
    parser.add_argument("--out", type=Path, default=Path("outputs/study"))
    args = parser.parse_args(argv)
    if not 0 < args.held_out < 1:
        parser.error(f"--held-out must be above 0 and below 1, got {args.held_out:g}")
    if len({*args.seeds}) < len(args.seeds) or not all(0 <= seed < 2**32 for seed in args.seeds):
        shown = " ".join(map(str, args.seeds))
        parser.error(f"--seeds must be different numbers from 0 to 4294967295, got {shown}")
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out must be a folder, got {args.out}")
    return args


def chosen_losses(args: argparse.Namespace) -> list[Loss]:
    asked = [("correct", g) for g in args.gamma]
    asked += [("correct_exact", g) for g in args.exact]
    asked += [("incorrect", g) for g in args.incorrect]
    losses = [DPO]
    for variant, gamma in asked:
        flag = {"correct": "--gamma"}.get(variant, "--" + variant.removeprefix("correct_"))
        try:
            get_loss("focalpo").bind(variant=variant, gamma=gamma)
        except ValueError as error:
            raise StudyError(str(error).replace("gamma", flag, 1)) from None
        if gamma and Loss(variant, gamma) not in losses:
            losses.append(Loss(variant, gamma))
    return losses


def pyplot() -> Any:
    """matplotlib's pyplot, drawing into files."""
    try:
        import matplotlib
    except ImportError:
        raise StudyError("the picture needs matplotlib: pip install matplotlib.") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    bare = {f"axes.spines.{side}": False for side in ("top", "right")}
    grid = {"axes.grid": True, "axes.axisbelow": True, "grid.color": "#dddddd"}
    pyplot.rcParams.update({"legend.frameon": False, "lines.linewidth": 1.8, **bare, **grid})
    return pyplot


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        losses = chosen_losses(args)
        plt = pyplot()
        for name in ("axolotl", "focalpo"):
            if shutil.which(name) is None:
                raise StudyError(f"the command {name} wasn't found: install it, or activate its "
                                 "environment.")  # fmt: skip
        config, held_out = start(args)
        run_all(losses, args, config, held_out)
        check_paired(losses, args.seeds, args.out)
        results, differences = summarise(losses, args.seeds, held_out, args.out)
    except (StudyError, OSError) as error:
        print(f"study: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    write_csv(args.out / "results.csv", results)
    write_csv(args.out / "differences.csv", differences)
    print_table(losses, results, differences)
    pairs = {row["group"]: row["pairs"] for row in results}
    title = (
        f"held-out pairs: {pairs.get('right', 0)} that the reference ranks right, "
        f"{pairs.get('wrong', 0)} wrong; {'mean of seeds' if len(args.seeds) > 1 else 'seed'} "
        f"{', '.join(map(str, args.seeds))}; {config['max_steps']} steps, "
        f"beta {beta_of(config):g}"
    )
    figure = draw(plt, losses, results, differences, title)
    figure.savefig(args.out / "study.png", dpi=150, bbox_inches="tight")
    names = ("study.png", "results.csv", "differences.csv")
    print("\nwrote " + ", ".join(str(args.out / name) for name in names))
    print("It shows how each loss directs training, not which loss gives the better model.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
