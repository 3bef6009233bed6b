"""Losses register through one hook, FocalPO's own as a third party's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import run_python

from focalpo_plugins import focalpo_loss, focalpo_weight
from focalpo_plugins.registry import get_loss, losses


def test_focalpo_is_registered():
    assert next(iter(losses())) == "focalpo"
    margins = torch.linspace(-3, 3, 7, dtype=torch.float64)
    loss = get_loss("focalpo").bind(gamma=0.3, variant="incorrect")
    assert torch.equal(loss(margins), focalpo_loss(margins, 0.3, "incorrect"))
    assert torch.equal(loss.weight(margins), focalpo_weight(margins, 0.3, "incorrect"))
    smoothed = focalpo_loss(margins, 0.3, "incorrect", label_smoothing=0.1)
    assert torch.equal(loss(margins, 0.1), smoothed)


def test_description_is_what_the_startup_line_shows():
    """z* = -20 and 2^-0.05 ln 2 = 0.6695 at the defaults."""
    described = get_loss("focalpo").bind().describe()
    assert described == "loss=focalpo gamma=0.05 variant=correct z*=-20.00 loss_at_margin_0=0.6695"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gama": 0.1}, "gama is no option of the loss 'focalpo'; did you mean 'gamma'?"),
        ({"k": 1}, "k is no option of the loss 'focalpo'; known: gamma, variant, allow_reversed."),
        ({"gamma": 2.0}, "gamma must be below 1/ln 2"),
        ({"variant": "wrong"}, "variant must be one of"),
    ],
)
def test_bad_options(options: dict, message: str):
    with pytest.raises(ValueError) as error:
        get_loss("focalpo").bind(**options)
    assert str(error.value).startswith(message)


def test_unknown_loss_names_the_nearest():
    with pytest.raises(
        ValueError, match="^loss must be one of focalpo.*got 'focal'; did you mean 'focalpo'"
    ):
        get_loss("focal")


def test_third_party_loss(hinge_package: Path):
    """relu(1 - z) at z = -1, 0, 3 is 2, 1, 0; with its option at 2 it is 3, 2, 0."""
    script = """
import torch
from focalpo_plugins.registry import get_loss, losses
print(list(losses()))
margins = torch.tensor([-1.0, 0.0, 3.0])
print(get_loss("hinge").bind()(margins).tolist(), get_loss("hinge").bind(offset=2.0)(margins).tolist())
print(get_loss("hinge").bind().describe())
try:
    get_loss("hinge").bind(offset=-1.0)
except ValueError as error:
    print(error)
"""
    run = run_python("-c", script, path=hinge_package)
    assert run.stdout.splitlines() == [
        "['focalpo', 'hinge']",
        "[2.0, 1.0, 0.0] [3.0, 2.0, 0.0]",
        "loss=hinge offset=1.0 loss_at_margin_0=1.0000",
        "offset must be above 0, got -1.0: the paper uses 1.",
    ], run.stderr


def test_broken_third_party_is_left_out(broken_third_party: Path):
    script = """
from focalpo_plugins.registry import get_loss, losses
print(list(losses()))
try:
    get_loss("bad")
except ValueError as error:
    print(error)
"""
    run = run_python("-c", script, path=broken_third_party)
    assert run.returncode == 0, run.stderr
    names, error = run.stdout.splitlines()
    assert names == "['focalpo']"
    assert "The package bad failed to register: RuntimeError: raises at import." in error
    assert run.stderr.count("failed to register its losses and is left out") == 1


@pytest.mark.parametrize(
    "call, why",
    [
        ("register('focalpo', abs)", "name must be new, got 'focalpo'"),
        ("register('Hinge', abs)", "name must be an identifier in lower case, got 'Hinge'"),
        ("register('my-loss', abs)", "name must be an identifier in lower case, got 'my-loss'"),
    ],
)
def test_bad_names(broken_third_party: Path, call: str, why: str):
    (broken_third_party / "bad_losses.py").write_text(
        "from focalpo_plugins import hookimpl\n\n"
        f"@hookimpl\ndef register_losses(register):\n    {call}\n"
    )
    script = "from focalpo_plugins.registry import losses; print(list(losses()))"
    run = run_python("-c", script, path=broken_third_party)
    assert run.stdout.strip() == "['focalpo']"
    assert why in run.stderr
