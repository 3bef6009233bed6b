"""This package's keys as options of Axolotl's commands: ``axolotl train --focalpo-gamma 0.1``.

Axolotl turns only its own keys into options.  Its parser hands unknown options to the launcher, and
drops them if the launcher is ``python``.
"""

from __future__ import annotations

import difflib
import functools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import click
import yaml

from _focalpo_plugins_autoload import may_ask

from ..errors import FocalPOError, InvalidValue
from . import RL_AS_WRITTEN, TRAINERS
from .autoload import names_us

_KINDS = {int: int, float: float, str: str}


def patch(module: ModuleType | None = None) -> None:
    """Add our options to each command that takes the keys of a config, when click parses it.

    Called in the process of the ``axolotl`` command, before click parses.  A config that can't be
    trained is refused there too.
    """
    parse_args = click.Command.parse_args

    @functools.wraps(parse_args)
    def with_ours(self: click.Command, ctx: click.Context, args: list[str]) -> list[str]:
        takes_keys = _takes_keys(self)
        rest: list[str] = parse_args(self, ctx, _with_ours(self, args) if takes_keys else args)
        if takes_keys:
            _check_config(ctx.params)
        return rest

    click.Command.parse_args = with_ours  # type: ignore[method-assign]


def check_arrived(cfg: Any) -> None:
    """Refuse one of our options if it was given but is not in the config.

    Raises:
        ValueError: Axolotl dropped the option.
    """
    context = click.get_current_context(silent=True)
    if context is not None and _takes_keys(context.command):
        for word in context.args:
            if _key(word).startswith(("focalpo", f"{cfg.get('rl')}_")):
                raise InvalidValue(
                    f"unknown option {word!r}: Axolotl's command would drop it. Write {_key(word)} "
                    "in the YAML; options of focalpo_plugins need its autoload."
                )
    if cfg.get("strict") and cfg.get("trainer_cls") not in TRAINERS:
        for word in sys.argv[1:]:
            if word.startswith("--") and _key(word) in _keys() and cfg.get(_key(word)) is None:
                raise InvalidValue(
                    f"{word} would be dropped under strict: true, which takes only the YAML's keys "
                    f"from the command line. Write {_key(word)} in the YAML, or remove strict."
                )


def _check_config(given: Mapping[str, Any]) -> None:
    """Refuse a config that asks for one of our losses before a launcher is started.

    What isn't found here is found where Axolotl loads the config, in the launcher's processes.

    Args:
        given: the command's arguments and options by name.

    Raises:
        click.ClickException: the config can't be trained; the message names the key.
    """
    # Another machine reads the first; with the second, each run has its own config.
    if given.get("cloud") or given.get("sweep"):
        return
    try:
        cfg = _loaded(given)
        if names_us(cfg) or may_ask(cfg):
            from .refusals import check

            check(cfg)
    except FocalPOError as error:
        raise click.ClickException(str(error)) from None
    except Exception:  # Axolotl reports a config that can't be read
        return


def _loaded(given: Mapping[str, Any]) -> dict[str, Any]:
    """The config as Axolotl loads it: with the values of the command line."""
    cfg: dict[str, Any] = yaml.safe_load(Path(given["config"]).read_text(encoding="utf-8"))
    in_file = set(cfg)
    for name, value in given.items():
        key, _, inner = name.partition("__")
        if value is None or (cfg.get("strict") and key not in in_file):
            continue
        value = yaml.safe_load(value) if isinstance(value, str) else value
        cfg[key] = {**(cfg.get(key) or {}), inner: value} if inner else value
    return cfg


def _any(text: str) -> Any:
    """``text`` as YAML would read it: a number, true, false, null or a list if it is one, else the
    text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _takes_keys(command: click.Command) -> bool:
    return {"base_model", "rl"} <= {parameter.name for parameter in command.params}


def _keys() -> dict[str, tuple[Any, str]]:
    """The keys that a user can give, the type of each, and what it does."""
    from .args import FocalPOArgs

    fields = FocalPOArgs.model_fields.items()
    return {
        key: (next(iter(get_args(field.annotation)), object), field.description or "")
        for key, field in fields
        if key != RL_AS_WRITTEN
    }


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("-").replace("-", "_").removeprefix("no_")


def _with_ours(command: click.Command, args: list[str]) -> list[str]:
    """Add our options to the command if ``args`` may hold any; return ``args`` in their spelling.

    Raises:
        click.UsageError: one of our options is misspelt, or is at a place where it is dropped.
    """
    known = {
        option
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    unknown = [word for word in args if word[:1] == "-" and word.partition("=")[0] not in known]
    if not unknown and "--help" not in args:
        return args
    try:
        flags = _add(command)
    except Exception:  # a run that doesn't use our options must continue
        if any("focalpo" in word for word in unknown):
            raise
        return args
    end = args.index("--") if "--" in args else len(args)
    words: list[str] = []
    for word, following in zip(args, [*args[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        flag = name.replace("_", "-")
        if flag in flags and len(words) < end:
            if flags[flag] is bool and following.lower() in ("true", "false", "yes", "no"):
                raise click.UsageError(
                    f"{name} takes no value, got {following!r}: give {flag} for true, or "
                    f"--no-{_key(flag).replace('_', '-')} for false."
                )
            word = flag + equals + value
        elif flag in flags:
            raise click.UsageError(
                f"{name} must come before --, got it after: what follows goes to the launcher."
            )
        elif word in unknown and (
            _key(word).startswith("focalpo")
            or difflib.get_close_matches(flag, flags, n=1, cutoff=0.85)
        ):
            from ..guards.messages import did_you_mean

            raise click.UsageError(f"unknown option {word!r}{did_you_mean(flag, flags)}")
        words.append(word)
    return words


def _add(command: click.Command) -> dict[str, Any]:
    """Add our options to the command, and return each with the type of its value."""
    flags = {}
    there = {parameter.name for parameter in command.params}
    for key, (kind, description) in _keys().items():
        flag = f"--{key.replace('_', '-')}"
        off = f"--no-{key.replace('_', '-')}"
        flags[flag] = kind
        if kind is bool:
            flags[off] = kind
        if key not in there:
            command.params.append(
                click.Option(
                    [f"{flag}/{off}" if kind is bool else flag, key],
                    default=None,
                    type=None if kind is bool else _KINDS.get(kind, _any),
                    metavar=None if kind is bool or kind in _KINDS else "VALUE",
                    help=f"{description or 'Option of a loss'}. Key of focalpo_plugins.",
                )
            )
    return flags
