"""Makes ``pref_loss: focalpo`` known to LLaMA-Factory's parser of arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, get_args, get_type_hints

from _focalpo_plugins_autoload import may_ask

_PARSERS = ("_parse_train_args", "_parse_train_mca_args", "_parse_infer_args", "_parse_eval_args")


def patch(parser: ModuleType) -> None:
    """Wrap the functions that parse the arguments of a command, a YAML or a dict.

    Called when ``llamafactory.hparams.parser`` is imported.  Each call decides anew, since one
    process may train one run after the other.
    """
    for name in _PARSERS:
        if hasattr(parser, name):
            setattr(parser, name, _wrapped(parser, getattr(parser, name), "train" in name))


def _wrapped(parser: Any, parse: Callable[[Any], Any], trains: bool) -> Callable[[Any], Any]:
    @functools.wraps(parse)
    def with_our_losses(args: Any = None) -> Any:
        args = parser.read_args(args)
        if not _may_ask(parser, args, trains):
            return parse(args)
        from .arguments import parsed

        return parsed(parser, parse, args, trains)

    return with_our_losses


def _may_ask(parser: Any, args: Any, trains: bool) -> bool:
    """Whether the arguments may ask for one of our losses, or for the help that lists our keys."""
    if isinstance(args, dict):
        named = args.get("pref_loss") not in (None, *host_losses(parser))
        return named or may_ask([*args, *args.values()])
    return trains and not {"-h", "--help"}.isdisjoint(args) or may_ask(args)


def host_losses(parser: Any) -> tuple[str, ...]:
    """The losses that LLaMA-Factory names itself."""
    return get_args(get_type_hints(parser.FinetuningArguments)["pref_loss"])
