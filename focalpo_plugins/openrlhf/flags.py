"""The flags ``--loss`` and ``--NAME.option`` in OpenRLHF's parser."""

from __future__ import annotations

import functools
import sys
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from ..errors import InvalidValue
from ..guards import hub, last_line
from ..guards.messages import did_you_mean, named
from ..options import OF_ANY_LOSS
from ..registry import BoundLoss, PairwiseLoss, get_loss, losses
from ..releases import TESTED
from . import cpu, data, refusals
from .names import FLAT, versions

# OpenRLHF's own loss, even if a package registers a loss under this name.
_HOSTS_LOSS = "dpo"

# Flags under every loss's name that are not options of the loss.
_TRAINER_FLAGS = {
    "shared_prompts": False,
    "balanced_batches": False,
    "precompute_ref": False,
    "precompute_dir": "OpenRLHF's output folder",
    "allow_changed": False,
    "allow_data": False,
}


def parse(
    parse_original: Callable[..., Any],
    parser: ArgumentParser,
    args: Sequence[str] | None,
    *more: Any,
    **kwargs: Any,
) -> Any:
    """Parse with our flags in OpenRLHF's parser, and install our trainer if it is asked for.

    Any error in the command line ends the process as in argparse: usage, message, exit code 2.

    Args:
        parse_original: the parser's own ``parse_args`` or ``parse_known_args``.
        parser: OpenRLHF's parser.
        args: passed to ``parse_original``, like ``more`` and ``kwargs``.

    Raises:
        RuntimeError: our loss is asked for, and the installed OpenRLHF constructs its own loss
            elsewhere.
    """
    argv = list(sys.argv[1:] if args is None else args)
    offered = _offered(parser)
    if not _add(parser, argv, offered):
        return parse_original(args, *more, **kwargs)
    _check_spelling(parser, argv, offered)
    parsed = parse_original(args, *more, **kwargs)
    loss = _check(parser, parsed[0] if isinstance(parsed, tuple) else parsed, offered)
    if loss is not None:
        from .trainer import install

        install(loss)
        args = parsed[0] if isinstance(parsed, tuple) else parsed
        last_line.install(
            lambda error: data.explain(args, error) or hub.explain(error, data.remote_names(args))
        )
    return parsed


def _refuse(parser: ArgumentParser, message: str) -> NoReturn:
    last_line.repeat(message)
    parser.error(message)


def _offered(parser: ArgumentParser) -> dict[str, PairwiseLoss]:
    """The losses whose flags can be added to OpenRLHF's own."""
    of_host = _words(parser)
    return {
        name: loss for name, loss in losses().items() if name != _HOSTS_LOSS and name not in of_host
    }


def _words(parser: ArgumentParser) -> set[str]:
    """The first words of OpenRLHF's flags.

    OpenRLHF makes a namespace of each word before a dot, so a loss with such a name would mix its
    options with OpenRLHF's, or take the place of a value.
    """
    flags = {flag.removeprefix("--") for flag in _known(parser)}
    flags |= {*FLAT, *parser._defaults, *(action.dest for action in parser._actions)}
    return {flag.split(".")[0] for flag in flags}


def _flags(offered: Mapping[str, PairwiseLoss]) -> dict[str, tuple[PairwiseLoss, str]]:
    """For each flag of a loss, without its dashes, the loss and the option."""
    return {
        f"{loss.name}.{option}": (loss, option)
        for loss in offered.values()
        for option in _options_of(loss)
    }


def _options_of(loss: PairwiseLoss) -> dict[str, Any]:
    return {**_TRAINER_FLAGS, **loss.options}


def _add(parser: ArgumentParser, argv: Sequence[str], offered: Mapping[str, PairwiseLoss]) -> bool:
    """Add the flags, and return whether they were added.

    None is added if OpenRLHF has a flag ``--loss`` itself and this run uses none of our flags.
    """
    if "--loss" in _known(parser):
        if _written(offered) & {word.split("=")[0] for word in argv}:
            _refuse(
                parser,
                f"{versions()}: OpenRLHF already has --loss, which focalpo_plugins would add. "
                f"Install openrlhf {TESTED['openrlhf']}, or set FOCALPO_AUTOLOAD=0.",
            )
        return False
    group = parser.add_argument_group(
        "focalpo_plugins", "The loss of a pair as a function of its reward margin."
    )
    group.add_argument(
        "--loss",
        type=functools.partial(_loss_name, offered),
        choices=[_HOSTS_LOSS, *offered],
        default=_HOSTS_LOSS,
        help="Loss to train with; dpo is OpenRLHF's own (default: dpo)",
    )
    for flag, (loss, option) in _flags(offered).items():
        default = _options_of(loss)[option]
        kind: dict[str, Any] = {}
        if isinstance(default, bool):
            kind = {"action": "store_false" if default else "store_true"}
        elif isinstance(default, (int, float)):
            kind = {"type": functools.partial(_number, default)}
        elif default is None:
            kind = {"type": _number_or_text}
        helps = loss.help if option in loss.options else OF_ANY_LOSS
        text = helps.get(option, f"Option of the loss {loss.name}")
        text = f"{text} (default: {default})".replace("%", "%%")
        # A flag is in the namespace only if the user gave it: so we know what was asked for.
        group.add_argument(f"--{flag}", default=SUPPRESS, help=text, **kind)
    return True


def _written(offered: Mapping[str, PairwiseLoss]) -> set[str]:
    """Our flags, with their dashes."""
    return {"--loss", *(f"--{flag}" for flag in _flags(offered))}


def _known(parser: ArgumentParser) -> set[str]:
    return {name for action in parser._actions for name in action.option_strings}


def _loss_name(offered: Mapping[str, PairwiseLoss], name: str) -> str:
    known = [_HOSTS_LOSS, *offered]
    left_out = losses().get(name)
    if left_out is not None and name not in known:
        raise ArgumentTypeError(
            f"must be a loss whose name is not the first word of a flag of OpenRLHF, got {name!r} "
            f"of the package {left_out.package}: its flags would begin with --{name} too. Register "
            "it under another name."
        )
    if name not in known:
        raise ArgumentTypeError(
            f"must be one of {', '.join(known)}, got {name!r}{did_you_mean(name, known)}"
        )
    return name


def _number(default: float, text: str) -> float:
    """``text`` as a number of the type of ``default``; the loss checks its range."""
    try:
        return type(default)(text)
    except ValueError:
        raise ArgumentTypeError(
            f"must be a number, got {text!r}; it is {default} by default."
        ) from None


def _number_or_text(text: str) -> float | str:
    """A number if ``text`` is one: a default of None doesn't tell the option's type."""
    try:
        return float(text)
    except ValueError:
        return text


def _check_spelling(
    parser: ArgumentParser, argv: Sequence[str], offered: Mapping[str, PairwiseLoss]
) -> None:
    """Refuse one of our flags if it is misspelt or abbreviated.

    argparse expands an abbreviation to the one flag that begins with it.  OpenRLHF's own
    abbreviations still work, but an abbreviation of our flag could later mean another loss's flag.
    """
    ours = sorted(_written(offered))
    known = _known(parser)
    of_host = known - set(ours)
    for word in argv:
        name = word.split("=")[0]
        if name in known or not name.startswith("--") or name == "--":
            continue
        abbreviates = [flag for flag in ours if flag.startswith(name)]
        of_loss = any(name.startswith(f"--{loss}.") for loss in offered)
        if (abbreviates or of_loss) and not any(flag.startswith(name) for flag in of_host):
            _refuse(
                parser,
                f"unknown flag {name}, got {word!r}{did_you_mean(name, ours)} The flags of "
                "focalpo_plugins can't be abbreviated.",
            )


def _check(
    parser: ArgumentParser, namespace: Namespace, offered: Mapping[str, PairwiseLoss]
) -> BoundLoss | None:
    """The loss asked for, None for OpenRLHF's own; changes the namespace for that loss."""
    values = vars(namespace)
    name = values["loss"]
    try:
        cpu.check(namespace)
        for flag, (loss, _) in _flags(offered).items():
            if flag in values and loss.name != name:
                raise InvalidValue(
                    f"--{flag} is a flag of --loss {loss.name}, got {values[flag]!r} with --loss "
                    f"{name}. Give --loss {loss.name}, or remove --{flag}."
                )
        if name == _HOSTS_LOSS:
            del values["loss"]  # neither OpenRLHF nor its log sees our flag
            return None
        bound = _bind(get_loss(name), values)
        refusals.check(namespace, bound)
    except ValueError as error:
        _refuse(parser, str(error))
    for option, value in bound.options.items():
        values[f"{name}.{option}"] = value
    return bound


def _bind(loss: PairwiseLoss, values: dict[str, Any]) -> BoundLoss:
    given = {
        option: values[f"{loss.name}.{option}"]
        for option in loss.options
        if f"{loss.name}.{option}" in values
    }
    with named(f"--{loss.name}.", loss.options, ""):
        return loss.bind(**given)
