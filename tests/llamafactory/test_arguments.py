"""What LLaMA-Factory's parser makes of our keys, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from llamafactory.hparams import get_train_args, parser
from llamafactory.hparams.finetuning_args import FinetuningArguments

from focalpo_plugins.errors import InvalidValue

pytestmark = pytest.mark.releases


@pytest.fixture
def given(tmp_path) -> Callable[..., dict[str, Any]]:
    """The arguments of a run, with changes; None removes a key."""

    def make(**changes: Any) -> dict[str, Any]:
        args = {
            "model_name_or_path": "a/model", "stage": "dpo", "do_train": True, "dataset": "train",
            "dataset_dir": str(tmp_path), "output_dir": str(tmp_path / "out"), "report_to": "none",
            "pref_loss": "focalpo", "focalpo_gamma": 0.05, **changes,
        }  # fmt: skip
        return {key: value for key, value in args.items() if value is not None}

    return make


def finetuning(args: Any) -> Any:
    return get_train_args(args)[3]


def as_words(args: dict[str, Any]) -> list[str]:
    return [word for key, value in args.items() for word in (f"--{key}", str(value))]


def test_the_loss_and_its_options(given):
    """The host's branches see a loss that needs a reference, and the name that the user wrote."""
    args = finetuning(given(focalpo_gamma=0.1, focalpo_gamma_end=0, focalpo_variant="incorrect"))
    assert args.focalpo.loss.options["gamma"] == 0.1
    assert args.focalpo.loss.options["gamma_end"] == 0.0
    assert args.focalpo.loss.options["variant"] == "incorrect"
    assert (args.pref_loss, args.use_ref_model) == ("focalpo", True)
    assert args.focalpo_data_args.cutoff_len == 2048


def test_words_of_a_command_line(given):
    words = as_words(given(focalpo_gamma_end=0.2, focalpo_shared_prompts=True))
    args = finetuning(words)
    assert args.focalpo.loss.options["gamma"] == 0.05
    assert args.focalpo.loss.options["gamma_end"] == 0.2
    assert args.focalpo.on == {"focalpo_shared_prompts"}


def test_the_hosts_own_is_parsed_as_without_us(given):
    """By its own class, and the lists of classes are the host's own afterwards too."""
    before = copy.copy(parser._TRAIN_ARGS)
    # A test's folder can be in a checkout, whose name asks for a closer look.
    folders = {"dataset_dir": "data", "output_dir": "out"}
    for changes in ({}, {"pref_loss": "orpo"}, {"stage": "sft"}, {"stage": "kto"}):
        own = {"pref_loss": None, "focalpo_gamma": None, **folders, **changes}
        assert type(finetuning(given(**own))) is FinetuningArguments
    finetuning(given())
    assert before == parser._TRAIN_ARGS


@pytest.mark.parametrize("name", ["banana", "focus", "dpo", "poly"])
def test_other_unknown_losses_stay_the_hosts(given, name: str):
    """It takes them for its sigmoid, as without us."""
    args = finetuning(given(pref_loss=name, focalpo_gamma=None))
    assert args.pref_loss == name and not hasattr(args, "focalpo")


@pytest.mark.parametrize(
    "name", ["FocalPO", "focal_po", "focal-po", "focalp", "focalpo_", "fcoalpo"]
)
@pytest.mark.parametrize("words", [dict, as_words])
def test_a_near_miss_of_our_name(given, name: str, words):
    with pytest.raises(InvalidValue, match="pref_loss must be a loss by its name, got .*'focalpo'"):
        finetuning(words(given(pref_loss=name)))


def test_gamma_is_mandatory(given):
    """Without this package such a file would train DPO, and no error would say so."""
    with pytest.raises(InvalidValue, match="focalpo_gamma must be given with pref_loss: focalpo"):
        finetuning(given(focalpo_gamma=None))


@pytest.mark.parametrize(
    "key, message",
    [
        ("focalpo_gama", "unknown key focalpo_gama, got 1; did you mean 'focalpo_gamma'?"),
        ("focal_gamma", "unknown key focal_gamma, got 1; did you mean 'focalpo_gamma'?"),
        ("focalpo-gamma", "unknown key focalpo-gamma, got 1; did you mean 'focalpo_gamma'?"),
        ("--focalpo_gamma", "unknown key --focalpo_gamma, got 1; did you mean 'focalpo_gamma'?"),
        ("FOCALPO_GAMMA", "unknown key FOCALPO_GAMMA, got 1; did you mean 'focalpo_gamma'?"),
        ("focalpo_fused", "unknown key focalpo_fused, got 1"),
    ],
)
def test_an_unknown_key(given, monkeypatch, key: str, message: str):
    """It is refused even if the host is told to drop unknown keys."""
    monkeypatch.setenv("ALLOW_EXTRA_ARGS", "1")
    with pytest.raises(InvalidValue) as error:
        finetuning({**given(), key: 1})
    assert message in str(error.value)


@pytest.mark.parametrize("more", [["focalpo_gamma_end=0.3"], ["-focalpo_gamma_end", "0.3"]])
def test_a_flag_without_its_two_dashes(given, monkeypatch, more: list[str]):
    """The host would drop it; a value that holds one of our names is none."""
    monkeypatch.setenv("ALLOW_EXTRA_ARGS", "1")
    with pytest.raises(InvalidValue, match="unknown key -?focalpo_gamma_end; did you mean"):
        finetuning([*as_words(given()), *more])
    assert finetuning(as_words(given(run_name="focalpo_gamma/lr=1"))).pref_loss == "focalpo"


def test_an_abbreviated_flag(given):
    """argparse would complete it."""
    words = [*as_words(given(focalpo_gamma=None)), "--focalpo_gamma_e", "0.5", "--focalpo_gam=1"]
    with pytest.raises(InvalidValue, match="unknown key --focalpo_gamma_e; did you mean"):
        finetuning(words)


def test_an_abbreviated_flag_of_another_package(given, add_loss):
    add_loss("squared", squared, options={"offset": 1.0})
    words = as_words(given(pref_loss="squared", focalpo_gamma=None, focalpo_margin="dpo"))
    with pytest.raises(InvalidValue, match="unknown key --squ"):
        finetuning([*words, "--squ", "2"])
    assert finetuning([*words, "--pref_be", "0.2"]).pref_beta == 0.2  # the host's own may be short


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"pref_loss": "sigmoid"},
            "focalpo_gamma belongs to pref_loss: focalpo, got 0.05 with pref_loss: sigmoid.",
        ),
        (
            {"pref_loss": None, "focalpo_gamma": None, "focalpo_shared_prompts": False},
            "focalpo_shared_prompts belongs to pref_loss: focalpo, got False",
        ),
        ({"stage": "sft"}, "stage must be dpo with pref_loss: focalpo, got 'sft'"),
        ({"stage": "kto"}, "stage must be dpo with pref_loss: focalpo, got 'kto'"),
        ({"pref_bco_weight": 0.5}, "pref_loss: focalpo can't be combined with pref_bco_weight"),
        ({"focalpo_gamma": -1}, "focalpo_gamma must be"),
        (
            {"focalpo_margin": "simpi"},
            "focalpo_margin must be one of dpo, simpo, orpo, got 'simpi'",
        ),
        (
            {"focalpo_margin": ["dpo"]},
            "focalpo_margin must be one of dpo, simpo, orpo, got ['dpo']",
        ),
        ({"focalpo_margin": ""}, "focalpo_margin must be one of dpo, simpo, orpo, got ''"),
        ({"pref_loss": ["focalpo"]}, "got 0.05 with pref_loss: ['focalpo']"),
        ({"focalpo_shared_prompts": "maybe"}, "focalpo_shared_prompts must be true or false"),
        ({"focalpo_shared_prompts": 1}, "focalpo_shared_prompts must be true or false, got 1."),
        (
            {"focalpo_precompute_ref": True, "focalpo_precompute_dir": 2024},
            "focalpo_precompute_dir must be a folder's path, got 2024.",
        ),
        ({"pref_beta": 0}, "pref_beta must be"),
        ({"dpo_label_smoothing": 0.7}, "dpo_label_smoothing must be"),
        ({"pref_ftx": -0.1}, "pref_ftx must be a finite number of at least 0, got -0.1: it is"),
        ({"pref_ftx": float("nan")}, "pref_ftx must be a finite number of at least 0, got nan"),
    ],
)
def test_what_is_refused(given, changes: dict[str, Any], message: str):
    with pytest.raises(InvalidValue) as error:
        finetuning(given(**changes))
    assert message in str(error.value)


def test_the_other_trainer_is_refused(given, monkeypatch):
    """What starts it is this variable; the class of arguments that it needs isn't installed here."""
    monkeypatch.setenv("USE_MCA", "1")
    monkeypatch.setattr(parser, "_TRAIN_MCA_ARGS", list(parser._TRAIN_ARGS))
    with pytest.raises(InvalidValue, match="can't be combined with USE_MCA, got True: .* Unset it"):
        finetuning(given())
    monkeypatch.delenv("USE_MCA")
    assert finetuning(given(use_mca=True)).use_mca is False  # the key alone does nothing there


def test_margins_without_a_reference(given):
    """The host's other arguments are checked as with its own loss of that margin."""
    for margin in ("simpo", "orpo"):
        args = finetuning(given(focalpo_margin=margin))
        assert (args.focalpo.margin, args.use_ref_model) == (margin, False)
        with pytest.raises(ValueError, match="only valid for sigmoid loss function"):
            finetuning(given(focalpo_margin=margin, dpo_label_smoothing=0.1))


def squared(margins, offset=1.0):
    return (offset - margins).square()


class TestOfAnotherPackage:
    def test_its_loss_and_options(self, given, add_loss):
        add_loss("squared", squared, options={"offset": 1.0})
        args = finetuning(given(pref_loss="squared", focalpo_gamma=None, squared_offset=2))
        assert args.focalpo.loss.options == {"offset": 2.0}
        with pytest.raises(InvalidValue, match="focalpo_gamma belongs to pref_loss: focalpo"):
            finetuning(given(pref_loss="squared", squared_offset=2))

    def test_a_key_of_ours_is_mandatory(self, given, add_loss):
        add_loss("squared", squared, options={"offset": 1.0})
        with pytest.raises(
            InvalidValue, match="squared needs one of squared_offset, focalpo_margin"
        ):
            finetuning(given(pref_loss="squared", focalpo_gamma=None))
        args = given(pref_loss="squared", focalpo_gamma=None, focalpo_margin="dpo")
        assert finetuning(args).focalpo.loss.name == "squared"

    def test_a_key_that_the_host_has(self, given, add_loss):
        """It stays the host's, unless that loss is asked for."""
        add_loss("ref", squared, options={"model": 1.0})
        assert finetuning(given(ref_model="a/model")).ref_model == "a/model"
        with pytest.raises(InvalidValue, match="brings ref_model, which LLaMA-Factory already has"):
            finetuning(given(pref_loss="ref", focalpo_gamma=None, focalpo_margin="dpo"))

    def test_a_name_that_the_host_has(self, given, add_loss):
        """Its key tells that the package's loss is meant; without one the run is the host's own."""
        add_loss("hinge", squared, options={"offset": 1.0})
        own = finetuning(given(pref_loss="hinge", focalpo_gamma=None))
        assert not hasattr(own, "focalpo")
        keys = {"focalpo_gamma": None, "focalpo_margin": "dpo", "hinge_offset": 0.5}
        args = finetuning(given(pref_loss="hinge", **keys))
        assert args.focalpo.loss.options == {"offset": 0.5}
