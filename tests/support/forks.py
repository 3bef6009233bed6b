"""Commands in processes forked off one that has imported what they need: importing a host takes
longer than all the rest of a short run."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from typing import IO, Any

from harness import free_port

LONGEST = 600  # seconds, after which a command that hangs is ended


def fork(function: Callable[[], int | None], stdout: IO, stderr: IO) -> int:
    """The child's process id; it ends with what ``function`` returns, exits with or raises."""
    child = os.fork()
    if child:
        return child
    os.dup2(stdout.fileno(), 1)
    os.dup2(stderr.fileno(), 2)
    code: object = 1
    try:
        code = function()
    except SystemExit as error:
        code = error.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def wait(child: int) -> int:
    """Its exit code; of one that a signal ended, less than 0."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def world(ranks: int) -> list[dict[str, str]]:
    """The variables of each rank, as torchrun sets them."""
    of_all = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    of_all |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [of_all | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def on_ranks(
    command: Callable[[], int | None],
    folder: str,
    variables: Sequence[Mapping[str, str]],
    stdout: IO,
    stderr: IO,
) -> int:
    """Run ``command`` in ``folder``, in a process of its own for each of ``variables``; the exit code
    that is furthest from 0."""

    def run(of_rank: Mapping[str, str]) -> int | None:
        signal.alarm(LONGEST)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(folder)
        os.environ.update(of_rank)
        return command()

    children = [fork(lambda own=own: run(own), stdout, stderr) for own in variables]
    return max((wait(child) for child in children), key=abs)


def captured(run: Callable[[IO, IO], int]) -> list[Any]:
    """Exit code, stdout and stderr of ``run(stdout, stderr)``."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        code = run(stdout, stderr)
        for output in (stdout, stderr):
            output.seek(0)
        return [code, stdout.read(), stderr.read()]


def serve(
    modules: Iterable[str], answer: Callable[[Any], Any], operators: Sequence[str] = ()
) -> None:
    """Import ``modules``, load DeepSpeed's ``operators``, which each forked rank would look for, and
    then answer each JSON line of each client with one, as harness.Server asks; each client has a process
    of its own, forked off this one.  It ends with the last client; and where it is started without a
    socket, with the imports, whose bytecode is there then."""
    for module in modules:
        import_module(module)
    if operators:
        import_module("deepspeed_operators").load(*operators)
    if "FORKS_LISTENER" not in os.environ:
        return
    listener = socket.socket(fileno=int(os.environ.pop("FORKS_LISTENER")))
    gc.freeze()  # no child has to look through all that was imported
    clients: set[int] = set()
    last = False
    while True:
        listener.settimeout(0.1 if clients or last else 60)  # seconds
        try:
            client = listener.accept()[0]
        except TimeoutError:
            clients -= {child for child in clients if os.waitpid(child, os.WNOHANG)[0]}
            if not clients and last:
                return
            if not clients:
                # Whoever comes now starts another; somebody may have come just before.
                os.unlink(listener.getsockname())
                last = True
            continue
        child = os.fork()
        if not child:
            listener.close()
            _answer(client, answer)
            os._exit(0)
        client.close()
        clients.add(child)


def _answer(client: socket.socket, answer: Callable[[Any], Any]) -> None:
    client.setblocking(True)
    with client.makefile("rw") as lines:
        client.close()
        start = json.loads(lines.readline())
        os.chdir(start["cwd"])
        os.environ.update(start["env"])
        for line in lines:
            print(json.dumps(answer(json.loads(line))), file=lines, flush=True)
