"""Losses register through one hook, FocalPO's own like a third party's."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_python

from focalpo_plugins import focalpo_loss, focalpo_weight, registry
from focalpo_plugins.guards.resume import check_unchanged
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
        ({"gama": 0.1}, "gama is not an option of the loss 'focalpo'; did you mean 'gamma'?"),
        (
            {"k": 1},
            "k is not an option of the loss 'focalpo'; known: gamma, gamma_end, gamma_schedule",
        ),
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


class Scaled(torch.nn.Module):
    """A module accepts anything when it is called; its ``forward`` has the signature."""

    def forward(self, margins, scale):
        return scale * margins


def named(margins, scale=1.0):
    return scale * margins


def by_keyword(margins, *, scale):
    return scale * margins


def any_options(margins, **options):
    return options["scale"] * margins + options["shift"]


class Calls:
    def __call__(self, margins, scale):
        return scale * margins


# With margins of 1, scale 3 and shift 0.5 or none of them, by what the function names.
WEIGHTS: dict[str, tuple[Callable, float]] = {
    "by name": (named, 3),
    "by keyword": (by_keyword, 3),
    "any": (any_options, 3.5),
    "none": (lambda margins: 2 * margins, 2),
    "none of them, positional alone": (lambda margins, /: 2 * margins, 2),
    "partial": (functools.partial(named, scale=7.0), 3),
    "wrapped": (functools.wraps(named)(lambda *args, **kwargs: named(*args, **kwargs)), 3),
    "object": (Calls(), 3),
    "module": (Scaled(), 3),
    "written in C, without a signature": (torch.abs, 1),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_which_options_a_weight_gets(add_loss, kind: str):
    weight, expected = WEIGHTS[kind]
    # torch.abs takes no options, and would raise if it were given any.
    options = {} if weight is torch.abs else {"scale": 3.0, "shift": 0.5}
    loss = lambda margins, **options: margins  # noqa: E731
    add_loss("scaled", loss, weight=weight, options=options)
    assert get_loss("scaled").bind().weight(torch.ones(1)).item() == expected


@pytest.mark.parametrize(
    "reversal, expected",
    [(lambda: -1.0, -1), (lambda scale: -scale, -3), (lambda **options: -len(options), -2)],
)
def test_which_options_a_reversal_gets(add_loss, reversal: Callable, expected: float):
    loss = lambda margins, **options: margins  # noqa: E731
    options = {"scale": 3.0, "shift": 0.5}
    add_loss("scaled", loss, reversal=reversal, options=options)
    bound = get_loss("scaled").bind()
    assert bound.reversal() == expected
    assert bound.describe() == (
        f"loss=scaled scale=3.0 shift=0.5 z*={expected:.2f} loss_at_margin_0=0.0000"
    )


# An option's value, another value that JSON makes equal to it, and one that differs.
VALUES: dict[str, tuple[Any, Any, Any]] = {
    "tuple": ((1, 2), [1, 2], [2, 1]),
    "tuples in it": ({"at": ((0, 1), (2,))}, {"at": [[0, 1], [2]]}, {"at": [[0, 1], [3]]}),
    "numbers as keys": ({1: 0.5}, {"1": 0.5}, {"2": 0.5}),
    "float": (1.0, 1, 1.5),
    "integer": (2, 2.0, 3),
    "not a number": (float("nan"), float("nan"), 0.0),
    "infinite": (float("inf"), float("inf"), float("-inf")),
    "none": (None, None, 0),
}


@pytest.mark.parametrize("kind", VALUES)
def test_a_checkpoint_of_the_same_options_is_the_same_loss(add_loss, kind: str):
    value, same, other = VALUES[kind]
    loss = lambda margins, at: margins  # noqa: E731
    add_loss("mine", loss, options={"at": value})
    saved = json.loads(json.dumps(get_loss("mine").bind().record("_", beta=0.1)))
    for again in (value, same):
        asked = get_loss("mine").bind(at=again).record("_", beta=0.1)
        check_unchanged(saved, asked, "checkpoint-1", "allow", {})
    with pytest.raises(
        ValueError,
        match=r"^mine_at was .* got .*: resuming would change the loss of the checkpoint checkpo",
    ):
        asked = get_loss("mine").bind(at=other).record("_", beta=0.1)
        check_unchanged(saved, asked, "checkpoint-1", "allow", {})


sigmoid = torch.nn.functional.logsigmoid
# What a loss returns for the margins 0 and 1, and the message about it.
RETURNED: dict[str, tuple[Callable, str]] = {
    "a sum": (lambda margins: -sigmoid(margins).sum(), "a tensor of shape ()"),
    "a mean": (lambda margins: -sigmoid(margins).mean(), "a tensor of shape ()"),
    "one number in a tensor": (lambda margins: -sigmoid(margins).sum()[None], "shape (1,)"),
    "a column": (lambda margins: -sigmoid(margins)[:, None], "a tensor of shape (2, 1)"),
    "a matrix": (lambda margins: margins[:, None] - margins, "a tensor of shape (2, 2)"),
    "a number": (lambda margins: 0.5, "float 0.5"),
    "nothing": (lambda margins: None, "NoneType None"),
    "a list": (lambda margins: [0.1, 0.2], "list [0.1, 0.2]"),
    "numpy": (lambda margins: margins.detach().numpy(), "ndarray array("),
    "integers": (lambda margins: margins.long(), "a tensor of torch.int64"),
    "truth values": (lambda margins: margins > 0, "a tensor of torch.bool"),
    "no gradient": (lambda margins: -sigmoid(margins).detach(), "a tensor without a gradient"),
    "NaN at 0": (lambda margins: margins / margins, "losses that are not finite, [nan, 1.0]"),
    "infinite at 0": (lambda margins: 1 / margins, "losses that are not finite, [inf, 1.0]"),
    # (1/2) |z|^-1/2 times the sign of z: infinity times 0.
    "a gradient that is NaN at 0": (
        lambda margins: margins.abs().sqrt(), "gradients that are not finite, [nan, 0.5]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", RETURNED)
def test_a_loss_that_does_not_return_one_for_each_pair(add_loss, kind: str):
    """Refused before it trains, by name and package, at every point of the run."""
    wrong, words = RETURNED[kind]
    add_loss("mine", wrong)
    expected = (
        "loss of mine, from the package mine, must return a finite loss with a gradient for each "
        "pair, as a floating-point tensor (2,) for 2 margins, got "
    )
    with pytest.raises(RuntimeError) as refused:
        get_loss("mine").bind()
    assert str(refused.value).startswith(expected) and words in str(refused.value)


@pytest.mark.parametrize("point", [0.0, 0.5, 1.0])
def test_a_loss_that_is_wrong_at_one_point_of_the_run(add_loss, point: float):
    add_loss(
        "mine",
        lambda margins, now: -sigmoid(margins).sum() if now == point else -sigmoid(margins),
        at=lambda progress: {"now": progress},
    )
    with pytest.raises(RuntimeError, match="^loss of mine, .*got a tensor of shape "):
        get_loss("mine").bind()


# What a weight returns for the margins 0 and 1.
WRONG_WEIGHTS: dict[str, tuple[Callable, str]] = {
    "a sum": (lambda margins: margins.sum(), "a tensor of shape ()"),
    "a column": (lambda margins: margins[:, None], "a tensor of shape (2, 1)"),
    "a number": (lambda margins: 1.0, "float 1.0"),
    "integers": (lambda margins: margins.long(), "a tensor of torch.int64"),
    # The diagnostics are computed in float64.
    "a number in float64": (
        lambda margins: margins if margins.dtype == torch.float32 else margins.sum(),
        "a tensor of shape ()",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG_WEIGHTS)
def test_a_weight_that_does_not_return_one_for_each_pair(add_loss, kind: str):
    wrong, words = WRONG_WEIGHTS[kind]
    add_loss("mine", lambda margins: -sigmoid(margins), weight=wrong)
    with pytest.raises(
        RuntimeError, match="^weight of mine, from the package mine, must "
    ) as error:
        get_loss("mine").bind()
    assert words in str(error.value)


def in_place(margins: torch.Tensor) -> torch.Tensor:
    return margins.neg_().exp()


@pytest.mark.parametrize(
    "right",
    [
        in_place,
        torch.nn.Softplus(),
        lambda margins: -sigmoid(margins.double()),
        lambda margins: torch.relu(1 - margins),
        lambda margins: (margins - 1).square(),
    ],
)
def test_a_loss_that_is_accepted(add_loss, right: Callable):
    """With any settings of the caller: gradients off, or another default dtype or device."""
    add_loss("mine", right, weight=lambda margins: margins.exp())
    get_loss("mine").bind()
    with torch.no_grad():
        get_loss("mine").bind()
    with torch.inference_mode(), torch.device("meta"):
        get_loss("mine").bind()


def test_a_loss_that_changes_its_margins(add_loss):
    """At -1 and 2, with a smoothing of .1: ``.9 exp(-z) + .1 exp(z)``. The caller's stay theirs."""
    add_loss("mine", in_place, weight=in_place)
    margins, bound = torch.tensor([-1.0, 2.0]), get_loss("mine").bind()
    expected = [0.9 * math.e + 0.1 / math.e, 0.9 * math.e**-2 + 0.1 * math.e**2]
    assert bound(margins, 0.1).tolist() == pytest.approx(expected)
    bound.weight(margins)
    assert margins.tolist() == [-1.0, 2.0]


def test_an_option_that_no_checkpoint_can_hold(add_loss):
    add_loss("mine", lambda margins, at: margins, options={"at": None})
    with pytest.raises(ValueError, match="^at must be a value that JSON can hold, got {1}"):
        get_loss("mine").bind(at={1})


def test_an_option_that_another_loss_has_too_is_recorded(add_loss):
    """Among FocalPO's options, only `allow_reversed` changes no loss; another package's may mean
    anything."""
    options = {"allow_reversed": True}
    add_loss("mine", lambda margins, allow_reversed: margins, options=options)
    recorded = get_loss("mine").bind().record("_")
    assert recorded == {"loss": "mine", "mine_allow_reversed": True}
    assert "focalpo_allow_reversed" not in get_loss("focalpo").bind().record("_")


def loss(margins, **options):
    return margins


# The fault in the second loss of a package whose first is fine.
REFUSED: dict[str, tuple[tuple, dict[str, Any], str]] = {
    "taken": (("focalpo", loss), {}, "name must be new, got 'focalpo': the package focalpo_plugins"
              " has registered it already"),
    "taken by itself": (("fine", loss), {}, "name must be new, got 'fine'"),
    "capital": (("Hinge", loss), {}, "name must be an identifier in lower case, without outer or"),
    "hyphen": (("my-loss", loss), {}, "name must be an identifier in lower case, without outer or"),
    "outer underscore": (("_hinge", loss), {}, "name must be an identifier in lower case, without"),
    "double underscore": (("my__loss", loss), {}, "name must be an identifier in lower case, with"),
    "no word": ((None, loss), {}, "name must be an identifier in lower case, without outer"),
    **{
        f"a host's: {name}": ((name, loss), {}, f"name must not be a name that a host uses, got {name!r}")
        for name in ("dpo", "ipo", "lora", "rl", "trl", "train", "eval", "loss", "rewards")
    },
    **{
        f"a trainer's: {option}": (
            ("mine", loss), {"options": {option: 1}},
            f"an option of mine must not be a name that a host uses, got {option!r}",
        )
        for option in ("fused", "allow_changed", "allow_data", "precompute_ref", "precompute_dir",
                       "loss")
    },
    **{
        f"option {option!r}": (
            ("mine", loss), {"options": {option: 1}},
            f"an option of mine must be an identifier, without outer or double underscores, "
            f"got {option!r}",
        )
        for option in ("a-b", "a b", "1", "", "_a", "a_", "a__b", 3)
    },
    "a key of another": (
        ("focalpo_allow", loss), {"options": {"reversed": False}},
        "an option of focalpo_allow must give a new key, got 'reversed': "
        "focalpo_allow_reversed belongs to the loss focalpo",
    ),
    "a key of every loss": (
        ("focalpo_allow", loss), {"options": {"changed": False}},
        "got 'changed': focalpo_allow_changed belongs to the loss focalpo",
    ),
    "default": (
        ("mine", loss), {"options": {"at": torch}},
        "the default of mine's option at must be a value that JSON can hold, got <module 'torch'",
    ),
    "help": (
        ("mine", loss), {"options": {"at": 1}, "help": {"att": "Where"}},
        "help of mine must name its options, got 'att'; did you mean 'at'?",
    ),
    "a part there isn't": (("mine", loss), {"grad": loss}, "unexpected keyword argument 'grad'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_all_of_a_packages_losses_or_none(add_package, case: str):
    """The package's first loss, which is fine, isn't kept, and it can be added again."""
    arguments, parts, message = REFUSED[case]

    def register_losses(register):
        register("fine", loss)
        register(*arguments, **parts)

    with pytest.raises((ValueError, TypeError)) as error:
        add_package(register_losses)
    assert message in str(error.value)
    assert "fine" not in losses() and not registry.manager.has_plugin("mine")
    add_package(lambda register: register("fine", loss))
    assert get_loss("fine").package == "mine"


def test_what_options_do(add_loss):
    """FocalPO describes each of its options, another package those that it chooses."""
    focalpo = get_loss("focalpo")
    assert focalpo.help.keys() == focalpo.options.keys()
    add_loss("mine", lambda margins, at, to: margins, options={"at": 1, "to": 2}, help={"at": "A"})
    assert get_loss("mine").help == {"at": "A"}


def test_a_package_without_a_loss():
    with pytest.raises(ValueError, match="^it registers no loss; is its register_losses marked"):
        registry.add("unmarked", type("Package", (), {"register_losses": None}))
    assert not registry.manager.has_plugin("unmarked")


def test_one_packages_failure_is_one_warning(broken_third_party: Path, hinge_package: Path):
    """The first of three fails half-way; the losses of the others are registered."""
    (broken_third_party / "bad_losses.py").write_text(
        "from focalpo_plugins import hookimpl\n\n"
        "@hookimpl\ndef register_losses(register):\n"
        "    register('half', abs)\n    register('rewards', abs)\n"
    )
    script = """
from focalpo_plugins.registry import get_loss, losses
print(list(losses()), list(losses()), get_loss("hinge").package)
try:
    get_loss("half")
except ValueError as error:
    print(error)
"""
    path = f"{broken_third_party}:{hinge_package}"
    run = run_python("-c", script, path=path)
    found, error = run.stdout.splitlines()
    assert found == "['focalpo', 'hinge'] ['focalpo', 'hinge'] hinge"
    assert "The package bad failed to register: name must not be a name that a host uses" in error
    assert run.stderr.count("the package bad failed to register its losses and is left out") == 1


def test_a_loss_that_moves():
    """From gamma .5 to 0: at the middle p^.25, at the end DPO's own, and z* is -inf there."""
    margins = torch.linspace(-3, 3, 7, dtype=torch.float64)
    loss = get_loss("focalpo").bind(gamma=0.5, gamma_end=0.0)
    for progress, gamma in ((0.0, 0.5), (0.5, 0.25), (1.0, 0.0)):
        now = loss.at(progress)
        assert torch.equal(now(margins), focalpo_loss(margins, gamma))
        assert torch.equal(now.weight(margins), focalpo_weight(margins, gamma))
        assert now.moving() == {"gamma": gamma}
    assert "gamma=0.5 gamma_end=0.0 variant=correct z*=-1.85..-inf" in loss.describe()
    assert get_loss("focalpo").bind(gamma=0.5).moving() == {}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gamma_end": 2.0}, "gamma_end must be below 1/ln 2"),
        ({"gamma_end": -1.0}, "gamma_end must be a finite number of at least 0, got -1.0"),
        ({"gamma_end": "small"}, "gamma_end must be a finite number"),
        ({"gamma_end": 1.0, "variant": "correct_exact"}, "gamma_end must be below 1 for variant"),
        ({"gamma": 2.0, "gamma_end": 0.1}, "gamma must be below 1/ln 2"),
        ({"gamma_schedule": "linear"}, "gamma_schedule 'linear' needs gamma_end, got none"),
    ],
)
def test_both_ends_of_a_gamma_are_checked(options: dict, message: str):
    with pytest.raises(ValueError, match=f"^{message}"):
        get_loss("focalpo").bind(**options)


def test_a_gamma_that_ends_backwards_on_purpose():
    loss = get_loss("focalpo").bind(gamma_end=2.0, allow_reversed=True)
    assert loss.at(1.0).reversal() > 0


# Parts of a loss with the option `at`, and the message about the first that can't be called.
CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "loss without the option": (
        {"loss": lambda margins: margins}, "loss of .* got an unexpected keyword argument 'at'",
    ),
    "loss of another option": (
        {"at": lambda progress, at: {"to": at}, "loss": lambda margins, at: margins},
        "loss of .* got an unexpected keyword argument 'to'",
    ),
    "weight of another option": (
        {"weight": lambda margins, to: margins},
        "weight of .* missing 1 required positional argument: 'to'",
    ),
    "weight by position": (
        {"weight": lambda margins, at, /: margins},
        "weight of .* missing 1 required positional argument: 'at'",
    ),
    "reversal of the margins": (
        {"reversal": lambda margins, at: at},
        "reversal of .* missing 1 required positional argument: 'margins'",
    ),
    "at without progress": (
        {"at": lambda at: {"at": at}}, "at of .* got multiple values for argument 'at'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_a_loss_that_cannot_be_called_as_it_says(add_loss, case: str):
    """Refused before it trains, with Python's own words on the call."""
    parts, message = CALLS[case]
    add_loss("mine", **{"loss": loss, "options": {"at": 1.0}, **parts})
    part, why = message.split(" of .* ")
    expected = f"^{part} of mine, from the package mine, can't be called with its options: .*{why}"
    with pytest.raises(RuntimeError, match=f"{expected}. Fix it in the package.$"):
        get_loss("mine").bind()


def test_an_at_that_gives_no_options(add_loss):
    add_loss("mine", loss, options={"at": 1.0}, at=lambda progress, at: at)
    expected = "^at of mine, from the package mine, must return options by name, got 1.0. Fix it"
    with pytest.raises(RuntimeError, match=expected):
        get_loss("mine").bind()


def test_an_error_of_a_loss_s_own_is_left_as_it_is(add_loss):
    """A loss checks its own ranges with a ValueError, which a host names as its user writes it."""

    def checked(margins, at):
        raise ValueError(f"at must be above 0, got {at}")

    add_loss("mine", checked, options={"at": -1.0})
    with pytest.raises(ValueError, match="^at must be above 0, got -1.0$"):
        get_loss("mine").bind()
