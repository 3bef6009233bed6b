"""Makes our losses known to ms-swift: its arguments, its commands and its choice of a trainer."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from _focalpo_plugins_autoload import may_ask


def patch(module: ModuleType) -> None:
    """Extend the module of ms-swift that was just imported."""
    _PATCHES[module.__name__](module)


def _extend_arguments(module: ModuleType) -> None:
    """Give ``RLHFArguments`` our keys, before any other module takes the class from its own."""
    from .arguments import extended

    module.RLHFArguments = extended(module.RLHFArguments)  # type: ignore[attr-defined]


def _extend_command(module: ModuleType) -> None:
    """Have ``rlhf_main`` check our keys as they are written, before argparse reads them.

    If ms-swift can't read the data of a run with our loss, the run prints what is wrong with them.
    """
    host = module.SwiftRLHF
    parse = host._parse_args

    @functools.wraps(parse)
    def checked(self: Any, args: Any = None) -> Any:
        words = sys.argv[1:] if args is None else args
        if not isinstance(args, self.args_class) and may_ask(words):
            from ..guards import last_line
            from .arguments import check_words

            last_line.install(lambda error: None)  # of a launched run, the reason
            check_words(words, self.args_class)
        return parse(self, args)

    host._parse_args = checked
    for name in ("_get_dataset", "_encode_dataset"):
        setattr(host, name, _explained(getattr(host, name)))


def _explained(read: Callable[..., Any]) -> Callable[..., Any]:
    """A method that reads data; if our loss is trained, what it returns is checked."""

    @functools.wraps(read)
    def explained(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_ours(self.args):
            return read(self, *args, **kwargs)
        from .data import reading

        given = args[0] if args else None
        return reading(self.args, lambda: read(self, *args, **kwargs), given)

    return explained


def _choose_trainer(module: ModuleType) -> None:
    """Have ms-swift build our trainer for arguments that ask for one of our losses."""
    choose = module.TrainerFactory.get_trainer_cls

    @functools.wraps(choose)
    def ours_or_hosts(args: Any) -> Any:
        if not _is_ours(args):
            return choose(args)
        from .keys import requested
        from .trainer import SwiftPairwiseTrainer

        return functools.partial(SwiftPairwiseTrainer, asked=requested(args), arguments=args)  # type: ignore[arg-type]

    module.TrainerFactory.get_trainer_cls = staticmethod(ours_or_hosts)


def _is_ours(args: Any) -> bool:
    """Whether arguments ask for one of our losses."""
    if getattr(args, "rlhf_type", None) != "dpo":
        return False
    try:
        from .keys import asked_types
    except Exception:  # ms-swift refuses our keys and our losses then
        return False
    return bool(asked_types(args))


_PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "swift.arguments.rlhf_args": _extend_arguments,
    "swift.pipelines.train.rlhf": _extend_command,
    "swift.trainers.trainer_factory": _choose_trainer,
}
