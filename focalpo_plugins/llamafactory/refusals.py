"""What arguments are refused for, before LLaMA-Factory loads anything."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Sequence
from typing import Any

from ..errors import InvalidValue, conflict
from ..guards.messages import did_you_mean, named
from ..loss import check_beta, check_label_smoothing
from ..registry import PairwiseLoss, losses
from . import COMMON_KEYS, MARGIN, MARGINS, PRECOMPUTE, PRECOMPUTE_DIR, SWITCHES
from .arguments import asked_loss, given, keys_of

_LIKE_OURS = 0.75  # similarity of a name from which it is taken for a misspelt one


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
    ours = {key for loss in losses().values() for key in keys_of(loss)} | {*COMMON_KEYS}
    for word in args:
        written = str(word) if is_dict else word.partition("=")[0]
        if _is_wrong(written, ours, known, not is_dict):
            got = f", got {args[word]!r}" if is_dict else ""
            key = written.lstrip("-").replace("-", "_").lower()
            raise InvalidValue(f"unknown key {written}{got}{did_you_mean(key, ours)}")
    name = args.get("pref_loss") if is_dict else _value(args, "pref_loss")
    if isinstance(name, str) and name not in (*of_host, *losses()):
        plain = name.lower().replace("_", "").replace("-", "")
        near = difflib.get_close_matches(plain, losses(), 1, _LIKE_OURS)
        if near:
            raise InvalidValue(
                f"pref_loss must be a loss by its name, got {name!r}; did you mean {near[0]!r}?"
            )


def _is_wrong(written: str, ours: Collection[str], known: Collection[str], flag: bool) -> bool:
    """Whether what stands before a value is meant as one of our keys, and isn't one.

    Args:
        flag: whether it is from a command line, where a key follows two dashes.
    """
    key = written.lstrip("-").replace("-", "_")
    if key in known or (written.startswith("--") and key in ours if flag else written in ours):
        return False
    if flag and not written.startswith("-"):  # else a value
        return key in ours
    key = key.lower()
    completed = flag and _begins_one(key, ours) and not _begins_one(key, known)
    near = completed or difflib.get_close_matches(key, ours, 1, 0.85)
    return bool(near) or f"{key}_".startswith("focalpo_")


def _begins_one(word: str, keys: Collection[str]) -> bool:
    return any(key.startswith(word) for key in keys)


def _value(words: Sequence[str], key: str) -> str | None:
    """The value of a key on a command line."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name.lstrip("-").replace("-", "_") == key:
            return value if equals else following
    return None


def check_name(args: Any, of_host: Sequence[str]) -> str | None:
    """The name of our loss that is asked for; None if none is.

    Raises:
        ValueError: our keys are given without their loss, or our loss in another stage.
    """
    name = asked_loss(args, of_host)
    of_loss = {key: loss.name for loss in losses().values() for key in keys_of(loss)}
    of_loss |= dict.fromkeys(COMMON_KEYS, name or "focalpo")
    for key, value in given(args, [*of_loss]).items():
        if of_loss[key] != name:
            raise InvalidValue(
                f"{key} belongs to pref_loss: {of_loss[key]}, got {value!r} with pref_loss: "
                f"{args.pref_loss}. Set pref_loss: {of_loss[key]}, or remove {key}."
            )
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
    _check_marked(args, loss)
    margin = "dpo" if getattr(args, MARGIN) is None else getattr(args, MARGIN)
    if margin not in [*MARGINS]:  # it may be a list
        raise InvalidValue(
            f"{MARGIN} must be one of {', '.join(MARGINS)}, got {margin!r}"
            f"{did_you_mean(str(margin), MARGINS)}"
        )
    for key in SWITCHES:
        if not isinstance(getattr(args, key), bool | None):
            raise InvalidValue(f"{key} must be true or false, got {getattr(args, key)!r}.")
    folder = getattr(args, PRECOMPUTE_DIR)
    if folder is not None and not getattr(args, PRECOMPUTE):
        raise InvalidValue(
            f"{PRECOMPUTE_DIR} goes with {PRECOMPUTE}: true, got {folder!r} alone. Set "
            f"{PRECOMPUTE} as well, or remove {PRECOMPUTE_DIR}."
        )
    if getattr(args, PRECOMPUTE) and margin != "dpo":
        why = "that margin has no reference"
        raise conflict(PRECOMPUTE, MARGIN, margin, why, f"Remove {PRECOMPUTE}")
    with named("pref_"):
        check_beta(args.pref_beta)
    with named("dpo_"):
        check_label_smoothing(args.dpo_label_smoothing)
    asked = f"pref_loss: {loss.name}"
    if args.pref_bco_weight:
        why = "its log-sigmoids are of each reward, not of the margin"
        raise conflict(asked, "pref_bco_weight", args.pref_bco_weight, why, "Remove it")
    if args.use_mca or os.environ.get("USE_MCA", "0").lower() in ("true", "y", "1"):
        why = "it has a trainer of its own, which would train DPO"
        raise conflict(asked, "use_mca", True, why, "Unset USE_MCA")


def _check_marked(args: Any, loss: PairwiseLoss) -> None:
    """Refuse a loss without a key that only this package knows.

    LLaMA-Factory takes any ``pref_loss`` of a YAML, and trains DPO.  An unknown key stops it.
    """
    name = loss.name
    if name == "focalpo":
        if args.focalpo_gamma is None:
            raise InvalidValue(
                "focalpo_gamma must be given with pref_loss: focalpo, got none: without this "
                "package, LLaMA-Factory trains DPO from such a file, and an unknown key stops it. "
                f"Set focalpo_gamma, {loss.options['gamma']} in the paper; 0 is DPO."
            )
    elif not given(args, [*keys_of(loss), MARGIN]):
        keys = [*keys_of(loss), f"{MARGIN}: dpo"]
        raise InvalidValue(
            f"pref_loss: {name} needs one of {', '.join(keys)}, got none: without this package, "
            "LLaMA-Factory trains DPO from such a file, and an unknown key stops it."
        )
