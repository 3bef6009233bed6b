"""Our keys among ms-swift's arguments: which are there, and what is refused before anything loads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from swift.arguments import RLHFArguments
from swift.pipelines.train.rlhf import SwiftRLHF

from focalpo_plugins.swift import arguments, keys, megatron

HOST = RLHFArguments.__mro__[1]
ASKED = {"rlhf_type": "dpo", "loss_type": "focalpo", "focalpo_gamma": 0.05}


def refused(**given: Any) -> str:
    """The error of arguments; nothing is loaded before it is raised."""
    with pytest.raises(ValueError) as caught:
        RLHFArguments(model="no such model", dataset=["no such file"], **given)
    return str(caught.value)


@pytest.mark.releases
def test_the_class_keeps_its_name():
    assert (RLHFArguments.__module__, RLHFArguments.__qualname__) == (
        "swift.arguments.rlhf_args",
        "RLHFArguments",
    )
    added = {each.name for each in fields(RLHFArguments)} - {each.name for each in fields(HOST)}
    assert {"focalpo_gamma", "focalpo_shared_prompts", "focalpo_balanced_batches"} <= added
    assert all(name.startswith("focalpo_") for name in added)
    assert SwiftRLHF.args_class is RLHFArguments


@pytest.mark.releases
@pytest.mark.parametrize(
    "given, words",
    [
        ({**ASKED, "focalpo_gamma": None}, "focalpo_gamma must be given with loss_type focalpo"),
        ({**ASKED, "focalpo_gamma": -1.0}, "focalpo_gamma must be a finite number of at least 0"),
        ({**ASKED, "focalpo_variant": "wrong"}, "focalpo_variant must be one of correct"),
        (
            {**ASKED, "focalpo_shared_prompts": "false"},
            "focalpo_shared_prompts must be true or false, got 'false'",
        ),
        ({**ASKED, "beta": 0.0}, "beta must be a finite number above 0, got 0.0"),
        ({**ASKED, "label_smoothing": 0.5}, "label_smoothing must be at least 0 and below 0.5"),
        ({**ASKED, "rpo_alpha": float("nan")}, "rpo_alpha must be a finite number of at least 0, got"),
        (
            {**ASKED, "loss_type": ["focalpo", "sft"], "loss_weights": [1.0, -0.5]},
            "loss_weights must be a finite number of at least 0, got -0.5: it is the weight of",
        ),
        ({**ASKED, "rlhf_type": "kto"}, "focalpo_gamma belongs to loss_type focalpo with rlhf_type"),
        (
            {"loss_type": "sigmoid", "focalpo_gamma": 0.1},
            "focalpo_gamma belongs to loss_type focalpo with rlhf_type dpo, got 0.1 with rlhf_type "
            "dpo and loss_type sigmoid",
        ),
        ({"focalpo_shared_prompts": True}, "focalpo_shared_prompts belongs to loss_type focalpo"),
        ({"loss_type": "FocalPO"}, "unknown loss_type, got 'FocalPO'; did you mean 'focalpo'?"),
        ({"loss_type": ["focal_po", "sft"]}, "unknown loss_type, got 'focal_po'"),
        ({"rlhf_type": "focalpo"}, "rlhf_type must be dpo for a loss of this package"),
        ({**ASKED, "loss_type": ["focalpo", "hinge"]}, "can be combined only with sft, got ['focalpo', 'hinge']"),
        ({**ASKED, "loss_type": ["focalpo", "focalpo"]}, "can be combined only with sft"),
        ({**ASKED, "sequence_parallel_size": 2}, "can't be combined with sequence_parallel_size, got 2"),
        (
            {**ASKED, "focalpo_balanced_batches": True, "group_by_length": True},
            "focalpo_balanced_batches can't be combined with group_by_length, got True",
        ),
        (
            {**ASKED, "focalpo_balanced_batches": True, "rpo_alpha": 1.0},
            "focalpo_balanced_batches can't be combined with rpo_alpha, got 1.0",
        ),
        (
            {**ASKED, "focalpo_balanced_batches": True, "streaming": True},
            "focalpo_balanced_batches can't be combined with streaming, got True",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(given: dict[str, Any], words: str):
    assert words in refused(**given)


@pytest.mark.releases
@pytest.mark.parametrize("key", ["packing", "padding_free"])
def test_sequences_in_one_row(key: str, tiny: Path, tmp_path: Path):
    """Refused with any attention.  The reason is true: ms-swift refuses its own loss without
    FlashAttention, and not with it."""
    words = f"loss_type focalpo can't be combined with {key}, got True: it puts a batch's sequences"
    for attention in ("sdpa", "flash_attention_2"):
        assert words in refused(**ASKED, attn_impl=attention, **{key: True})
    own = {"rlhf_type": "dpo", "loss_type": "sigmoid", key: True, "use_cpu": True, "fp16": False,
           "model": str(tiny / "model"), "model_type": "llama", "template": "llama3",
           "torch_dtype": "float32", "dataset": ["x.jsonl"], "split_dataset_ratio": 0,
           "check_model": False, "add_version": False, "output_dir": str(tmp_path)}  # fmt: skip
    with pytest.raises(ValueError, match=f'"{key}" feature requires a flash attention'):
        RLHFArguments(**own, attn_impl="sdpa")
    assert RLHFArguments(**own, attn_impl="flash_attention_2").padding_free


@pytest.mark.releases
@pytest.mark.parametrize("loss_type", [None, "sigmoid", "sigmoid_norm", "ipo", "robust", "focus"])
def test_other_types_are_the_hosts_business(loss_type: str | None):
    """ms-swift looks for the model, which isn't there."""
    with pytest.raises(Exception) as caught:
        RLHFArguments(model="/no such model", dataset=["no such file"], loss_type=loss_type)
    assert "loss_type" not in str(caught.value) and "focalpo" not in str(caught.value)


@pytest.mark.releases
@pytest.mark.parametrize(
    "words, message",
    [
        (["--focalpo_gama", "0.1"], "unknown key focalpo_gama"),
        (["--focalpo-gama=0.1"], "unknown key focalpo_gama, got '--focalpo-gama=0.1'"),
        (["--focalpo_shared", "true"], "unknown key focalpo_shared, "),
        (["--focalpo"], "unknown key focalpo, "),
        (["--focal_gamma", "0.1"], "unknown key focal_gamma, got '--focal_gamma'; did you mean"),
    ],
)
def test_words_that_are_misspelt(words: list[str], message: str):
    with pytest.raises(ValueError, match="Write keys of focalpo_plugins in full") as caught:
        arguments.check_words(["--rlhf_type", "dpo", *words], RLHFArguments)
    assert message in str(caught.value)


@pytest.mark.releases
def test_words_that_are_right():
    words = ["--focalpo_gamma", "0.1", "--focalpo-variant=correct", "--loss", "x", "--model", "y"]
    arguments.check_words(words, RLHFArguments)


def my_loss(margins: Any, power: float = 2.0) -> Any:
    return (1 - margins).clamp(min=0) ** power


def test_a_loss_of_another_package(add_loss: Callable):
    """It has its own keys, and needs no gamma; the switches of all losses go with it."""
    add_loss("mine", my_loss, options={"power": 2.0})
    extended = arguments.extended(HOST)
    assert "mine_power" in {each.name for each in fields(extended)}
    given = {"focalpo_shared_prompts": True, "mine_power": 3.0}
    asked = type("Args", (), {"rlhf_type": "dpo", "loss_type": "mine", **given})
    found = keys.requested(asked)
    assert (found.loss.name, found.loss.options["power"]) == ("mine", 3.0)
    assert found.on == {"focalpo_shared_prompts"}
    for given, words in (
        ({"loss_type": "mine", "focalpo_gamma": 0.1}, "focalpo_gamma belongs to loss_type focalpo"),
        ({"loss_type": "sigmoid", "mine_power": 3.0}, "mine_power belongs to loss_type mine"),
        ({"loss_type": "mined"}, "did you mean 'mine'?"),
    ):
        with pytest.raises(ValueError) as caught:
            extended(model="no such model", dataset=["no such file"], **given)
        assert words in str(caught.value)


def test_a_loss_with_a_name_of_the_hosts(add_loss: Callable):
    """ms-swift has a hinge: it stays its own, and the other one's keys are refused."""
    add_loss("hinge", my_loss, options={"offset": 2.0})
    extended = arguments.extended(HOST)
    args = type("Args", (), {"rlhf_type": "dpo", "loss_type": "hinge"})
    assert keys.requested(args) is None
    with pytest.raises(ValueError, match="ms-swift would train its own hinge"):
        extended(model="no such model", dataset=["x"], loss_type="hinge", hinge_offset=1.0)


@pytest.mark.parametrize(
    "words, got",
    [
        (["--loss_type", "focalpo"], "--loss_type focalpo"),
        (["--loss_type", "sigmoid", "focalpo", "--beta", "0.1"], "--loss_type focalpo"),
        (["--loss-type=focalpo"], "--loss-type focalpo"),
        (["--focalpo_gamma", "0.1"], "--focalpo_gamma"),
        (["--loss_type", "sigmoid", "--model", "focalpo"], None),
    ],
)
def test_megatron_is_refused_by_words(words: list[str], got: str | None):
    why = megatron.refusal_of_words(words)
    assert (why is None) == (got is None)
    assert got is None or f"can't train a loss of this package, got {got}:" in why


@pytest.mark.parametrize("types, refused", [("focalpo", True), (["x", "focalpo"], True),
                                            ("sigmoid", False), (None, False)])  # fmt: skip
def test_megatrons_arguments(types: Any, refused: bool):
    class Arguments:
        loss_type, before = types, False

        def __post_init__(self) -> None:
            self.before = True

    megatron.refuse(Arguments)
    made = Arguments()
    if refused:
        with pytest.raises(ValueError, match="can't train a loss of this package"):
            made.__post_init__()
    else:
        made.__post_init__()
    assert made.before == (not refused)
