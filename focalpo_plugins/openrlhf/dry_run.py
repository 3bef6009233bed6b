"""What an OpenRLHF command line will train on, as OpenRLHF itself reads it.

OpenRLHF's command runs until it first uses the parsed flags.  Then this module creates data set and
tokenizer with the same calls as the rest of the command.
"""

from __future__ import annotations

import functools
import os
import runpy
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from ..balanced import Geometry
from ..errors import InvalidValue, RunError
from ..guards import hub, pairs
from ..guards.faults import Policy
from ..guards.messages import explained
from ..guards.sources import described
from ..plan import NO_LIMIT, ModelState, Pair, Plan, Tokens, Window
from ..registry import get_loss
from ..releases import install
from . import COMMAND, cpu
from .autoload import patch
from .conversations import text_faults
from .data import Source, check_cells, explain, listed, remote_names, tokenized
from .names import given_options, installed_flag, nested_args

_OURS = "focalpo_plugins.openrlhf.train_dpo"


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
        bare = _without_data(of_host, gpus, shape)
        return bare if shape is not None else _with_data(bare, of_host)


def _explained(of_host: Any) -> AbstractContextManager[None]:
    """Explains OpenRLHF's error, if its cause is known."""
    return explained(
        lambda error: explain(of_host, error) or hub.explain(error, remote_names(of_host))
    )


def _without_data(of_host: Any, gpus: int, shape: Path | None) -> Plan:
    """The plan as far as it follows from the flags."""
    import torch

    args = nested_args(of_host)
    if not args.model.model_name_or_path or not args.data.dataset:
        missing = "model.model_name_or_path" if args.data.dataset else "data.dataset"
        missing = installed_flag(missing, vars(of_host)) if args is not of_host else missing
        raise InvalidValue(f"--{missing} must be given: there is nothing to train on.")
    loss, flags = None, dict[str, Any]()
    if _asks_for_ours(of_host):
        options, flags = given_options(of_host)
        loss = get_loss(of_host.loss).bind(**options)
    notes = []
    if not torch.cuda.is_available():
        notes.append("no GPU here: flags that need one were accepted as if there were one")
    data_ranks = max(1, gpus // (args.ds.ring_attn_size * args.ds.tensor_parallel_size))
    of_step = args.train.micro_batch_size * data_ranks
    return Plan(
        host=f"OpenRLHF {version('openrlhf')}",
        loss=loss,
        host_loss="ipo" if args.model.ipo_enable else "dpo",
        terms=_terms(args),
        beta=args.model.beta,
        label_smoothing=args.model.label_smoothing,
        max_length=args.data.max_len,
        micro_batch=args.train.micro_batch_size,
        accumulation=max(1, args.train.batch_size // of_step),
        ranks=gpus,
        data_ranks=data_ranks,
        precision=args.ds.param_dtype,
        state=_state(args, bool(flags.get("precompute_ref")), shape),
        warnings=_warnings(args, data_ranks),
        notes=notes,
        balanced_batches=bool(flags.get("balanced_batches")),
        shared_prompts=bool(flags.get("shared_prompts")),
        packed=bool(args.ds.packing_samples),
    )


def _warnings(args: Any, data_ranks: int) -> list[str]:
    """Warnings about flags that OpenRLHF handles in an unexpected way."""
    micro_batch, warned = args.train.micro_batch_size, []
    if args.train.batch_size % (micro_batch * data_ranks):
        warned.append(
            f"--train.batch_size {args.train.batch_size} isn't a multiple of micro-batch x ranks, "
            f"{micro_batch} x {data_ranks}: OpenRLHF rounds the accumulation down, "
            "and DeepSpeed refuses such a batch size."
        )
    if args.ds.use_liger_kernel:
        warned.append(
            "--ds.use_liger_kernel swaps in Liger's Triton layers, which can't be tried on a CPU; "
            "the loss is not Liger's."
        )
    if args.model.ipo_enable:
        warned.append("--model.ipo_enable: IPO is trained, which is another loss.")
    return warned


def _asks_for_ours(of_host: Any) -> bool:
    return getattr(of_host, "loss", None) is not None


def _with_data(bare: Plan, of_host: Any) -> Plan:
    """The plan with the data as OpenRLHF prepares it."""
    from openrlhf.utils import get_strategy, get_tokenizer

    args = nested_args(of_host)
    strategy = get_strategy(of_host)
    tokenizer = get_tokenizer(
        args.model.model_name_or_path,
        None,
        "right",
        strategy,
        use_fast=not args.data.disable_fast_tokenizer,
    )
    rows, held_out = _rows(args, strategy)
    found = listed(of_host)
    check_cells(found)
    make = functools.partial(_dataset, args, tokenizer, strategy)
    trained, whole = make(rows, args.data.max_len), make(rows, NO_LIMIT)
    if len(trained) == 0:
        raise InvalidValue(
            f"--data.max_len must leave room for an answer, got {args.data.max_len}: no prompt of "
            f"the {len(rows)} pairs fits. Raise it."
        )
    warned, notes = list(bare.warnings), list(bare.notes)
    if len(trained) < args.train.batch_size:
        warned.append(
            f"--train.batch_size {args.train.batch_size} is larger than the data, {len(trained)} "
            "pairs: OpenRLHF refuses to train."
        )
    evaluated = None
    if held_out is not None:
        flag = f"--{installed_flag('eval.dataset', vars(of_host))}"
        evaluated = make(held_out, args.data.max_len)
        notes.append(f"{len(evaluated)} of {len(held_out)} pairs of {flag} are evaluated")
        if len(evaluated) == 0:
            warned.append(f"{flag} holds no pair whose prompt leaves room for an answer.")
    warned += _faults(of_host, found, tokenizer, trained, evaluated)
    # Pairs that don't fill a rank's share or a micro-batch are dropped; a step may span two epochs.
    batches = len(trained) // bare.data_ranks // bare.micro_batch
    return replace(
        bare,
        warnings=warned,
        notes=notes,
        tokenizer=tokenizer,
        rows=len(rows),
        kept=len(trained),
        pairs=_pairs(of_host, trained, whole, args.data.max_len),
        formats=described(found),
        epoch_steps=batches / bare.accumulation,
        steps=args.train.max_epochs * batches // bare.accumulation,
        windows=_windows(trained, bare.geometry, args.train.max_epochs, strategy.seed),
    )


def _windows(data: Any, geometry: Geometry, epochs: int, seed: int) -> Iterator[Window]:
    """The pairs of the run, as OpenRLHF's sampler and data loader divide them among the ranks."""
    from openrlhf.utils.distributed_sampler import DistributedSampler

    each, begun = geometry.each, 0  # micro-steps
    for epoch in range(epochs):
        of_ranks = []
        for rank in range(geometry.ranks):
            sampler = DistributedSampler(
                data, num_replicas=geometry.ranks, rank=rank, seed=seed, drop_last=True
            )
            sampler.set_epoch(epoch)
            of_ranks.append(list(sampler))
        micro_steps = [
            [pair for of_rank in of_ranks for pair in of_rank[at : at + each]]
            for at in range(0, len(of_ranks[0]) - each + 1, each)
        ]
        start = 0
        while start < len(micro_steps):
            # A step continues in the next epoch.
            step, done = divmod(begun, geometry.accumulation)
            window = micro_steps[start : start + geometry.accumulation - done]
            yield Window(epoch + 1, step + 1, list(chain.from_iterable(window)))
            start, begun = start + len(window), begun + len(window)


def _rows(args: Any, strategy: Any) -> tuple[Any, Any]:
    """The rows to train on, and those to evaluate or None, as OpenRLHF reads them."""
    from openrlhf.datasets.utils import blending_datasets

    data, held_out = args.data, args.eval
    rows = blending_datasets(
        data.dataset,
        data.dataset_probs,
        strategy,
        args.train.seed,
        max_count=data.max_samples,
        dataset_split=data.dataset_split,
    )
    rows = rows.select(range(min(data.max_samples, len(rows))))
    if not held_out.dataset:
        return rows, None
    return rows, blending_datasets(held_out.dataset, None, strategy, dataset_split=held_out.split)


def _dataset(args: Any, tokenizer: Any, strategy: Any, rows: Any, max_length: int) -> Any:
    from openrlhf.datasets import RewardDataset

    return RewardDataset(
        rows,
        tokenizer,
        max_length,
        strategy,
        input_template=args.data.input_template,
        is_dpo=True,
        num_processors=os.cpu_count() or 1,
    )


def _faults(
    of_host: Any, found: Sequence[Source], tokenizer: Any, trained: Any, evaluated: Any
) -> list[str]:
    """Warnings about the data's rows, a sentence each; the command counts those of its pairs.

    Raises:
        ValueError: a run would be refused for the data.
    """
    max_length = nested_args(of_host).data.max_len
    cutting = pairs.Cutting(f"--{installed_flag('data.max_len', vars(of_host))}", max_length)
    of_pairs = pairs.find(tokenized(trained), tokenizer, cutting)
    of_evaluation = pairs.find(tokenized(evaluated or ()), tokenizer, cutting, evaluation=True)
    of_texts = text_faults(found, tokenizer)
    if _asks_for_ours(of_host):
        allowed = bool(given_options(of_host)[1].get("allow_data"))
        policy = Policy(f"--{of_host.loss}.allow_data", allowed, say=False)
        policy.check([*of_pairs, *of_texts])
    of_texts += text_faults(found, tokenizer, evaluation=True)
    return [*map(str, of_evaluation), *map(str, of_texts)]


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
    # A flag that needs CUDA isn't a mistake here: the run is planned for a machine with CUDA.
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
        f"{version('focalpo_plugins')} does not know. {install('openrlhf')}"
    )


def _pairs(of_host: Any, trained: Any, whole: Any, max_length: int) -> Iterator[Pair]:
    """The items of ``trained``, compared with the items of ``whole``, which are not cut."""
    # OpenRLHF keeps a prompt that leaves two tokens for the answer.
    kept = [place for place, length in enumerate(whole.extras) if length < max_length - 2]
    if len(kept) != len(trained):
        raise RunError(
            f"openrlhf {version('openrlhf')} dropped {len(whole) - len(trained)} of {len(whole)} "
            f"pairs, but {len(whole) - len(kept)} were expected. {install('openrlhf')}"
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
