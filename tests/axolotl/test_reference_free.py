"""``focalpo_margin``: SimPO's, CPO's and ORPO's margin under ``rl: focalpo``, in the real Axolotl."""

from __future__ import annotations

from typing import Any

import pytest
from harness import ON_CPU, Axolotl, Run, zero3_on_cpu

OF_ORPO = "chat_template.argilla"
# The settings for Axolotl's own `rl`, and this package's extra ones.
HOSTS: dict[str, tuple[str, dict[str, Any]]] = {
    "simpo": ("simpo", {"rl_beta": 2.0, "simpo_gamma": 0.5, "cpo_alpha": 0.1}),
    "orpo": ("orpo", {"rl_beta": None, "orpo_alpha": 0.2}),
}
NO_KEYS = {"focalpo_gamma": None, "focalpo_variant": None}


def of_host(axolotl: Axolotl, margin: str) -> dict[str, Any]:
    rl, more = HOSTS["simpo" if margin == "cpo" else margin]
    if rl == "orpo":
        data = {"path": axolotl.data("train", 96), "ds_type": "json", "split": "train"}
        more = {**more, "datasets": [{**data, "type": OF_ORPO}]}
    return {**more, "max_steps": 3, "save_steps": 10}


@pytest.mark.releases
@pytest.mark.parametrize("margin", HOSTS)
def test_gamma_zero_is_the_hosts_own_step_for_step(axolotl: Axolotl, margin: str):
    more = of_host(axolotl, margin)
    theirs = axolotl.train(rl=margin, **more, **NO_KEYS)
    assert "focalpo_plugins: active" not in theirs.output
    ours = axolotl.train(
        focalpo_margin=margin, focalpo_gamma=0.0, **more, output_dir=str(axolotl.folder / "ours")
    )
    names = ("loss", "grad_norm", "rewards/margins", "nll_loss")
    assert ours.steps(*names) == theirs.steps(*names)
    assert len(ours.steps("loss")) == 3
    assert f"margin={margin} beta=" in ours.output
    assert "trainer=AxolotlPairwise" in ours.output


@pytest.fixture(scope="session")
def simpo(once: Axolotl) -> Run:
    return once.train(
        focalpo_margin="simpo", focalpo_gamma=0.5, **of_host(once, "simpo"),
        output_dir=str(once.folder / "focal_simpo"),
    )  # fmt: skip


@pytest.mark.xdist_group("focal_simpo")
def test_the_factor_is_on_that_margin(simpo: Run):
    """The loss of a pair is -p**.5 log p and no longer the log-sigmoid, so p and the loss agree at
    the first step only within Jensen's gap; the margin's mean is not 0, as it has no reference."""
    first = next(entry for entry in simpo.log if "loss" in entry)
    assert 0 < first["focalpo/p"] < 1
    assert abs(first["rewards/margins"]) > 0
    assert "margin=simpo beta=2.0 simpo_gamma=0.5 cpo_alpha=0.1" in simpo.output
    assert "first step" not in simpo.output
    for name in ("weight", "margin_incorrect", "reversed"):
        assert f"focalpo/{name}" in first


@pytest.mark.xdist_group("focal_simpo")
def test_shared_prompts(axolotl: Axolotl, simpo: Run):
    run = axolotl.train(
        focalpo_margin="simpo", focalpo_gamma=0.5, **of_host(axolotl, "simpo"),
        focalpo_shared_prompts=True,
    )  # fmt: skip
    names = ("loss", "grad_norm", "focalpo/p")
    for ours, plain in zip(run.steps(*names), simpo.steps(*names), strict=True):
        assert ours == pytest.approx(plain, rel=2e-4)
    assert all(saved > 0 for (saved,) in run.steps("focalpo/tokens_saved"))


@pytest.mark.xdist_group("focal_simpo")
def test_two_ranks_under_zero3(axolotl: Axolotl, simpo: Run):
    """Two ranks with two pairs each equal one rank with four."""
    run = axolotl.train(
        focalpo_margin="simpo", focalpo_gamma=0.5, **of_host(axolotl, "simpo"),
        micro_batch_size=2, deepspeed=zero3_on_cpu(axolotl.folder),
        plugins=["test_only_plugins.GlooOnCPU"], ranks=2, how=ON_CPU,
    )  # fmt: skip
    names = ("focalpo/p", "focalpo/weight")
    for two, one in zip(run.steps(*names), simpo.steps(*names), strict=True):
        assert two == pytest.approx(one, rel=1e-3)
    assert run.output.count("focalpo_plugins: active") == 1


def test_cpo_with_an_adapter_and_a_gamma_that_moves(axolotl: Axolotl):
    """Axolotl has no CPO of its own; gamma goes .4, .2, 0 over three steps."""
    more = of_host(axolotl, "cpo")
    del more["simpo_gamma"]
    run = axolotl.train(
        focalpo_margin="cpo", focalpo_gamma=0.4, focalpo_gamma_end=0.0, **more,
        adapter="lora", lora_r=8, lora_alpha=16, lora_target_linear=True,
    )  # fmt: skip
    found = [gamma for (gamma,) in run.steps("focalpo/gamma")]
    assert found == pytest.approx([0.4, 0.2, 0.0], abs=1e-9)
    assert "gamma=0.4 gamma_end=0.0" in run.output
    assert "margin=cpo beta=2.0 cpo_alpha=0.1" in run.output


def test_options_of_the_command(axolotl: Axolotl):
    config = axolotl.config(max_steps=3, save_steps=10)
    run = axolotl(
        "train", config, "--focalpo-gamma", "0.3", "--focalpo-gamma-end", "0.1",
        "--focalpo-gamma-schedule", "cosine",
    )  # fmt: skip
    assert run.code == 0, run.output[-6000:]
    found = [gamma for (gamma,) in run.steps("focalpo/gamma")]
    assert found == pytest.approx([0.3, 0.2, 0.1], abs=1e-9)
