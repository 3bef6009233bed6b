"""Makes our losses known to ms-swift: its arguments, its commands and its choice of a trainer."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def patch(module: ModuleType) -> None:
    """Extend the module of ms-swift that was just imported."""
    _PATCHES[module.__name__](module)


def _extend_arguments(module: ModuleType) -> None:
    """Give ``RLHFArguments`` our keys, before any other module takes the class from its own."""
    from .arguments import extended

    module.RLHFArguments = extended(module.RLHFArguments)  # type: ignore[attr-defined]


def _check_words(module: ModuleType) -> None:
    """Have ``rlhf_main`` look at our keys as they are written, before argparse reads them."""
    host = module.SwiftRLHF
    parse = host._parse_args

    @functools.wraps(parse)
    def checked(self: Any, args: Any = None) -> Any:
        from .arguments import check_words

        if not isinstance(args, self.args_class):
            check_words(sys.argv[1:] if args is None else args, self.args_class)
        return parse(self, args)

    host._parse_args = checked


def _choose_trainer(module: ModuleType) -> None:
    """Have ms-swift build our trainer for arguments that ask for one of our losses."""
    choose = module.TrainerFactory.get_trainer_cls

    @functools.wraps(choose)
    def ours_or_hosts(args: Any) -> Any:
        if not _may_ask(args):
            return choose(args)
        from .keys import requested

        asked = requested(args)
        if asked is None:
            return choose(args)
        from .trainer import SwiftPairwiseTrainer

        return functools.partial(SwiftPairwiseTrainer, asked=asked, arguments=args)

    module.TrainerFactory.get_trainer_cls = staticmethod(ours_or_hosts)


def _may_ask(args: Any) -> bool:
    return getattr(args, "rlhf_type", None) == "dpo"


def _refuse_megatron_command(module: ModuleType) -> None:
    """End a command of Megatron that asks for one of our losses.

    It would train DPO: its trainer passes no type to the loss.  ms-swift has made words of its YAML.
    """
    words = sys.argv[1:]
    if any("focalpo" in word for word in words) or "--loss_type" in words:
        from .megatron import refusal

        why = refusal(_values_of("--loss_type", words), words)
        if why is not None:
            raise SystemExit(f"focalpo_plugins: {why}")


def _values_of(flag: str, words: list[str]) -> list[str]:
    """What stands after a flag on a command line."""
    found: list[str] = []
    for number, word in enumerate(words):
        if word == flag:
            for value in words[number + 1 :]:
                if value.startswith("--"):
                    break
                found.append(value)
        elif word.startswith(f"{flag}="):
            found.append(word.partition("=")[2])
    return found


def _refuse_megatron_arguments(module: ModuleType) -> None:
    from .megatron import refusing

    module.MegatronRLHFArguments = refusing(  # type: ignore[attr-defined]
        module.MegatronRLHFArguments
    )


_PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "swift.arguments.rlhf_args": _extend_arguments,
    "swift.pipelines.train.rlhf": _check_words,
    "swift.trainers.trainer_factory": _choose_trainer,
    "swift.megatron": _refuse_megatron_command,
    "swift.megatron.arguments.rlhf_args": _refuse_megatron_arguments,
}
