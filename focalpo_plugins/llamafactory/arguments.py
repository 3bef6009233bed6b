"""Our keys among LLaMA-Factory's arguments, and what a run asks for by them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from typing import Any, Literal

from ..guards import hub, last_line
from ..options import OF_ANY_LOSS, of_margins
from ..registry import BoundLoss, PairwiseLoss, bind_keys, losses
from . import COMMON_KEYS, MARGIN, MARGINS, PRECOMPUTE, PRECOMPUTE_DIR
from .autoload import host_losses

# The lists of classes that LLaMA-Factory parses.
_LISTS = ("_TRAIN_ARGS", "_TRAIN_MCA_ARGS", "_INFER_ARGS", "_EVAL_ARGS")
_PLAIN = (bool, int, float, str)


@dataclass(frozen=True)
class Asked:
    """What the arguments of a run ask for.

    Attributes:
        loss: the loss with its options.
        margin: a key of :data:`~.MARGINS`.
        on: the switches that are true, by key.
        data_args: LLaMA-Factory's own arguments of the data.
        reference_folder: the folder of the precomputed reference's file, empty for the output
            folder; None if the reference isn't precomputed.
        continues: whether trained adapters are trained on, whose reference is the model without
            them.
    """

    loss: BoundLoss
    margin: str
    on: frozenset[str]
    data_args: Any
    reference_folder: str | None = None
    continues: bool = False


def parsed(parser: Any, parse: Callable[[Any], Any], args: Any, trains: bool) -> Any:
    """What ``parse`` makes of the arguments, with our keys among them.

    Args:
        parser: LLaMA-Factory's module of that name.
        parse: its function.
        args: a dict, or the words of a command line.
        trains: whether these are the arguments of a training.

    Returns:
        The function's result.  If one of our losses is asked for, its ``FinetuningArguments`` have
        an attribute ``focalpo``, an :class:`Asked`.

    Raises:
        ValueError: the arguments ask for something that can't be trained; the message names the
            key.
    """
    from . import refusals

    last_line.install(lambda error: None)  # from here a refusal is a launched run's last line
    host = parser.FinetuningArguments
    classes = [each for name in _LISTS for each in getattr(parser, name, ())]
    known = {each.name for of in classes for each in fields(of)}
    refusals.check_keys(args, known, host_losses(parser))
    ours = _with_our_keys(host, known, host_losses(parser))
    with _in_place_of(parser, host, ours):
        found = parse(args)
    of_loss = next(each for each in found if isinstance(each, ours))
    if not trains:
        return found
    name = refusals.check_name(of_loss, host_losses(parser))
    if name is not None:
        _take(of_loss, losses()[name], found)
    return found


def keys_of(loss: PairwiseLoss) -> dict[str, str]:
    """The key of each of the loss's options."""
    return {f"{loss.name}_{option}": option for option in loss.options}


def given(args: Any, keys: Sequence[str]) -> dict[str, Any]:
    """Which of the keys the arguments give, with their values."""
    values = {key: getattr(args, key, None) for key in keys}
    return {key: value for key, value in values.items() if value is not None}


def asked_loss(args: Any, of_host: Sequence[str]) -> str | None:
    """The name of our loss that ``pref_loss`` asks for; None if it asks for the host's own.

    If another package's loss has the name of one of the host's, its keys tell which one is meant.
    """
    name = args.pref_loss
    if not isinstance(name, str) or name not in losses():
        return None
    if name in of_host and not given(args, [*keys_of(losses()[name]), MARGIN]):
        return None
    return name


def _take(args: Any, loss: PairwiseLoss, beside: Sequence[Any]) -> None:
    """Keep what is asked for in ``args``, and have the host build our trainer for it.

    Args:
        beside: all arguments of the run.
    """
    from . import data, refusals, trainer

    refusals.check(args, loss)
    on = frozenset(key for key in COMMON_KEYS if getattr(args, key) is True)
    data_args = next(each for each in beside if hasattr(each, "cutoff_len"))
    margin = getattr(args, MARGIN) or "dpo"
    folder = (getattr(args, PRECOMPUTE_DIR) or "") if PRECOMPUTE in on else None
    bound = bind_keys(loss, lambda key: getattr(args, key, None), ": true")
    model_args = next(each for each in beside if hasattr(each, "model_name_or_path"))
    continues = _continues(model_args, args)
    args.focalpo = Asked(bound, margin, on, data_args, folder, continues)

    def reason(error: BaseException) -> str | None:
        names = data.remote_names(model_args, data_args)
        return data.explain(data_args, error) or hub.explain(error, names)

    last_line.install(reason)
    data.check_files(data_args)
    trainer.install()


def _continues(model_args: Any, args: Any) -> bool:
    """Whether LLaMA-Factory trains given adapters on; if not, it merges them."""
    from llamafactory.hparams.parser import is_deepspeed_zero3_enabled

    if not model_args.adapter_name_or_path or args.ref_model is not None:
        return False
    merged = model_args.quantization_bit is None and not is_deepspeed_zero3_enabled()
    return not (args.create_new_adapter and merged)


def _with_our_keys(host: Any, known: set[str], of_host: Sequence[str]) -> type:
    """``FinetuningArguments`` with our keys.

    Args:
        known: the host's keys; a loss of another package that needs one of these is refused when it
            is asked for.
    """
    keys: dict[str, tuple[Any, str]] = {}
    for loss in losses().values():
        for key, option in keys_of(loss).items():
            kind = type(loss.options[option])
            keys[key] = (kind if kind in _PLAIN else str, loss.help.get(option, ""))
    for key in COMMON_KEYS:
        of_margin = Literal[tuple(MARGINS)]  # type: ignore[valid-type]
        what = of_margins(MARGINS) if key == MARGIN else OF_ANY_LOSS[key.removeprefix("focalpo_")]
        of_key: Any = {MARGIN: of_margin, PRECOMPUTE_DIR: str}.get(key, bool)
        keys[key] = (of_key, what)
    declared: list[Any] = []
    for key, (kind, what) in keys.items():
        if key not in known:
            help_of_key = {"help": f"{what or 'Option of a loss'}."}
            declared.append((key, kind | None, field(default=None, metadata=help_of_key)))
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
