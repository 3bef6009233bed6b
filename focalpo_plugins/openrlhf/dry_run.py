"""What an OpenRLHF command line will train on, read by OpenRLHF itself.

OpenRLHF's command runs until it first uses the parsed flags.  Then this module creates data set and
tokenizer with the same calls as the rest of the command.
"""

from __future__ import annotations

import os
import runpy
import sys
import warnings
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from ..errors import InvalidValue, RunError
from ..guards import hub
from ..guards.messages import explained
from ..guards.pairs import blank, faults
from ..plan import ModelState, Pair, Plan, Tokens
from ..registry import get_loss
from . import COMMAND, conversations, cpu
from .autoload import patch
from .data import check_cells, described, explain, hub_names
from .names import dotted, given_options, spelled

_OURS = "focalpo_plugins.openrlhf.train_dpo"
_NO_LIMIT = 10**9  # tokens


class _Parsed(BaseException):
    """Carries the flags out of the command."""

    def __init__(self, flags: Any) -> None:
        self.flags = flags


def plan(argv: Sequence[str], gpus: int, shape: Path | None = None) -> Plan:
    """Read the command line ``argv``, without the program's name, as OpenRLHF would.

    Args:
        gpus: number of ranks that the run is planned for.
        shape: a folder with the config of a model, which replaces the policy; then neither
            tokenizer nor data is read.

    Raises:
        ValueError: the flags are wrong (the message is the parser's), or the data or files on a hub
            can't be read.
        RuntimeError: the installed OpenRLHF starts its training in another way.
    """
    of_host = _flags(argv)
    with _explained(of_host):
        return _plan(of_host, gpus, shape)


def _explained(of_host: Any) -> AbstractContextManager[None]:
    """Adds to OpenRLHF's error what it means, if that is known."""
    return explained(
        lambda error: explain(of_host, error) or hub.explain(error, hub_names(of_host))
    )


def _plan(of_host: Any, gpus: int, shape: Path | None) -> Plan:
    args = dotted(of_host)
    if not args.model.model_name_or_path or not args.data.dataset:
        missing = "model.model_name_or_path" if args.data.dataset else "data.dataset"
        missing = spelled(missing, vars(of_host)) if args is not of_host else missing
        raise InvalidValue(f"--{missing} must be given: there is nothing to train on.")
    import torch

    loss, precomputed = None, False
    if getattr(of_host, "loss", None) is not None:
        options, flags = given_options(of_host)
        loss, precomputed = (
            get_loss(of_host.loss).bind(**options),
            flags.get("precompute_ref", False),
        )
    notes = []
    if not torch.cuda.is_available():
        notes.append("no GPU here: flags that need one were taken as on a machine that has them")
    data_ranks = max(1, gpus // (args.ds.ring_attn_size * args.ds.tensor_parallel_size))
    accumulation, rest = divmod(args.train.batch_size, args.train.micro_batch_size * data_ranks)
    shown: dict[str, Any] = {
        "host": f"OpenRLHF {version('openrlhf')}",
        "loss": loss,
        "host_loss": "ipo" if args.model.ipo_enable else "dpo",
        "beta": args.model.beta,
        "label_smoothing": args.model.label_smoothing,
        "max_length": args.data.max_len,
        "micro_batch": args.train.micro_batch_size,
        "accumulation": max(1, accumulation),
        "ranks": gpus,
        "data_ranks": data_ranks,
        "precision": args.ds.param_dtype,
        "state": _state(args, precomputed, shape),
        "notes": notes,
        "terms": _terms(args),
    }
    if shape is not None:
        return Plan(tokenizer=None, rows=0, kept=0, pairs=(), epoch_steps=0, steps=0, **shown)
    from openrlhf.datasets import RewardDataset
    from openrlhf.datasets.utils import blending_datasets
    from openrlhf.utils import get_strategy, get_tokenizer

    strategy = get_strategy(of_host)
    tokenizer = get_tokenizer(
        args.model.model_name_or_path,
        None,
        "right",
        strategy,
        use_fast=not args.data.disable_fast_tokenizer,
    )
    rows = blending_datasets(
        args.data.dataset,
        args.data.dataset_probs,
        strategy,
        args.train.seed,
        max_count=args.data.max_samples,
        dataset_split=args.data.dataset_split,
    )
    rows = rows.select(range(min(args.data.max_samples, len(rows))))
    held_out = None
    if args.eval.dataset:
        held_out = blending_datasets(
            args.eval.dataset, None, strategy, dataset_split=args.eval.split
        )
    check_cells(of_host)

    def dataset(max_length: int, rows: Any = rows) -> Any:
        return RewardDataset(
            rows,
            tokenizer,
            max_length,
            strategy,
            input_template=args.data.input_template,
            is_dpo=True,
            num_processors=os.cpu_count() or 1,
        )

    trained, whole = dataset(args.data.max_len), dataset(_NO_LIMIT)
    if len(trained) == 0:
        raise InvalidValue(
            f"--data.max_len must leave room for an answer, got {args.data.max_len}: no prompt of "
            f"the {len(rows)} pairs fits. Raise it."
        )

    # Pairs that don't fill a rank's share or a micro-batch are dropped; a step may span two epochs.
    batches = len(trained) // data_ranks // args.train.micro_batch_size
    found = []
    if accumulation == 0 or rest:
        found.append(
            f"--train.batch_size {args.train.batch_size} is no multiple of micro-batch x ranks, "
            f"{args.train.micro_batch_size} x {data_ranks}: OpenRLHF rounds the accumulation down, "
            "and DeepSpeed refuses a batch size that is no such multiple."
        )
    if len(trained) < args.train.batch_size:
        found.append(
            f"--train.batch_size {args.train.batch_size} is larger than the data, {len(trained)} "
            "pairs: OpenRLHF refuses to train."
        )
    if args.ds.use_liger_kernel:
        found.append(
            "--ds.use_liger_kernel swaps in Liger's Triton layers, which a CPU can't try; the loss "
            "is not Liger's."
        )
    if held_out is not None:
        flag = f"--{spelled('eval.dataset', vars(of_host))}"
        evaluated = dataset(args.data.max_len, held_out)
        notes.append(f"{len(evaluated)} of {len(held_out)} pairs of {flag} are evaluated")
        found += _of_evaluation(of_host, evaluated, tokenizer, flag)
    for evaluation in (False, True):
        found += [fault.words for fault in conversations.faults(of_host, tokenizer, evaluation)]
    if args.model.ipo_enable:
        found.append("--model.ipo_enable: IPO is trained, a loss of its own.")
    return Plan(
        tokenizer=tokenizer,
        rows=len(rows),
        kept=len(trained),
        pairs=_pairs(of_host, trained, whole, args.data.max_len),
        epoch_steps=batches / max(1, accumulation),
        steps=args.train.max_epochs * batches // max(1, accumulation),
        warnings=found,
        formats=described(of_host),
        **shown,
    )


def _of_evaluation(of_host: Any, evaluated: Any, tokenizer: Any, flag: str) -> list[str]:
    """Warnings about evaluation data, a sentence each."""
    if len(evaluated) == 0:
        return [f"{flag} holds no pair whose prompt leaves room for an answer: no evaluation."]
    is_blank = blank(tokenizer)
    counts: Counter[str] = Counter()
    for place in range(len(evaluated)):
        with _explained(of_host):  # OpenRLHF joins prompt and answer here
            chosen, _, rejected, _, length = evaluated[place]
        ids = [side.flatten().tolist()[length:] for side in (chosen, rejected)]
        counts.update(faults(ids[0], ids[1], is_blank))
    return [
        f"{count} of {len(evaluated)} pairs of {flag} are {fault}."
        for fault, count in sorted(counts.items())
    ]


def _terms(args: Any) -> list[tuple[str, float]] | None:
    """The loss that OpenRLHF logs; None if the reference is another model than the policy."""
    reference = args.ref.model_name_or_path
    if reference and reference != args.model.model_name_or_path:
        return None
    return [("ipo" if args.model.ipo_enable else "sigmoid", 1.0)]


def _flags(argv: Sequence[str]) -> Any:
    """The parsed flags, after all changes that OpenRLHF's command makes before it trains."""
    import torch  # noqa: F401  (the CPU mode has to find it imported)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warning of the CPU mode: nothing is run
        patch()
    from openrlhf import utils

    def stop(flags: Any) -> NoReturn:
        raise _Parsed(flags)

    def refuse(self: ArgumentParser, message: str) -> NoReturn:
        raise InvalidValue(message)

    before = sys.argv, cpu.active, ArgumentParser.error, utils.get_strategy
    # The launcher and its flags may come before the command's own.
    starts = [i for i, word in enumerate(argv) if word in (COMMAND, _OURS)]
    sys.argv = [COMMAND, *argv[starts[-1] + 1 if starts else 0 :]]
    # A flag that needs CUDA is no mistake here: the run is planned for a machine that has it.
    cpu.active = False
    ArgumentParser.error = refuse  # type: ignore[assignment, method-assign]
    utils.get_strategy = stop  # the first thing that the command's train() calls, with its flags
    try:
        runpy.run_module(COMMAND, run_name="__main__", alter_sys=True)
    except _Parsed as parsed:
        return parsed.flags
    except SystemExit as error:
        raise InvalidValue(
            f"OpenRLHF's command ended before it trained, with exit code {error.code}."
        ) from None
    finally:
        sys.argv, cpu.active, ArgumentParser.error, utils.get_strategy = before  # type: ignore[method-assign]
    raise RunError(
        f"openrlhf {version('openrlhf')} starts its training in a way that focalpo_plugins "
        f"{version('focalpo_plugins')} does not know. Use a release that the README lists."
    )


def _pairs(of_host: Any, trained: Any, whole: Any, max_length: int) -> Iterator[Pair]:
    """The items of ``trained``, compared with the items of ``whole``, which are not cut."""
    # OpenRLHF keeps a prompt that leaves two tokens for the answer.
    kept = [place for place, length in enumerate(whole.extras) if length < max_length - 2]
    if len(kept) != len(trained):
        raise RunError(
            f"openrlhf {version('openrlhf')} dropped {len(whole) - len(trained)} of {len(whole)} "
            f"pairs where {len(whole) - len(kept)} were expected. Use a release that the README "
            "lists."
        )
    for place, original in enumerate(kept):
        with _explained(of_host):  # OpenRLHF joins prompt and answer here
            chosen, _, rejected, _, prompt_length = trained[place]
        uncut = whole[original]
        cut = chosen.numel() < uncut[0].numel() or rejected.numel() < uncut[2].numel()
        sides = [
            # As DPOTrainer masks it: every token after the prompt goes into the loss.
            Tokens(ids, [position >= prompt_length for position in range(len(ids))])
            for ids in (chosen.flatten().tolist(), rejected.flatten().tolist())
        ]
        yield Pair(sides[0], sides[1], truncated=cut)


def _state(args: Any, precomputed: bool, shape: Path | None) -> ModelState:
    from transformers import AutoConfig

    lora = None
    if args.ds.lora.rank > 0:
        from peft import LoraConfig, TaskType

        lora = LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=args.ds.lora.rank,
            lora_alpha=args.ds.lora.alpha,
            target_modules=args.ds.lora.target_modules,
            lora_dropout=args.ds.lora.dropout,
        )
    offloaded = {"optimizer"} if args.ds.adam_offload else set()
    if args.ref.offload:
        offloaded.add("reference")
    return ModelState(
        config=AutoConfig.from_pretrained(shape or args.model.model_name_or_path),
        lora=lora,
        weight_bytes=2,
        four_bit=args.ds.load_in_4bit,
        # DeepSpeed's mixed precision: a float32 copy, and two moments, or one moment for Muon.
        optimizer_bytes=8.0 if getattr(args, "optim", "adam") == "muon" else 12.0,
        zero_stage=args.ds.zero_stage,
        reference=True,
        reference_freed=precomputed,
        offloaded=frozenset(offloaded),
    )
