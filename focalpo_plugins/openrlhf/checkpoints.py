"""What this package writes into OpenRLHF's checkpoints and logs, and reads when a run resumes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InvalidValue
from ..guards.folders import check_folder, write_whole
from ..guards.resume import RECORD_FILE
from .names import installed_flag, nested_args
from .ranks import on_rank_0

# The key of a record for values of the run, which are not compared.
_RUN = "run"


class Saved(NamedTuple):
    """A checkpoint's information about its training.

    Attributes:
        checkpoint: its folder.
        record: what was trained; None without a loss of this package.
        steps: the number of optimizer steps of the whole run, if it is known.
        losses: the losses of the run's first step and its last.
        log: the name of TensorBoard's folder.
    """

    checkpoint: str
    record: dict[str, Any] | None
    steps: int | None = None
    losses: list[float] | None = None
    log: str | None = None


def with_run(record: Mapping[str, Any], **run: Any) -> dict[str, Any]:
    """The record of a checkpoint: what is trained, and the fields of :class:`Saved` of its run."""
    return {**record, _RUN: run}


def read(folder: Path) -> Saved | None:
    """The information in the last checkpoint in ``folder``; None if there is none.

    Raises:
        ValueError: its record can't be read.
    """
    latest = folder / "latest"
    if not latest.is_file():
        return None
    checkpoint = folder / latest.read_text(encoding="utf-8").strip()
    path = checkpoint / RECORD_FILE
    if not path.is_file():
        return Saved(str(checkpoint), None)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return Saved(str(checkpoint), record, **record.pop(_RUN, {}))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InvalidValue(
            f"{path} records what the checkpoint was trained with, and can't be read ({error}). "
            f"Resume an earlier checkpoint: write its name into {latest}."
        ) from None


def check_folders(args: Any, saves: bool) -> None:
    """Refuse folders in which the trained model or a checkpoint could not be saved.

    OpenRLHF writes to its output folder only after the last step.

    Args:
        args: OpenRLHF's arguments.
        saves: whether a checkpoint can have anything in it.

    Raises:
        ValueError: no file can be written to one of them.
    """
    ckpt = nested_args(args).ckpt
    # -1, the default, asks for no checkpoints; OpenRLHF makes it infinity later.
    used = ("output_dir", "path") if saves and ckpt.save_steps != -1 else ("output_dir",)
    for name in used:
        check_folder(Path(getattr(ckpt, name)), f"--{installed_flag(f'ckpt.{name}', vars(args))}")


def save_with_record(
    strategy: Any,
    record: Callable[[], Mapping[str, Any]],
    save: Callable[..., Any],
    folder: str,
    tag: str,
    *more: Any,
    **kwargs: Any,
) -> Any:
    """Write our record into the checkpoint's folder, then call DeepSpeed's ``save_checkpoint``.

    DeepSpeed names a checkpoint in ``latest`` once it is complete, so it always has a record.
    """

    def write() -> None:
        path = Path(folder) / tag / RECORD_FILE
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(record()))
        except OSError as error:
            raise InvalidValue(
                f"the checkpoint folder must be writable and have free space, got {folder!r}: "
                f"{error}. Free some space, or name another folder; the last complete checkpoint "
                "can be resumed."
            ) from None

    on_rank_0(strategy, write)
    return save(folder, tag, *more, **kwargs)


def link_logs(log: Path, before: str, after: int) -> None:
    """Name the log of the run that is resumed in this run's, for ``focalpo report``.

    Args:
        log: TensorBoard's folder of this run.
        before: the name of that of the run that is resumed.
        after: the number of steps that it had done.
    """
    with suppress(OSError):  # not worth stopping the run
        write_whole(log / RECORD_FILE, json.dumps({"resumed": {"after": after, "log": before}}))
