"""``focalpo check``: what a run will train on, and what it will take, before it is started."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...plan import Plan
from .. import CommandError
from .counts import count
from .memory import estimate
from .printing import as_json, print_text
from .warnings import warnings


def run(args: Namespace) -> int:
    if (args.config is None) == (args.host_argv is None):
        raise CommandError(
            "give an Axolotl YAML, or `--` and the flags of openrlhf.cli.train_dpo after it."
        )
    with _stdout_to_stderr():
        plan, name = _plan(args)
        counts, shown = count(plan, args.pair)
        longest = max(counts.lengths)
        memory = estimate(plan, min(longest, plan.max_length or longest))
    found = warnings(plan, counts)
    if args.json:
        print(json.dumps(as_json(name, plan, counts, shown, memory, found), indent=2))
    else:
        print_text(name, plan, counts, shown, memory, args.pair)
        print()
        for warning in found:
            print(f"WARNING  {warning}")
        print(f"{len(found)} warning{'s' * (len(found) != 1)}, no errors")
    return 1 if found and args.strict else 0


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
            from ...openrlhf import dry_run as openrlhf

            return openrlhf.plan(args.host_argv, gpus), name
        name = args.config
        if not Path(name).is_file():
            raise CommandError(f"CONFIG must be a YAML file, got {name!r}: there is none.")
        _need("axolotl", "an Axolotl YAML")
        from ...axolotl import dry_run as axolotl

        with tempfile.TemporaryDirectory() as scratch:
            return axolotl.plan(Path(name), gpus, Path(scratch)), name
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
