"""Checks that refuse arguments before LLaMA-Factory loads anything."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from ..errors import InvalidValue, conflict
from ..guards.messages import did_you_mean, named
from ..loss import check_beta, check_label_smoothing, check_weights
from ..registry import PairwiseLoss, losses
from ..yaml_keys import MARGIN, loss_meant_by, value_of
from .arguments import KEYS, asked_loss, is_marked


def check_keys(args: Any, known: Collection[str], of_host: Sequence[str]) -> None:
    """Refuse one of our keys if it is misspelt or abbreviated, and a misspelt name of a loss.

    LLaMA-Factory's parser completes abbreviations, and drops unknown keys if ``ALLOW_EXTRA_ARGS``
    is set.

    Args:
        args: a dict, or the words of a command line.
        known: the host's keys.
        of_host: the host's losses.
    """
    is_dict = isinstance(args, dict)
    ours = KEYS.all()
    for word in args:
        written = str(word) if is_dict else word.partition("=")[0]
        if _is_wrong(written, ours, known, not is_dict):
            got = f", got {args[word]!r}" if is_dict else ""
            key = written.lstrip("-").replace("-", "_").lower()
            raise InvalidValue(f"unknown key {written}{got}{did_you_mean(key, ours)}")
    name = args.get("pref_loss") if is_dict else _value(args, "pref_loss")
    near = loss_meant_by(name, of_host) if isinstance(name, str) else None
    if near is not None:
        raise InvalidValue(
            f"pref_loss must be a loss by its name, got {name!r}; did you mean {near!r}?"
        )


def _is_wrong(written: str, ours: Collection[str], known: Collection[str], flag: bool) -> bool:
    """Whether a word is one of our keys, misspelt or in a form that the parser won't take.

    Args:
        flag: whether it is from a command line, where a key follows two dashes.
    """
    key = written.lstrip("-").replace("-", "_")
    if key in known or (written.startswith("--") and key in ours if flag else written in ours):
        return False
    if flag and not written.startswith("-"):  # else a value
        return key in ours
    return KEYS.misspelt(key.lower(), known)


def _value(words: Sequence[str], key: str) -> str | None:
    """The value of a key on a command line."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name.lstrip("-").replace("-", "_") == key:
            return value if equals else following
    return None


def check_name(args: Any, known: Collection[str], of_host: Sequence[str]) -> str | None:
    """The name of our loss that is asked for; None if none is.

    Args:
        known: the host's keys.
        of_host: the host's losses.

    Raises:
        ValueError: our keys are given without their loss, or our loss in another stage.
    """
    name = asked_loss(args, of_host)
    if name is not None:
        KEYS.check_names(losses()[name], known)
    given = KEYS.given(value_of(args), known)
    KEYS.check_owners(given, name, f"with pref_loss: {args.pref_loss}")
    if name is not None and args.stage != "dpo":
        raise InvalidValue(
            f"stage must be dpo with pref_loss: {name}, got {args.stage!r}: no other stage trains "
            "on preference pairs with it. Set stage: dpo, or remove pref_loss."
        )
    return name


def check(args: Any, loss: PairwiseLoss) -> None:
    """Refuse what can't be combined with one of our losses.

    Raises:
        ValueError: the message names the key.
    """
    from llamafactory.extras.misc import is_env_enabled

    _check_marked(args, loss)
    KEYS.check_common(value_of(args))
    with named("pref_"):
        check_beta(args.pref_beta)
    with named("dpo_"):
        check_label_smoothing(args.dpo_label_smoothing)
    check_weights("pref_ftx", args.pref_ftx)
    asked = f"pref_loss: {loss.name}"
    if args.pref_bco_weight:
        why = "its log-sigmoids are of each reward, not of the margin"
        raise conflict(asked, "pref_bco_weight", args.pref_bco_weight, why, "Remove it")
    if is_env_enabled("USE_MCA"):  # without it, LLaMA-Factory ignores the key use_mca
        why = "it has a trainer of its own, which would train DPO"
        raise conflict(asked, "USE_MCA", True, why, "Unset it")


def _check_marked(args: Any, loss: PairwiseLoss) -> None:
    """Refuse a loss without a key that only this package knows.

    LLaMA-Factory takes any ``pref_loss`` of a YAML, and trains DPO.  An unknown key stops it.
    """
    why = (
        "if this package is missing, LLaMA-Factory trains DPO from such a file, unless an unknown "
        "key stops it"
    )
    KEYS.check_gamma(loss, value_of(args), why)
    if not is_marked(args, loss):
        keys = [*(f"{loss.name}_{option}" for option in loss.options), f"{MARGIN}: dpo"]
        raise InvalidValue(
            f"pref_loss: {loss.name} needs one of {', '.join(keys)}, got none: {why}."
        )
