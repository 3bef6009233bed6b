"""Any values in a YAML under this package's keys: the run trains as it says, or one error names the
key, and the user's file stays unchanged."""

from __future__ import annotations

import copy
import math
import os
from typing import Any

import pytest
import torch
import yaml
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.enums import RLType
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from focalpo_plugins.axolotl.keys import requested_loss
from focalpo_plugins.axolotl.rewriting import rewritten

KEYS = (
    "focalpo_gamma",
    "focalpo_variant",
    "focalpo_allow_reversed",
    "focalpo_fused",
    "rl_beta",
    "trl",
    "dpo_loss_type",
    "dpo_loss_weights",
    "dpo_label_smoothing",
    "dpo_use_liger_kernel",
    "dpo_use_weighting",
    "trainer_cls",
)
LIKELY = ("0.05", "5e-2", "1.4427", "-1", ".nan", ".inf", "1e400", "true", "off", "null", "~", "''",
          "correct", "incorrect", "correct_exact", "sigmoid", "[sigmoid, sft]", "[1.0]", "[]", "{}",
          "{beta: 0.1}", "{beta: [1]}", "[[1, 2], {a: b}]", "2026-01-01", "0x10", "!!set {a}",
          "!!binary aGk=", "focalpo", "dpo", "0.1")  # fmt: skip
SCALARS = st.one_of(
    st.sampled_from(LIKELY),
    st.floats().map(repr),
    st.integers().map(str),
    st.text(max_size=12),
)


def misspelt(key: str) -> st.SearchStrategy[str]:
    """The key without one of its last letters."""
    return st.integers(len("focalpo_"), len(key) - 1).map(lambda i: key[:i] + key[i + 1 :])


LINES = st.dictionaries(
    st.one_of(
        st.sampled_from(KEYS), st.sampled_from(KEYS[:4]).flatmap(misspelt), st.text(max_size=8)
    ),
    SCALARS,
    max_size=5,
)
LOSSES = st.one_of(st.sampled_from(["focalpo"] * 4 + ["dpo", "focalpoo", "FocalPO"]), SCALARS)


# `nox -s fuzz` has many more.
@settings(deadline=None, max_examples=int(os.environ.get("FUZZ_EXAMPLES", "500")), derandomize=True)
@given(rl=LOSSES, lines=LINES)
@example("focalpo", {"dpo_loss_type": "[[1, 2], {a: b}]"})
@example("focalpo", {"dpo_loss_type": "{sigmoid: 1}"})
@example("focalpo", {"focalpo_variant": "[correct]"})
@example("focalpo", {"focalpo_gamma": "{a: 1}"})
@example("focalpo", {"focalpo_fused": "[true]"})
@example("focalpo", {"rl_beta": "[0.1]", "trl": "{beta: [0.1]}"})
@example("focalpo", {"1": "2"})
def test_any_yaml(rl: str, lines: dict[str, str]):
    text = f"rl: {rl}\n" + "".join(f"{key}: {value}\n" for key, value in lines.items())
    try:
        written: Any = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        assume(False)
    assume(isinstance(written, dict) and "rl" in written)
    given = DictDefault(copy.deepcopy(written))
    before = copy.deepcopy(given)
    try:
        cfg = rewritten(given)
    except ValueError as error:
        assert repr(given) == repr(before)  # NaN is not NaN
        message = str(error)
        assert "got " in message and "\n" not in message
        named = [key for key in ("rl", "trl.beta", *map(str, written)) if key in message]
        assert named, message
        return
    assert repr(given) == repr(before)
    if cfg.get("focalpo_rl") is None:
        assert cfg is given
        assert written["rl"] is None or written["rl"] in [rl.value for rl in RLType]
        assert all(cfg[key] is None or not str(key).startswith("focalpo_") for key in written), (
            written
        )
        return
    assert (written["rl"], cfg["rl"]) == ("focalpo", "dpo")
    loss = requested_loss(cfg)
    assert loss is not None and loss.name == "focalpo"
    for option, default in (("gamma", 0.05), ("variant", "correct"), ("allow_reversed", False)):
        value = written.get(f"focalpo_{option}")
        expected = default if value is None else value
        assert loss.options[option] == (float(expected) if option == "gamma" else expected)
    losses = loss(torch.tensor([-5.0, 0.0, 5.0]))
    assert losses.isfinite().all()
    assert losses[1].item() > 0 and math.isfinite(loss.options["gamma"])


@pytest.mark.parametrize("rl", ["[focalpo]", "{focalpo: true}", "1", "true"])
def test_rl_that_is_no_name(rl: str):
    with pytest.raises(ValueError, match="^rl must be one of .*, got "):
        rewritten(DictDefault(yaml.safe_load(f"rl: {rl}\nfocalpo_gamma: 0.05")))
