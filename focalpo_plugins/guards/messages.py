"""Messages of this package: one line on stderr, and errors that name what the user wrote."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ..errors import FocalPOError, InvalidValue


def say(what: str) -> None:
    """Write one line to stderr, in one write.

    If a launcher unbuffers its ranks, ``print`` writes a line and its newline separately, and
    another rank's line can come between them.
    """
    sys.stderr.write(f"focalpo_plugins: {' '.join(what.splitlines())}\n")
    sys.stderr.flush()


def one_line(error: BaseException) -> str:
    """The message in one line, with the type unless it is a FocalPOError or a ValueError."""
    errors = getattr(error, "errors", None)
    if callable(errors):  # pydantic's list of errors
        found = [
            f"{'.'.join(map(str, e['loc']))}: {e['msg']}" if e["loc"] else e["msg"]
            for e in errors()
        ]
        return "; ".join(found)
    message = " ".join(str(error).split())
    plain = isinstance(error, FocalPOError | ValueError)
    return message if plain else f"{type(error).__name__}: {message}"


@contextmanager
def explained(explain: Callable[[Exception], str | None]) -> Iterator[None]:
    """Add the result of ``explain`` to an error of the host raised inside, unless it is None.

    Raises:
        ValueError: the host's message and the explanation.
    """
    try:
        yield
    except Exception as error:
        reason = None
        with suppress(Exception):  # then the host's own error says more
            reason = explain(error)
        if reason is None or reason in str(error):  # an explained error may pass here again
            raise
        raise InvalidValue(f"{one_line(error).rstrip('.')}. {reason}") from error


@contextmanager
def named(prefix: str, options: Iterable[str] = (), true: str = "=True") -> Iterator[None]:
    """Make the message of a ValueError raised inside name values as the user writes them.

    Args:
        prefix: text such as ``focalpo_`` or ``--focalpo.``, put before the message.  The message
            begins with the name of the wrong value.
        options: names that the message may tell the user to set, as ``NAME=True``.
        true: what the user writes after prefix and name to set one: ``: true`` in a YAML.
    """
    try:
        yield
    except ValueError as error:
        message = str(error)
        for option in options:
            message = message.replace(f"{option}=True", f"{prefix}{option}{true}")
        raise InvalidValue(f"{prefix}{message}") from None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence's end: ``; did you mean 'gamma'?``, or ``; known: a, b.`` if nothing is near."""
    known = list(known)
    return meant(word, known) or f"; known: {', '.join(known) or 'none'}."


def meant(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'gamma'?``, or nothing if nothing is near."""
    near = difflib.get_close_matches(word.lower(), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def modules_of(error: BaseException) -> Iterator[tuple[str, str]]:
    """Module and function of each call that the error came through, the outermost first."""
    trace = error.__traceback__
    while trace is not None:
        frame: Any = trace.tb_frame
        yield str(frame.f_globals.get("__name__")), frame.f_code.co_name
        trace = trace.tb_next
