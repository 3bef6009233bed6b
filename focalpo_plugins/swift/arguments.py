"""ms-swift's ``RLHFArguments`` with our keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field, fields, make_dataclass
from typing import Any

from ..errors import InvalidValue
from ..guards.messages import did_you_mean
from .keys import KEYS
from .refusals import check


def extended(host: Any) -> type:
    """A subclass of ms-swift's arguments with our keys, each None unless it is given.

    A key that isn't given leaves no trace in an object, so ms-swift prints and saves its own runs
    as it does without this package.
    """
    taken = {each.name for each in fields(host)}
    ours = {name: key for name, key in KEYS.all().items() if name not in taken}

    def __post_init__(self: Any) -> None:
        check(self, taken)
        host.__post_init__(self)
        for name in ours:
            if self.__dict__.get(name, 0) is None:
                del self.__dict__[name]  # the class has the same default

    def __str__(self: Any) -> str:
        lines = host.__str__(self).splitlines(keepends=True)
        left_out = {f"{name}=None," for name in ours}
        return "".join(line for line in lines if line.strip() not in left_out)

    extended = make_dataclass(
        host.__name__,
        [
            # argparse needs the types themselves, and reads help as a format.
            (
                name,
                (key.kind or str) | None,
                field(default=None, repr=False, metadata={"help": key.help.replace("%", "%%")}),
            )
            for name, key in ours.items()
        ],
        bases=(host,),
        namespace={
            "__doc__": host.__doc__,
            "__post_init__": __post_init__,
            "__str__": __str__,
        },
    )
    extended.__module__, extended.__qualname__ = host.__module__, host.__qualname__
    return extended


def check_words(words: Sequence[str], arguments: type) -> None:
    """Refuse one of our keys that is misspelt or abbreviated on the command line.

    ms-swift's own abbreviations still work.

    Args:
        words: the words of the command line.
        arguments: the class that they are read into.

    Raises:
        ValueError: the message names the key.
    """
    ours = KEYS.all()
    known = {each.name for each in fields(arguments)}  # type: ignore[arg-type]
    for word in words:
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if not word.startswith("--") or name in known:
            continue
        if KEYS.misspelt(name, known - ours.keys()):
            raise InvalidValue(
                f"unknown key {name}, got {word!r}{did_you_mean(name, ours)} Write keys of "
                "focalpo_plugins in full."
            )
