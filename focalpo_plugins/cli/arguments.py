"""The command lines of ``focalpo``: what each command takes, and its help."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

_DATA_HELP = "preference file (.jsonl, .json, .parquet, .csv) with chosen, rejected and prompt"

_Add = Callable[..., argparse.ArgumentParser]


def parser_of(prog: str) -> argparse.ArgumentParser:
    """The parser of all commands; ``prog`` is the program's name in help texts."""
    parser = argparse.ArgumentParser(
        prog=prog, description="FocalPO before, during and after a training run."
    )
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for add_arguments in (_check, _curves, _report, _score):
        add_arguments(partial(_add_command, commands, prog))
    return parser


def _add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    prog: str,
    name: str,
    summary: str,
    *,
    more: str = "",
    example: str,
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. {more}".strip(),
        epilog="example:\n  " + "\n  ".join(example.format(prog=prog).splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _check(add: _Add) -> None:
    check = add(
        "check",
        "show what a run will train on, and what it takes, before it is started",
        more="No GPU\n"
        "and no weights are needed: the host's own code reads config, data and tokenizer. Exit\n"
        "code 0, 1 for warnings with --strict, 2 for errors.",
        example="{prog} check examples/tiny_focalpo.yml --gpus 8\n"
        "{prog} check --json -- --loss focalpo --data.dataset pairs.jsonl ...",
    )
    check.add_argument(
        "config",
        nargs="?",
        metavar="CONFIG",
        help="YAML of Axolotl, LLaMA-Factory or ms-swift; or, after `--`, a command line of "
        "openrlhf.cli.train_dpo, or `swift rlhf` with its keys",
    )
    check.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="ranks that the run is meant for (default: the GPUs here, or 1)",
    )
    check.add_argument(
        "--gpu-memory",
        type=float,
        metavar="GIB",
        help="memory of one of them, to be told whether the run fits (default: that of the GPU "
        "here)",
    )
    check.add_argument(
        "--pair", type=int, default=0, metavar="N", help="which pair is shown (default: 0)"
    )
    check.add_argument(
        "--model-config",
        metavar="FILE",
        help="only estimate the memory, for this config.json, or for llama-3-8b, mistral-7b or "
        "qwen3-8b: model, tokenizer and data aren't read",
    )
    check.add_argument("--strict", action="store_true", help="exit code 1 if there are warnings")
    check.add_argument("--json", action="store_true", help="print JSON")
    check.add_argument("--debug", action="store_true", help="show where a host's error comes from")


def _curves(add: _Add) -> None:
    curves = add(
        "curves",
        "draw the paper's Fig. 2, 3 and 4 for any gamma and variant",
        more="The curves come from\n"
        "the loss that is trained; the peak of the gradient and z* are marked. With --gamma or\n"
        "--variant it draws what they name and DPO; without them, the paper's own figures.",
        example="{prog} curves --gamma 0.05 0.5 --out curves",
    )
    curves.add_argument(
        "--gamma",
        type=float,
        nargs="+",
        help="one or more; Fig. 3 takes the first (default: 0.05)",
    )
    curves.add_argument(
        "--gamma-end",
        type=float,
        metavar="GAMMA",
        help="the first gamma at the end of a run: draws both ends, and gamma over the run",
    )
    curves.add_argument(
        "--variant",
        help="correct, correct_exact or incorrect (default: correct)",
    )
    _output(curves, "curves, or for other values one that is named by them")


def _report(add: _Add) -> None:
    report = add(
        "report",
        "read the logs of runs and draw them side by side",
        more="Margins, accuracies,\n"
        "weights and loss: one picture, and one table, which is also printed.",
        example="{prog} report outputs/tiny_dpo outputs/tiny_focalpo\n"
        "{prog} report DPO=outputs/a FocalPO=outputs/b/tensorboard",
    )
    report.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="output folder, checkpoint, trainer_state.json or TensorBoard folder; NAME=RUN names "
        "it in the picture",
    )
    _output(report, "report-RUN-..., named by the runs")


def _score(add: _Add) -> None:
    score = add(
        "score",
        "compute implicit rewards and margins of a preference file",
        more="The reward of an\n"
        "answer is beta * (log p under MODEL - log p under --ref); a margin is the chosen reward\n"
        "less the rejected one. A run that was stopped continues where it was.",
        example="{prog} score outputs/tiny_focalpo --ref examples/tiny/model "
        "examples/tiny/test.jsonl",
    )
    score.add_argument(
        "model", metavar="MODEL", help="folder or hub name of the trained model or adapter"
    )
    score.add_argument("data", metavar="DATA", help=_DATA_HELP)
    score.add_argument("--ref", required=True, metavar="MODEL", help="the model it started from")
    score.add_argument(
        "--beta",
        type=float,
        help="scale of the reward (default: what MODEL says it was trained with, else 0.1)",
    )
    score.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="pairs at a time (default: 8)"
    )
    score.add_argument(
        "--max-length", type=int, metavar="N", help="cut sequences to N tokens (default: never)"
    )
    score.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="of the weights (default: as they are saved)",
    )
    score.add_argument("--debug", action="store_true", help="show where a library's error is from")
    _output(score, "scores")


def _output(parser: argparse.ArgumentParser, folder: str) -> None:
    parser.add_argument("--out", metavar="DIR", help=f"folder (default: {folder})")
    parser.add_argument(
        "--format",
        nargs="+",
        choices=["png", "svg", "csv"],
        help="what to write (default: png csv; only csv without matplotlib)",
    )
