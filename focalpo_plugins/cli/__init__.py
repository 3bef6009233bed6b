"""``focalpo``: check a run before it is paid for, and look at its results.

Each command is a module of its own, imported when it is used: ``focalpo --help`` imports neither
torch nor a host.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from ..errors import FocalPOError
from ..guards.folders import write_whole

#: Stands in the metadata of every picture that we write.
MARK = "focalpo_plugins"
_DATA_HELP = "preference file (.jsonl, .json, .parquet, .csv) with chosen, rejected and prompt"


class CommandError(FocalPOError):
    """An error in the command line or in a file that it names, in one line for the user."""


def output_folder(name: str, files: Mapping[str, str]) -> Path:
    """The folder of ``--out``, created if it doesn't exist.

    Args:
        files: the names of the files that will be written, each with what it begins with; pictures
            are recognised by :data:`MARK`.

    Raises:
        CommandError: a file of such a name is there and is not ours, or there can be no folder.
    """
    folder = Path(name)
    for file, start in files.items():
        if not _is_ours(folder / file, start.encode()):
            raise CommandError(
                f"--out must be a folder whose files of these names are from this command, got "
                f"{str(folder)!r} with another {file}, which is left as it is. Move that file, or "
                "give another --out."
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--out must be a folder, got {name!r}: {error.strerror}.") from None
    return folder


def named(starts: Mapping[str, str], formats: Sequence[str]) -> dict[str, str]:
    """For :func:`output_folder`, the files of each name, with what its CSV begins with."""
    return {f"{name}.{kind}": start for name, start in starts.items() for kind in formats}


def _is_ours(path: Path, start: bytes) -> bool:
    """Whether nothing is lost if we write the file again."""
    if not path.is_file():
        return True
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError:
        return False
    if path.suffix in (".png", ".svg"):
        return not head or MARK.encode() in head
    return head.startswith(start[: len(head)])


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise :class:`CommandError` if one of our files can't be written inside."""
    try:
        yield
    except OSError as error:
        raise CommandError(
            f"--out must be a folder with room that can be written to, got {str(path.parent)!r}: "
            f"{path.name}: {error.strerror}. Make room, or name another."
        ) from None


def write(path: Path, content: str | bytes) -> Path:
    """Write one of our files, whole or not at all, and return ``path``."""
    with writing(path):
        write_whole(path, content)
    return path


def main(argv: Sequence[str] | None = None, prog: str = "focalpo") -> int:
    """Run one command; ``argv`` is without the program's name.

    Returns:
        0, or 1 for the warnings of ``check --strict``, or 2 for an error, which is on stderr.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    # Everything after `check --` is another program's command line.
    host_argv = None
    if argv[:1] == ["check"] and "--" in argv:
        at = argv.index("--")
        argv, host_argv = argv[:at], argv[at + 1 :]
    parser = _parser(prog)
    args = parser.parse_args(argv)
    if args.version:
        from importlib.metadata import version

        print(f"focalpo_plugins {version('focalpo_plugins')}")
        return 0
    if args.command is None:
        parser.print_help()
        return 0
    args.host_argv = host_argv
    if hasattr(sys.stdout, "reconfigure"):  # a path may hold bytes that are no text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return int(import_module(f".{args.command}", __name__).run(args))
    except FocalPOError as error:
        print(f"{prog} {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog} {args.command}: interrupted", file=sys.stderr)
        return 130


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description="FocalPO before, during and after a training run."
    )
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(
        name: str, summary: str, *, more: str = "", example: str
    ) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}. {more}".strip(),
            epilog="example:\n  " + "\n  ".join(example.format(prog=prog).splitlines()),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    check = command(
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
        help="Axolotl YAML; or, after `--`, a command line of openrlhf.cli.train_dpo",
    )
    check.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="ranks that the run is meant for (default: the GPUs here, or 1)",
    )
    check.add_argument(
        "--pair", type=int, default=0, metavar="N", help="which pair is shown (default: 0)"
    )
    check.add_argument(
        "--model-config",
        metavar="FILE",
        help="estimate the memory alone, of this config.json or of llama-3-8b, mistral-7b or "
        "qwen3-8b: model, tokenizer and data aren't read",
    )
    check.add_argument("--strict", action="store_true", help="exit code 1 where there are warnings")
    check.add_argument("--json", action="store_true", help="print JSON")
    check.add_argument("--debug", action="store_true", help="show where a host's error comes from")

    curves = command(
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
        help="where the first gamma moves to over a run: drawn beside it, and gamma over the run",
    )
    curves.add_argument(
        "--variant",
        help="correct, correct_exact or incorrect (default: correct)",
    )
    _output(curves, "curves")

    report = command(
        "report",
        "read the logs of runs and draw them side by side",
        more="Margins, accuracies,\n"
        "weights and loss: one picture, and one table, which is printed as well.",
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
    _output(report, "report")

    score = command(
        "score",
        "compute implicit rewards and margins of a preference file",
        more="The reward of an\n"
        "answer is beta * (log p under MODEL - log p under --ref); a margin is the chosen reward\n"
        "less the rejected one. A run that was stopped goes on where it was.",
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

    return parser


def _output(parser: argparse.ArgumentParser, folder: str) -> None:
    parser.add_argument("--out", default=folder, metavar="DIR", help=f"folder (default: {folder})")
    parser.add_argument(
        "--format",
        nargs="+",
        default=["png", "csv"],
        choices=["png", "svg", "csv"],
        help="what to write; csv needs no matplotlib (default: png csv)",
    )
