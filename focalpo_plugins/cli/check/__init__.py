"""``focalpo check``: what a run will train on, and what it will take, before it is started."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import InvalidType, InvalidValue
from ...guards.messages import one_line
from ...plan import Pair, Plan
from .. import CommandError
from .batches import FourWays, four_ways
from .counts import Counts, count
from .memory import GIB, Room, estimate
from .printing import OF_COMMAND, OF_FUNCTION, Names, as_json, print_text
from .shapes import SHAPES
from .warnings import warnings

# By a key that only its YAMLs have, the folder of a host's adapter.
_BY_KEY = {
    "base_model": "axolotl",
    "model_name_or_path": "llamafactory",
    "rlhf_type": "swift",
    "loss_type": "swift",
}
# By the folder of its adapter, what a host reads, and its extra of this package.
_READS = {
    "axolotl": ("an Axolotl YAML", "axolotl"),
    "llamafactory": ("a LLaMA-Factory YAML", "llamafactory"),
    "openrlhf": ("an OpenRLHF command line", "openrlhf"),
    "swift": ("an ms-swift command", "ms-swift"),
}


def run(args: Namespace) -> int:
    if (args.config is None) == (args.host_argv is None):
        raise CommandError(
            "give a YAML of Axolotl, LLaMA-Factory or ms-swift; or `--`, and after it the flags of "
            "openrlhf.cli.train_dpo, or `swift rlhf` with its keys."
        )
    room = _gpu_memory(args.gpu_memory, OF_COMMAND)
    with _stdout_to_stderr(), scratch_folder() as scratch:
        shape = _shape(args.model_config, scratch)
        name = args.config or "the command line"
        try:
            plan = _plan(args, scratch, shape)
            counts = shown = None
            ways = None
            if shape is None:
                counts, shown, ways = _read(plan, args.pair)
            memory = estimate(plan, _tokens_of_logits(plan, ways))
        except CommandError:
            raise
        except Exception as error:  # every error of the host is an answer for the user
            if args.debug:
                raise
            raise CommandError(f"{name}: {one_line(error)}") from None
    found = warnings(plan, counts, memory, room)
    if args.json:
        print(json.dumps(as_json(name, plan, counts, shown, ways, memory, found), indent=2))
    else:
        print_text(name, plan, counts, shown, ways, memory, room, args.pair, OF_COMMAND)
        _print_warnings(found)
    return 1 if found and args.strict else 0


def check(
    trainer: Any, *, gpus: int | None = None, gpu_memory: float | None = None, pair: int = 0
) -> list[str]:
    """Print what a trainer of TRL will train on, and what it will take, before ``train()``.

    It is ``focalpo check`` for a script: the loss and its first value to expect, how many pairs are
    cut, identical or empty, one pair token by token, the tokens of a step, and the memory.

    Args:
        trainer: a ``FocalPOTrainer``, ``FocalCPOTrainer`` or ``FocalORPOTrainer``.
        gpus: number of ranks that the run is planned for; None for those that run now.
        gpu_memory: memory of a GPU in GiB; None for that of the GPU here, if there is one.
        pair: the number of the pair that is shown.

    Returns:
        The warnings that it prints, a sentence each.

    Raises:
        TypeError: ``trainer`` is another one.
        ValueError: ``gpus``, ``gpu_memory`` or ``pair`` is out of range.
    """
    from ...hf_trainer import RANKS, PairwiseTrainerMixin

    if not isinstance(trainer, PairwiseTrainerMixin):
        raise InvalidType(
            f"trainer must be a FocalPOTrainer, FocalCPOTrainer or FocalORPOTrainer, got "
            f"{type(trainer).__name__}."
        )
    if gpus is not None and gpus < 1:
        raise InvalidValue(f"gpus must be at least 1, got {gpus}.")
    data: Any = trainer.train_dataset
    if not isinstance(data, Sized):
        raise InvalidValue(
            f"train_dataset must have a length, got {type(data).__name__}: streamed data can't be "
            "counted before training."
        )
    if not 0 <= pair < len(data):
        raise InvalidValue(f"pair must be from 0 to {len(data) - 1}, got {pair}.")
    room = _gpu_memory(gpu_memory, OF_FUNCTION)
    from ...trl.dry_run import plan as plan_of

    plan = plan_of(trainer, RANKS.count if gpus is None else gpus)
    counts, shown, ways = _read(plan, pair)
    memory = estimate(plan, _tokens_of_logits(plan, ways))
    found = warnings(plan, counts, memory, room)
    if RANKS.rank == 0:
        name = type(trainer).__name__
        print_text(name, plan, counts, shown, ways, memory, room, pair, OF_FUNCTION)
        _print_warnings(found)
    return found


def _read(plan: Plan, pair: int) -> tuple[Counts, Pair, FourWays | None]:
    """What is counted over the plan's pairs, the pair that is shown, and its steps' tokens."""
    counts, shown = count(plan, pair)
    return counts, shown, four_ways(_with_bar(plan), counts)


def _print_warnings(found: Sequence[str]) -> None:
    print()
    for warning in found:
        print(f"WARNING  {warning}")
    print(f"{len(found)} warning{'s' * (len(found) != 1)}, no errors")


def _gpu_memory(given: float | None, names: Names) -> Room | None:
    """The memory of the GPU that the run is meant for; None if it isn't known."""
    if given is not None:
        if not 0 < given < math.inf:
            raise InvalidValue(
                f"{names.gpu_memory} must be a number of GiB above 0, got {given:g}."
            )
        return Room(given * GIB, f"{names.gpu_memory} {given:g}")
    import torch

    if not torch.cuda.is_available():
        return None
    return Room(torch.cuda.get_device_properties(0).total_memory, torch.cuda.get_device_name(0))


def _tokens_of_logits(plan: Plan, ways: FourWays | None) -> int:
    """Tokens with logits in the largest micro-batch; without data, of sequences at the limit."""
    # Chosen and rejected answers go through the model together.
    limit = 2 * plan.micro_batch * (plan.max_length or 0)
    return limit if ways is None else ways.planned.logits


def _plan(args: Namespace, scratch: Path, shape: Path | None) -> Plan:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # This command only reads, so it sends no telemetry.
    os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    import torch

    gpus = max(1, torch.cuda.device_count()) if args.gpus is None else args.gpus
    if gpus < 1:
        raise CommandError(f"--gpus must be at least 1, got {args.gpus}.")
    words = args.host_argv
    if words is None and not Path(args.config).is_file():
        raise CommandError(f"CONFIG must be a YAML file, got {args.config!r}: there is none.")
    host = _host_of(Path(args.config)) if words is None else _host_of_words(words)
    _need(host)
    if host == "openrlhf":
        from ...openrlhf import dry_run as openrlhf

        return openrlhf.plan(words, gpus, shape)
    if host == "swift":
        from ...swift import dry_run as swift

        written = [args.config] if words is None else words[words.index("rlhf") + 1 :]
        return swift.plan(written, gpus, scratch, shape)
    if host == "llamafactory":
        from ...llamafactory import dry_run as llamafactory

        return llamafactory.plan(Path(args.config), gpus, scratch, shape)
    from ...axolotl import dry_run as axolotl

    return axolotl.plan(Path(args.config), gpus, scratch, shape)


def _host_of(config: Path) -> str:
    """The host that a YAML is written for; Axolotl if it can't be told."""
    try:
        import yaml

        written = yaml.safe_load(config.read_text(encoding="utf-8"))
    except Exception:  # the host reports it
        return "axolotl"
    keys = written if isinstance(written, dict) else {}
    return next((host for key, host in _BY_KEY.items() if key in keys), "axolotl")


def _host_of_words(words: Sequence[str]) -> str:
    if [*words[:2]] == ["swift", "rlhf"] or words[:1] == ["rlhf"]:
        return "swift"
    if words and not words[0].startswith("-") and "openrlhf" not in " ".join(words):
        raise CommandError(
            "after `--` come the flags of openrlhf.cli.train_dpo, or `swift rlhf` with its keys, "
            f"got {words[0]!r}. Give the YAML of another host instead."
        )
    return "openrlhf"


def _with_bar(plan: Plan) -> Plan:
    """The plan, with a progress bar over its windows."""
    from tqdm import tqdm

    windows = tqdm(plan.windows, total=plan.steps, unit="step", leave=False)
    return replace(plan, windows=windows)


def _need(host: str) -> None:
    from importlib.util import find_spec

    if find_spec(host) is None:
        what, extra = _READS[host]
        raise CommandError(
            f"{what} is read by {extra} itself, which is not installed: "
            f"pip install 'focalpo_plugins[{extra}]'."
        )


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder, with a name of hexadecimal digits: it becomes part of the model's path, by
    which Axolotl recognises MPT and Falcon, and tempfile's names can contain "mpt"."""
    folder = Path(tempfile.gettempdir(), f"focalpo-{secrets.token_hex(8)}")
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _shape(name: str | None, scratch: Path) -> Path | None:
    """A folder with the model's config that ``--model-config`` asks for; None without it."""
    if name is None:
        return None
    shape = SHAPES.get(name)
    if shape is None:
        known = ", ".join(SHAPES)
        try:
            shape = json.loads(Path(name).read_text(encoding="utf-8"))
            if not isinstance(shape, dict) or "model_type" not in shape:
                raise ValueError("it names no model_type")
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise CommandError(
                f"--model-config must be a model's config.json or one of {known}, got {name!r}: "
                f"{why}."
            ) from None
    folder = scratch / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    return folder


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send what hosts print to stderr: stdout is for the answer, which may be JSON."""
    python_level, saved = sys.stdout, os.dup(1)
    python_level.flush()
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout = python_level  # Axolotl replaces it by a tee
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)
