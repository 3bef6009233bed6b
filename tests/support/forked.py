"""Commands in processes that multiprocessing's fork server starts, which has a host imported: to
import one takes longer than all the rest of a short run."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import runpy
import secrets
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock, Thread
from typing import Any

SUPPORT = Path(__file__).parent
LONGEST = 600  # seconds, after which a command that hangs is ended
ONE_AT_A_TIME = Lock()


def environment(*path: Path | str, **variables: str) -> dict[str, str]:
    """The variables of a user's shell, and ``support/sitecustomize.py``, which each process
    imports."""
    dropped = (
        "FOCALPO_", "PYTHONPATH", "PYTEST_", "TORCH_DEVICE_BACKEND_AUTOLOAD", "DS_ACCELERATOR", "WANDB_",
    )  # fmt: skip
    env = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    env |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}",
        "PYTHONPATH": os.pathsep.join(map(str, [*path, SUPPORT])),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",  # the same sums in the same order, run after run
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "AXOLOTL_DO_NOT_TRACK": "1",
        # Its worker processes take longer to start than some hundred rows.
        "AXOLOTL_DATASET_NUM_PROC": "0",
    }
    return {**env, **variables}


def run(
    command: str,
    argv: Sequence[str | Path],
    folder: Path | str,
    ranks: int | None = None,
    *,
    path: Sequence[Path | str] = (),
    first: Sequence[str] = (),
    merged: bool = False,
    **variables: str,
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr (with ``merged`` all of it as stdout) of a command in ``folder``.

    ``command`` is a function, "module:name", or a script.  It runs in a process for each of
    ``ranks``, with the variables that torchrun sets, or in one without these.  The modules in
    ``first`` are imported before it; what the folders of ``path`` hold comes before all else.
    """
    at_import = {name: variables[name] for name in variables if name.endswith("AUTOLOAD")}
    context = multiprocessing.get_context("forkserver")
    outputs = [_Output(context) for _ in range(1 if merged else 2)]
    worlds: list[dict[str, str]] = [{}] if ranks is None else _worlds(ranks)
    processes = [
        context.Process(
            target=_start,
            args=(command, list(map(str, argv)), str(folder), list(map(str, path)), list(first)),
            kwargs={"outputs": [output.writer for output in outputs], **variables, **world},
        )
        for world in worlds
    ]
    with _starting(_server(**at_import)):
        for process in processes:
            process.start()
    for process in processes:
        process.join()
    code = max((process.exitcode for process in processes), key=abs)
    return code, *(output.read() for output in outputs), *[""] * merged


class _Output:
    """A pipe, because a file would be part of what a test does to the disk."""

    def __init__(self, context: Any) -> None:
        self.reader, self.writer = context.Pipe(duplex=False)
        self.chunks: list[bytes] = []
        self.thread = Thread(target=self._fill, daemon=True)
        self.thread.start()

    def _fill(self) -> None:
        while chunk := os.read(self.reader.fileno(), 65536):
            self.chunks.append(chunk)

    def read(self) -> str:
        """The output until the commands ended; a process that they leave behind may live on."""
        self.writer.close()
        self.thread.join(5)  # seconds
        return b"".join(self.chunks).decode(errors="replace")


def free_port() -> str:
    """A port below those that the system assigns itself, which it could do before this port is
    used, and in this test process's own range, because another process could draw it in the
    meantime."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 12
    while True:
        port = 20_000 + 1000 * worker + secrets.randbelow(1000)
        with socket.socket() as server, contextlib.suppress(OSError):
            server.bind(("127.0.0.1", port))
            return str(port)


def _worlds(ranks: int) -> list[dict[str, str]]:
    of_all = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    of_all |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [of_all | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _start(
    command: str,
    argv: list[str],
    folder: str,
    path: list[str],
    first: list[str],
    outputs: list[Connection],
    **variables: str,
) -> None:
    """In the new process."""
    signal.alarm(LONGEST)
    for to, output in ((1, outputs[0]), (2, outputs[-1])):
        os.dup2(output.fileno(), to)
    # The server's may have been files, and would seek in them.
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.chdir(folder)
    os.environ.pop("FOCALPO_LAST_LINE", None)  # the server isn't a launcher, which would print it
    os.environ.update(variables)
    sys.path[:0] = path
    _forget(path)
    for module in first:
        import_module(module)
    sys.argv = [command.partition(":")[0], *argv]
    try:
        if command.endswith(".py"):
            runpy.run_path(command, run_name="__main__")
        else:
            module, _, name = command.partition(":")
            sys.exit(getattr(import_module(module), name)())
    except Exception:  # as Python does for a program of its own
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


def _forget(path: list[str]) -> None:
    """A copy that is first on the path is imported, with what has imported the other."""
    there = {name for folder in path for name in os.listdir(folder)} & {*sys.modules}
    if there:
        there |= {"focalpo_plugins"}
    for name in [*sys.modules]:
        if name.partition(".")[0] in there:
            del sys.modules[name]


@functools.cache
def _server(**at_import: str) -> forkserver.ForkServer:
    """Started once in each test process, and gone with it: one for each setting of what is read when
    torch is imported."""
    server = forkserver.ForkServer()
    server.set_forkserver_preload(["preloaded"])
    with _as(environment(**at_import)):
        server.ensure_running()
    return server


@contextlib.contextmanager
def _starting(server: forkserver.ForkServer) -> Iterator[None]:
    """multiprocessing knows one server; the processes that are started meanwhile are of this one."""
    with ONE_AT_A_TIME:
        other, forkserver.connect_to_new_process = (
            forkserver.connect_to_new_process,
            server.connect_to_new_process,
        )
        try:
            yield
        finally:
            forkserver.connect_to_new_process = other


@contextlib.contextmanager
def _as(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
