"""Our keys among LLaMA-Factory's arguments, and what they ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, field, fields, make_dataclass
from functools import partial
from typing import Any, Literal

from ..guards import last_line
from ..registry import PairwiseLoss, losses
from ..yaml_keys import (
    ALLOW_CHANGED,
    ALLOW_DATA,
    BALANCED,
    MARGIN,
    PRECOMPUTE,
    PRECOMPUTE_DIR,
    SHARED,
    Keys,
    value_of,
)
from . import MARGINS
from .autoload import host_losses

KEYS = Keys(
    host="LLaMA-Factory",
    common=(SHARED, BALANCED, PRECOMPUTE, PRECOMPUTE_DIR, ALLOW_CHANGED, ALLOW_DATA, MARGIN),
    asks="pref_loss: {}",
    on=": true",
    margins=MARGINS,
)

# The lists of classes that LLaMA-Factory parses.
_LISTS = ("_TRAIN_ARGS", "_TRAIN_MCA_ARGS", "_INFER_ARGS", "_EVAL_ARGS")
_PLAIN = (bool, int, float, str)


def parsed(parser: Any, parse: Callable[[Any], Any], args: Any, trains: bool) -> Any:
    """What ``parse`` makes of the arguments, with our keys among them.

    Args:
        parser: LLaMA-Factory's module of that name.
        parse: its function.
        args: a dict, or the words of a command line.
        trains: whether these are the arguments of a training.

    Returns:
        The function's result.  If one of our losses is asked for, its ``FinetuningArguments`` have
        the attributes ``focalpo``, an :class:`~focalpo_plugins.yaml_keys.Asked`;
        ``focalpo_data_args``, LLaMA-Factory's own arguments of the data; and
        ``focalpo_continues``, whether trained adapters are trained on, whose reference is the model
        without them.

    Raises:
        ValueError: the arguments ask for something that can't be trained; the message names the
            key.
    """
    from . import refusals

    last_line.install(lambda error: None)  # from here a refusal is a launched run's last line
    host = parser.FinetuningArguments
    classes = [each for name in _LISTS for each in getattr(parser, name, ())]
    known = {each.name for of in classes for each in fields(of)}
    of_host = host_losses(parser)
    refusals.check_keys(args, known, of_host)
    ours = _with_our_keys(host, known, of_host)
    with _in_place_of(parser, host, ours):
        found = parse(args)
    of_loss = next(each for each in found if isinstance(each, ours))
    if not trains:
        return found
    name = refusals.check_name(of_loss, known, of_host)
    if name is not None:
        _take(of_loss, losses()[name], found)
    return found


def asked_loss(args: Any, of_host: Sequence[str]) -> str | None:
    """The name of our loss that ``pref_loss`` asks for; None if it asks for the host's own.

    If another package's loss has the name of one of the host's, its keys tell which one is meant.
    """
    name = args.pref_loss
    if not isinstance(name, str) or name not in losses():
        return None
    if name in of_host and not is_marked(args, losses()[name]):
        return None
    return name


def is_marked(args: Any, loss: PairwiseLoss) -> bool:
    """Whether a key tells that this package's loss is meant: one of its own, or the margin's."""
    own = [MARGIN, *(f"{loss.name}_{option}" for option in loss.options)]
    return any(value_of(args)(key) is not None for key in own)


def _take(args: Any, loss: PairwiseLoss, beside: Sequence[Any]) -> None:
    """Keep what is asked for in ``args``, and have the host build our trainer for it.

    Args:
        beside: all arguments of the run.
    """
    from . import data, refusals, trainer

    refusals.check(args, loss)
    data_args = next(each for each in beside if hasattr(each, "cutoff_len"))
    model_args = next(each for each in beside if hasattr(each, "model_name_or_path"))
    given = value_of(args)
    args.focalpo, args.focalpo_data_args = KEYS.asked(KEYS.bind(loss, given), given), data_args
    args.focalpo_continues = _continues(model_args, args)
    last_line.install(partial(data.reason, model_args, data_args, args))
    data.check_files(data_args)
    trainer.install()


def _continues(model_args: Any, args: Any) -> bool:
    """Whether LLaMA-Factory trains given adapters on; if not, it merges them."""
    from llamafactory.hparams.parser import is_deepspeed_zero3_enabled

    if not model_args.adapter_name_or_path or args.ref_model is not None:
        return False
    never_merged = (
        model_args.quantization_bit is not None,
        model_args.use_unsloth,
        model_args.use_kt,
        is_deepspeed_zero3_enabled(),
    )
    return any(never_merged) or not args.create_new_adapter


def _with_our_keys(host: Any, known: set[str], of_host: Sequence[str]) -> type:
    """``FinetuningArguments`` with our keys.

    Args:
        known: the host's keys; a loss of another package that needs one of these is refused when it
            is asked for.
    """
    declared: list[Any] = []
    for name, key in KEYS.all().items():
        kind: Any = key.kind if key.kind in _PLAIN else str
        if name == MARGIN:
            kind = Literal[tuple(MARGINS)]
        if name not in known:
            help_of_key = {"help": f"{key.help}."}
            declared.append((name, kind | None, field(default=None, metadata=help_of_key)))
    of_host_field = host.__dataclass_fields__["pref_loss"]
    assert of_host_field.default is not MISSING
    names = tuple(dict.fromkeys((*of_host, *losses())))
    pref_loss = field(default=of_host_field.default, metadata=of_host_field.metadata)
    declared.append(("pref_loss", Literal[names], pref_loss))  # type: ignore[valid-type]

    def __post_init__(self: Any) -> None:
        """Check the other arguments as with the host's own loss of the same margin."""
        written = self.pref_loss
        if asked_loss(self, of_host) is not None:
            self.pref_loss = MARGINS.get(str(getattr(self, MARGIN)), MARGINS["dpo"])
        host.__post_init__(self)
        self.pref_loss = written

    return make_dataclass(
        host.__name__, declared, bases=(host,), namespace={"__post_init__": __post_init__}
    )


@contextmanager
def _in_place_of(parser: Any, host: type, ours: type) -> Iterator[None]:
    """Inside, the host parses our class in place of its own."""
    lists = [getattr(parser, name) for name in _LISTS if hasattr(parser, name)]
    before = [list(classes) for classes in lists]
    for classes in lists:
        classes[:] = [ours if each is host else each for each in classes]
    try:
        yield
    finally:
        for classes, own in zip(lists, before, strict=True):
            classes[:] = own
