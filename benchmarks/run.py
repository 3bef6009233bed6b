"""Measure what the plug-in costs, as ratios: `python benchmarks/run.py [NAME ...]`.

loss     the loss alone, forward and backward, against -F.logsigmoid and the formula as written
start    `import torch` with and without our autoload, `import focalpo_plugins`
trl      whole training steps, FocalPO against DPO, in TRL
axolotl  the same in Axolotl
shared   loss and gradients of a batch with shared prompts, against TRL's own DPO: of the tiny data
         or of --pairs FILE, and of pairs of fixed lengths; in axolotl and openrlhf whole steps
fused    the loss part with a vocabulary of 128,256, against TRL's plain and its Liger path
openrlhf whole steps in OpenRLHF, and --focalpo.precompute_ref against its own way
ranks    balanced batches on 8, 32 and 64 ranks, simulated in tokens: of made-up lengths, and of
         --pairs FILE
balanced whole steps with balanced batches, with shared prompts and with both, against neither, in
         TRL, in Axolotl and OpenRLHF on two ranks; against the host's own DPO in LLaMA-Factory and
         ms-swift; of the tiny data or of --pairs FILE

A round is a step in trl, axolotl, openrlhf and balanced, and an epoch in ranks.
Prints a table and writes outputs/bench.json. Without names, all whose host is installed are
measured. `nox -s bench` makes the hosts' environments and runs it in each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from measure import CUDA, Result, check_tiny, conversations, installed

# Name: module, the host that it needs, rounds.
BENCHMARKS = {
    "loss": ("core_loss", None, 15),
    "start": ("start_up", None, 15),
    "trl": ("steps", "trl", 100),
    "axolotl": ("steps", "axolotl", 100),
    "shared": ("shared_prompts", "trl", 12),
    "fused": ("loss_part", "trl", 3),
    "openrlhf": ("openrlhf_steps", "openrlhf", 60),
    "ranks": ("ranks", None, 5),
    "balanced": ("balanced_steps", "transformers", 6),
}
OF_PAIRS = (
    "shared",
    "axolotl",
    "openrlhf",
    "ranks",
    "balanced",
)  # which read --pairs and --tokenizer


def machine() -> dict[str, str | int]:
    """What the numbers were measured on."""
    found: dict[str, str | int] = {
        "cores": os.cpu_count() or 0,
        "python": platform.python_version(),
    }
    cpu = Path("/proc/cpuinfo")
    if cpu.is_file():
        names = [line for line in cpu.read_text().split("\n") if line.startswith("model name")]
        found["cpu"] = names[0].partition(":")[2].strip() if names else platform.machine()
    if CUDA:
        found["gpu"] = torch.cuda.get_device_name()
    found["threads"] = torch.get_num_threads()
    for package in ("focalpo_plugins", "torch", "trl", "axolotl", "openrlhf", "llamafactory",
                    "ms-swift", "deepspeed", "transformers", "liger-kernel"):  # fmt: skip
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def line(result: Result) -> str:
    def number(value: float) -> str:
        return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"

    return (
        f"{result.case:<44} {result.quantity:<18} {number(result.ours):>11} "
        f"{number(result.theirs):>11} {result.unit:<5} {result.ratio:>7.3f} "
        f"[{result.low:.3f}, {result.high:.3f}]  vs {result.against}"
    )


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse wrong arguments before anything is measured, and make paths hold in any folder."""
    if args.rounds is not None and args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    if {"trl", *OF_PAIRS} & {*args.names}:
        check_tiny()
    if args.pairs is not None:
        args.pairs = args.pairs.resolve()
        try:
            conversations(args.pairs)
        except (OSError, ValueError) as error:
            parser.error(f"--pairs: {error}")
    if args.tokenizer is not None:
        args.tokenizer = args.tokenizer.resolve()
        from transformers import AutoTokenizer

        try:
            AutoTokenizer.from_pretrained(args.tokenizer).get_chat_template()
        except Exception as error:  # of transformers
            parser.error(
                "--tokenizer must be a folder with a tokenizer and its chat template, got "
                f"{args.tokenizer}: {str(error).strip().splitlines()[0]}"
            )
    if args.out.is_dir():
        parser.error(f"--out must be a file, got {args.out}")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out must be a file in a folder, got {args.out}: {error}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--rounds", type=int, help="of each comparison (default: each one's own)")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench.json"))
    parser.add_argument("--pairs", type=Path, help="JSON lines of conversations: real lengths")
    parser.add_argument("--tokenizer", type=Path, help="a model's folder, for --pairs")
    args = parser.parse_args()
    for name in args.names:
        if name not in BENCHMARKS:
            parser.error(f"NAME must be one of {', '.join(BENCHMARKS)}, got {name!r}")
        host = BENCHMARKS[name][1]
        if host is not None and not installed(host):
            parser.error(f"{name} needs {host}, which is not installed")
    there = [name for name, (_, host, _) in BENCHMARKS.items() if host is None or installed(host)]
    args.names = args.names or there
    check(parser, args)
    here = machine()
    print(", ".join(f"{key} {value}" for key, value in here.items()), flush=True)
    results: list[Result] = []
    for name in args.names:
        module, host, rounds = BENCHMARKS[name]
        print(f"\n{name:<44} {'':<18} {'ours':>11} {'theirs':>11} {'':<5} {'ratio':>7} [95 %]")
        options = {"host": host} if module == "steps" else {}
        if name in OF_PAIRS:
            options |= {"pairs": args.pairs, "tokenizer": args.tokenizer}
        for result in import_module(module).measure(args.rounds or rounds, **options):
            results.append(result)
            print(line(result), flush=True)
    content = {"machine": here, "results": [result.as_dict() for result in results]}
    args.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"\nwrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
