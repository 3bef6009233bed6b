"""This package's keys in hosts that read them from a YAML, or as ``--key value``.

The option ``o`` of the loss ``NAME`` has the key ``NAME_o``.  All losses share the keys below; a
host has those that do something in it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import InvalidValue, conflict
from .guards.messages import did_you_mean, named
from .options import OF_ANY_LOSS, of_margins
from .registry import BoundLoss, PairwiseLoss, losses

#: Asks for the fused path.
FUSED = "focalpo_fused"
#: Asks for shared prompts.
SHARED = "focalpo_shared_prompts"
#: Asks for balanced batches.
BALANCED = "focalpo_balanced_batches"
#: Asks for a precomputed reference.
PRECOMPUTE = "focalpo_precompute_ref"
#: The folder of its file.
PRECOMPUTE_DIR = "focalpo_precompute_dir"
#: Lets a run resume a checkpoint of another loss.
ALLOW_CHANGED = "focalpo_allow_changed"
#: Lets a run train on data of which more than half has a fault.
ALLOW_DATA = "focalpo_allow_data"
#: The margin that a loss is computed from.
MARGIN = "focalpo_margin"

_TEXTS = (MARGIN, PRECOMPUTE_DIR)  # the other keys are true or false
_LIKE_A_KEY, _LIKE_A_LOSS = 0.8, 0.75  # similarity from which a word counts as one, misspelt

#: Returns the value of a key; None if it isn't given.
ValueOf = Callable[[str], Any]


@dataclass(frozen=True)
class Key:
    """A key that a host's users can give.

    Attributes:
        kind: the type of its values; None if it isn't known.
        help: what it does.
        loss: the loss that it belongs to; None if it belongs to each.
    """

    kind: type | None
    help: str
    loss: str | None


@dataclass(frozen=True)
class Asked:
    """What a run asks of this package.

    Attributes:
        loss: the loss with its options.
        on: the keys that are true.
        margin: the margin that the loss is computed from.
        reference_folder: the folder of the precomputed reference's file, empty for the output
            folder; None if the reference isn't precomputed.
    """

    loss: BoundLoss
    on: frozenset[str]
    margin: str = "dpo"
    reference_folder: str | None = None


@dataclass(frozen=True)
class Keys:
    """The keys that one host's users can give.

    Attributes:
        host: the host's name.
        common: those that all losses share.
        asks: how the users ask for a loss, with braces for its name.
        on: what they write after a key that is true.
        margins: the values of :data:`MARGIN`.
    """

    host: str
    common: Collection[str]
    asks: str
    on: str
    margins: Collection[str] = ()

    def all(self) -> dict[str, Key]:
        """The keys by name."""
        found = {}
        for loss in losses().values():
            for option, default in loss.options.items():
                # A default of None doesn't tell the option's type.
                kind = None if default is None else type(default)
                text = loss.help.get(option, f"Option of the loss {loss.name}")
                found[f"{loss.name}_{option}"] = Key(kind, text, loss.name)
        for key in self.common:
            text = OF_ANY_LOSS[key.removeprefix("focalpo_")]
            text = of_margins(self.margins) if key == MARGIN else text
            found[key] = Key(str if key in _TEXTS else bool, text, None)
        return found

    def given(self, value_of: ValueOf, of_host: Collection[str]) -> dict[str, Any]:
        """The keys that have a value, with their values, except those that the host has itself."""
        values = {key: value_of(key) for key in self.all() if key not in of_host}
        return {key: value for key, value in values.items() if value is not None}

    def bind(self, loss: PairwiseLoss, value_of: ValueOf) -> BoundLoss:
        """The loss with the options that are given.

        Raises:
            ValueError: an option's value is out of range; the message names its key.
        """
        given = {}
        for option, default in loss.options.items():
            value = value_of(f"{loss.name}_{option}")
            if value is not None:
                number = default is None or isinstance(default, float)
                given[option] = as_number(value) if number else value
        with named(f"{loss.name}_", loss.options, self.on):
            return loss.bind(**given)

    def asked(self, loss: BoundLoss, value_of: ValueOf) -> Asked:
        """What is asked for beside the loss; the values are checked already."""
        on = frozenset(key for key in self.common if key not in _TEXTS and value_of(key))
        folder = (value_of(PRECOMPUTE_DIR) or "") if PRECOMPUTE in on else None
        return Asked(loss, on, value_of(MARGIN) or "dpo", folder)

    def misspelt(self, word: str, of_host: Collection[str]) -> bool:
        """Whether an unknown key is probably one of these, misspelt or abbreviated, and doesn't
        abbreviate one of the host's.

        A parser may complete an abbreviation to the one key that begins with it, which may be a
        different key once another loss is installed.
        """
        ours = self.all()
        if any(key.startswith(word) for key in of_host):
            return False
        begins = word.startswith(("focalpo", *(f"{name}_" for name in losses())))
        abbreviates = any(key.startswith(word) for key in ours)
        near = difflib.get_close_matches(word.lower(), ours, 1, _LIKE_A_KEY)
        return begins or abbreviates or bool(near)

    def check_names(
        self, loss: PairwiseLoss, of_host: Collection[str], more: Sequence[str] = ()
    ) -> None:
        """Refuse a loss with names that the host has itself.

        Args:
            of_host: the host's keys.
            more: such names that aren't keys, as the user writes them.

        Raises:
            ValueError: the message names the package.
        """
        keys = (f"{loss.name}_{option}" for option in loss.options)
        taken = [*more, *(key for key in keys if key in of_host)]
        if taken:
            what = self.asks.split()[0].rstrip(":")
            raise InvalidValue(
                f"{what} must be a loss whose names {self.host} doesn't use, got {loss.name!r}: "
                f"the package {loss.package} brings {', '.join(taken)}, which {self.host} already "
                "has. The package has to rename it."
            )

    def check_owners(self, given: Mapping[str, Any], name: str | None, now: str) -> None:
        """Refuse keys without the loss that they belong to.

        Args:
            given: keys with their values.
            name: the loss of this package that is trained; None if none is.
            now: what the run asks for instead, after a preposition.

        Raises:
            ValueError: the message names the key.
        """
        known = self.all()
        for key, value in given.items():
            owner = known[key].loss or name or "focalpo"
            if owner != name:
                asks = self.asks.format(owner)
                raise InvalidValue(
                    f"{key} belongs to {asks}, got {value!r} {now}. Set {asks}, or remove {key}."
                )

    def check_common(self, value_of: ValueOf) -> None:
        """Refuse values of the keys that all losses share.

        Raises:
            ValueError: the message names the key.
        """
        margin = value_of(MARGIN)
        if margin not in (None, *self.margins):
            raise InvalidValue(
                f"{MARGIN} must be one of {', '.join(self.margins)}, got {margin!r}"
                f"{did_you_mean(str(margin), self.margins)}"
            )
        for key in self.common:
            if key not in _TEXTS and not isinstance(value_of(key), bool | None):
                raise InvalidValue(f"{key} must be true or false, got {value_of(key)!r}.")
        folder, precompute = value_of(PRECOMPUTE_DIR), value_of(PRECOMPUTE)
        if not isinstance(folder, str | None):
            raise InvalidValue(f"{PRECOMPUTE_DIR} must be a folder's path, got {folder!r}.")
        if folder is not None and not precompute:
            raise InvalidValue(
                f"{PRECOMPUTE_DIR} needs {PRECOMPUTE}{self.on}, got only {folder!r}. Set "
                f"{PRECOMPUTE} too, or remove {PRECOMPUTE_DIR}."
            )
        if precompute and margin not in (None, "dpo"):
            why = "that margin has no reference"
            raise conflict(PRECOMPUTE, MARGIN, margin, why, f"Remove {PRECOMPUTE}")

    def check_gamma(self, loss: PairwiseLoss, value_of: ValueOf, why: str) -> None:
        """Refuse FocalPO without ``focalpo_gamma``: a host without this package stops at that
        key, and doesn't train its own loss.

        Args:
            why: what happens otherwise, without a full stop.

        Raises:
            ValueError: gamma isn't given.
        """
        if loss.name == "focalpo" and value_of("focalpo_gamma") is None:
            raise InvalidValue(
                f"focalpo_gamma must be given with {self.asks.format(loss.name)}, got none: {why}. "
                f"Set focalpo_gamma, {loss.options['gamma']} in the paper; 0 is DPO."
            )


def value_of(args: Any) -> ValueOf:
    """Returns the value of a key in a host's arguments, which may have only the keys that are
    given."""
    return lambda key: getattr(args, key, None)


def loss_meant_by(name: str, of_host: Collection[str]) -> str | None:
    """The loss that a misspelt name is near to; None if it is one's name, or near to none."""
    if name in of_host or name in losses():
        return None
    word = name.lower().replace("_", "").replace("-", "")
    return next(iter(difflib.get_close_matches(word, losses(), 1, _LIKE_A_LOSS)), None)


def as_number(value: Any) -> Any:
    """``value`` as a float if it can be read as one: YAML reads ``5e-2`` as a string."""
    try:
        return value if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return value
