"""A run's log, wherever its host has written it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import CommandError
from .event_files import from_event_files
from .quantities import Log
from .trainer_states import from_states, read_state


@dataclass
class Run:
    """One run's log.

    Attributes:
        series: for ``train``, ``eval``, and ``eval_NAME`` for an evaluation set of that name, each
            quantity by step.
        notes: remarks on the log for the user.
    """

    name: str
    source: Path
    series: Log
    notes: list[str]

    @property
    def evaluations(self) -> list[str]:
        return [split for split in self.series if split != "train"]


def read_runs(words: Sequence[str]) -> list[Run]:
    """The run of each word of the command line, ``RUN`` or ``NAME=RUN``."""
    runs = []
    for word in words:
        name, path = _named(word)
        runs.append(read_run(path, name))
    _tell_apart(runs)
    return runs


def read_run(path: Path, name: str | None) -> Run:
    """The log at ``path``, which is a log file, a checkpoint, or a folder that holds them.

    Raises:
        CommandError: there is no log, or it holds no loss.
    """
    if not path.exists():
        raise CommandError(f"RUN must be a run's folder or log, got {str(path)!r}: nothing there.")
    files, events = _files(path)
    states, notes = [], []
    for file in files:
        try:
            states.append((read_state(file), file))
        except (OSError, ValueError, LookupError, TypeError):
            if path.is_file():
                raise CommandError(
                    f"{path} must be a trainer_state.json with log_history and global_step, and is "
                    "not. Give the run's folder."
                ) from None
            notes.append(f"{file} is skipped: incomplete, as when a run is killed while it saves")
    if states:
        series, source, found = from_states(states)
    elif events:
        newest = max(events, key=lambda p: p.stat().st_mtime)
        source = newest if path.is_file() else newest.parent
        series, found = from_event_files(source)
    elif notes:
        raise CommandError(
            f"RUN must hold a trainer_state.json that is whole, got {str(path)!r}: "
            f"{'; '.join(notes)}."
        )
    else:
        raise CommandError(
            f"RUN must hold trainer_state.json, checkpoint-*/trainer_state.json or TensorBoard "
            f"event files, got {str(path)!r}: none of them is in it. OpenRLHF writes event "
            "files with --logger.tensorboard_dir, the other hosts trainer_state.json with every "
            "checkpoint."
        )
    notes += found
    if not any("margin" in logged or "loss" in logged for logged in series.values()):
        raise CommandError(
            f"RUN must be the log of a training run, got {str(source)!r}: it holds no loss."
            + "".join(f" {note[0].upper()}{note[1:]}" for note in notes)
        )
    return Run(name or _name(path), source, series, notes)


def _files(path: Path) -> tuple[list[Path], list[Path]]:
    """The files of transformers' state and TensorBoard's files at ``path``."""
    if path.is_file():
        return ([], [path]) if ".tfevents." in path.name else ([path], [])
    files = [p for p in (path / "trainer_state.json",) if p.is_file()]
    checkpoints = [p for p in sorted(path.glob("checkpoint-*")) if p.is_dir()]
    files += [p / "trainer_state.json" for p in checkpoints]
    return files, sorted(path.rglob("*.tfevents.*"))


def _named(word: str) -> tuple[str | None, Path]:
    """Name and path of ``NAME=RUN``; an existing path has no name, and a name may contain ``=``."""
    splits = [at for at, letter in enumerate(word) if letter == "="]
    if not splits or Path(word).exists():
        return None, Path(word)
    at = next((at for at in splits if word[at + 1 :] and Path(word[at + 1 :]).exists()), splits[0])
    return word[:at], Path(word[at + 1 :])


def _name(path: Path) -> str:
    """The name of the run's folder, not of its log, its checkpoint or its TensorBoard folder."""
    path = path.resolve()
    if path.is_file():
        path = path.parent
    while path.name.startswith("checkpoint-") or path.name in ("tensorboard", "runs"):
        path = path.parent
    return path.name


def _tell_apart(runs: list[Run]) -> None:
    """Number the runs that have the same name, because their folders have the same name."""
    for name in {each.name for each in runs}:
        same = [each for each in runs if each.name == name]
        if len(same) > 1:
            for number, each in enumerate(same, 1):
                each.name = f"{name} ({number})"
