"""What the plug-in does to a config: the rewriting, and every refusal. A config goes through
Axolotl's own ``load_cfg``, in a user's script: the autoload recognises Axolotl by its modules."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import forked
import pytest
from harness import PLUGIN, SUPPORT, Axolotl, run_python, without_paths

pytestmark = pytest.mark.releases

LOAD = """
import json, os, sys
import yaml
from axolotl.cli.config import load_cfg
from axolotl.integrations.base import PluginManager
from axolotl.utils.dict import DictDefault

def outcome(config):
    try:
        cfg = load_cfg(config)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    keys = ("rl", "trainer_cls", "plugins", "focalpo_rl", "focalpo_gamma", "focalpo_variant",
            "focalpo_fused")
    return {key: cfg.get(key) for key in keys}

results = []
for path in sys.argv[1:]:
    PluginManager.get_instance().plugins.clear()  # as in a process of its own
    if "FOCALPO_AUTOLOAD" not in os.environ:
        results.append(outcome(path))
        continue
    config = DictDefault(yaml.safe_load(open(path)))
    written = repr({**config})
    results.append(outcome(config))
    # Axolotl itself notes where the config was, and turns the data sets of its own losses into its
    # own objects.
    config.pop("axolotl_config_path")
    if config["rl"] in ("dpo", "ipo"):
        config["datasets"] = DictDefault(yaml.safe_load(open(path)))["datasets"]
    assert repr({**config}) == written, path
print("RESULTS", json.dumps(results, default=lambda value: getattr(value, "value", str(value))))
"""

# A notebook that changes from one loss to another, with one object or with copies of it.
CELLS = """
import json, sys
import yaml
from axolotl.cli.config import load_cfg
from axolotl.utils.dict import DictDefault

file, *plugins = sys.argv[1:]
config = DictDefault(yaml.safe_load(open(file)))
if plugins:
    config["plugins"] = plugins
loaded = []

def cell(rl, **more):
    config["rl"] = rl
    config.update(more)
    try:
        cfg = load_cfg(config)
        loaded.append([cfg.rl, cfg.trainer_cls, cfg.focalpo_rl, cfg.focalpo_gamma])
    except Exception as error:
        loaded.append(str(error))

cell("focalpo", focalpo_gamma=0.3)
cell("dpo")                       # the key of the first cell is still there
del config["focalpo_gamma"]
cell("dpo")
cell("ipo")
# Axolotl has turned the data sets into objects of its own by now, and takes them for no third loss.
config["datasets"] = DictDefault(yaml.safe_load(open(file)))["datasets"]
cell("focalpo")
cell("focalpo", focalpo_gamma=7)  # an error on the way
cell("focalpo", focalpo_gamma=0.5)
del config["focalpo_gamma"]
cell("dpo")
print("RESULTS", json.dumps(loaded, default=lambda value: getattr(value, "value", str(value))))
"""

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": (
        {"focalpo_gama": 0.1},
        "unknown key focalpo_gama, got 0.1; did you mean 'focalpo_gamma'?",
    ),
    "the plug-in's own key": (
        {"focalpo_rl": "focalpo"},
        "unknown key focalpo_rl, got",
    ),
    "keys under dpo": (
        {"rl": "dpo"},
        "focalpo_gamma belongs to rl: focalpo, got 0.05 under rl: dpo. Set rl: focalpo, or remove",
    ),
    "keys under ipo": (
        {"rl": "ipo"},
        "focalpo_gamma belongs to rl: focalpo, got 0.05 under rl: ipo",
    ),
    "keys without rl": (
        {"rl": None},
        "focalpo_gamma belongs to rl: focalpo, got 0.05 under rl: None",
    ),
    "rl misspelt": ({"rl": "FocalP0"}, "got 'FocalP0'; did you mean 'focalpo'?"),
    "gamma negative": (
        {"focalpo_gamma": -0.1},
        "focalpo_gamma must be a finite number of at least 0, got -0.1",
    ),
    "gamma a word": (
        {"focalpo_gamma": "small"},
        "focalpo_gamma must be a finite number of at least 0, got 'small'",
    ),
    "gamma nan": ({"focalpo_gamma": float("nan")}, "focalpo_gamma must be a finite number"),
    "gamma true": (
        {"focalpo_gamma": True},
        "focalpo_gamma must be a finite number of at least 0, got True",
    ),
    "gamma backwards": (
        {"focalpo_gamma": 1.5},
        "focalpo_gamma must be below 1/ln 2 = 1.4427 for variant 'correct', got 1.5",
    ),
    "gamma backwards, and the way out": (
        {"focalpo_gamma": 1.5},
        "; to train anyway, set focalpo_allow_reversed: true.",
    ),
    "exact gamma 1": (
        {"focalpo_gamma": 1.0, "focalpo_variant": "correct_exact"},
        "focalpo_gamma must be below 1 for variant 'correct_exact', got 1.0",
    ),
    "variant misspelt": (
        {"focalpo_variant": "corect"},
        "focalpo_variant must be one of correct, correct_exact, incorrect, got 'corect'",
    ),
    "a key misspelt before its underline": (
        {"focapo_gamma": 0.5},
        "unknown key focapo_gamma, got 0.5; did you mean 'focalpo_gamma'?",
    ),
    "a switch by half its name": (
        {"focal_shared_prompts": True},
        "unknown key focal_shared_prompts, got True; did you mean 'focalpo_shared_prompts'?",
    ),
    "beta 0": ({"rl_beta": 0}, "rl_beta must be a finite number above 0, got 0"),
    "beta negative in trl": (
        {"rl_beta": None, "trl": {"beta": -1}},
        "trl.beta must be a finite number above 0, got -1",
    ),
    "betas that disagree": (
        {"rl_beta": 0.1, "trl": {"beta": 0.2}},
        "rl_beta must equal trl.beta, got 0.1 and 0.2",
    ),
    "loss type hinge": (
        {"dpo_loss_type": ["hinge"]},
        "dpo_loss_type must be one of sigmoid, sigmoid_norm, robust, sft, got 'hinge': it has no",
    ),
    "loss type nca": (
        {"dpo_loss_type": ["nca_pair"]},
        "got 'nca_pair': its log-sigmoids are of each",
    ),
    "loss type among good ones": ({"dpo_loss_type": ["sigmoid", "ipo"]}, "got 'ipo'"),
    "loss type sft alone": (
        {"dpo_loss_type": ["sft"]},
        "it has no preference loss. Add 'sigmoid' to 'sft'",
    ),
    "label smoothing": (
        {"dpo_label_smoothing": 0.5},
        "dpo_label_smoothing must be at least 0 and below 0.5, got 0.5",
    ),
    "a weight below 0": (
        {"dpo_loss_type": ["sigmoid", "sft"], "dpo_loss_weights": [1.0, -0.5]},
        "dpo_loss_weights must be a finite number of at least 0, got -0.5",
    ),
    "no weight": (
        {"focalpo_margin": "simpo", "simpo_gamma": 0.3, "cpo_alpha": float("nan")},
        "cpo_alpha must be a finite number of at least 0, got nan: it is the weight of",
    ),
    "the user's trainer": (
        {"trainer_cls": "trl.DPOTrainer"},
        "trainer_cls must be unset, got 'trl.DPOTrainer' under rl: focalpo",
    ),
    "our trainer under dpo": (
        {
            "rl": "dpo",
            "focalpo_gamma": None,
            "focalpo_variant": None,
            "trainer_cls": "focalpo_plugins.axolotl.trainer.AxolotlPairwiseTrainer",
            "plugins": [PLUGIN],
        },
        "trainer_cls must be unset, got",
    ),
    "liger with weights": (
        {"dpo_use_liger_kernel": True, "dpo_loss_type": ["sigmoid"], "dpo_loss_weights": [2.0]},
        "dpo_use_liger_kernel can't be combined with dpo_loss_weights, got [2.0]",
    ),
    "liger with weighting": (
        {"dpo_use_liger_kernel": True, "dpo_use_weighting": True},
        "dpo_use_liger_kernel can't be combined with dpo_use_weighting, got True",
    ),
    "fused with weights": (
        {"focalpo_fused": True, "dpo_loss_type": ["sigmoid"], "dpo_loss_weights": [2.0]},
        "focalpo_fused can't be combined with dpo_loss_weights, got [2.0]",
    ),
    "fused with weighting": (
        {"focalpo_fused": True, "dpo_use_weighting": True},
        "focalpo_fused can't be combined with dpo_use_weighting, got True",
    ),
    "fused with another loss type": (
        {"focalpo_fused": True, "dpo_loss_type": ["sigmoid_norm"]},
        "focalpo_fused can't be combined with dpo_loss_type, got ['sigmoid_norm']",
    ),
    "fused with tensor parallelism": (
        {"focalpo_fused": True, "tensor_parallel_size": 2},
        "focalpo_fused can't be combined with tensor_parallel_size, got 2",
    ),
    "sequences over two ranks": (
        {"context_parallel_size": 2},
        "context_parallel_size must be 1 under rl: focalpo, got 2: Axolotl would give each rank only a part",
    ),
    "fused with sequences over two ranks": (
        {"focalpo_fused": True, "sequence_parallel_degree": 2},
        "sequence_parallel_degree must be 1 under rl: focalpo, got 2",
    ),
    "fused, but how": (
        {"focalpo_fused": "always"},
        "focalpo_fused must be true or false, got 'always'",
    ),
    "shared with another attention": (
        {"focalpo_shared_prompts": True, "attn_implementation": "flex_attention"},
        "focalpo_shared_prompts can't be combined with attn_implementation, got 'flex_attention': it",
    ),
    "shared with xformers": (
        {"focalpo_shared_prompts": True, "attn_implementation": "xformers"},
        "focalpo_shared_prompts can't be combined with attn_implementation, got 'xformers'",
    ),
    "shared with a compiler": (
        {"focalpo_shared_prompts": True, "torch_compile": True},
        "focalpo_shared_prompts can't be combined with torch_compile, got True",
    ),
    "shared, but how": (
        {"focalpo_shared_prompts": "always"},
        "focalpo_shared_prompts must be true or false, got 'always'",
    ),
    "an order that Axolotl doesn't know": (
        {"train_sampling_strategy": "batch_rebalance"},
        "train_sampling_strategy must be unset, got 'batch_rebalance': Axolotl doesn't have this key",
    ),
    "balanced, but how": (
        {"focalpo_balanced_batches": 1.5},
        "focalpo_balanced_batches must be true or false, got 1.5",
    ),
    "balanced beside sft": (
        {"focalpo_balanced_batches": True, "dpo_loss_type": ["sigmoid", "sft"]},
        "focalpo_balanced_batches can't be combined with dpo_loss_type, got ['sigmoid', 'sft']: a term",
    ),
    "balanced with CPO's own term": (
        {"focalpo_balanced_batches": True, "focalpo_margin": "cpo"},
        "focalpo_balanced_batches can't be combined with cpo_alpha, got 1.0: a term of this loss is a",
    ),
    "balanced with a likelihood in SimPO": (
        {
            "focalpo_balanced_batches": True,
            "focalpo_margin": "simpo",
            "simpo_gamma": 0.3,
            "cpo_alpha": 0.1,
        },
        "focalpo_balanced_batches can't be combined with cpo_alpha, got 0.1: a term of this loss is a",
    ),
    "balanced under ORPO": (
        {"focalpo_balanced_batches": True, "focalpo_margin": "orpo"},
        "focalpo_balanced_batches can't be combined with focalpo_margin, got 'orpo': a term of this",
    ),
    "shared under dpo": (
        {
            "rl": "dpo",
            "focalpo_gamma": None,
            "focalpo_variant": None,
            "focalpo_shared_prompts": True,
        },
        "focalpo_shared_prompts belongs to rl: focalpo, got True under rl: dpo. Set rl: focalpo, or",
    ),
    "margin misspelt": (
        {"focalpo_margin": "simp"},
        "focalpo_margin must be one of dpo, simpo, cpo, orpo, got 'simp'; did you mean 'simpo'?",
    ),
    "margin under dpo": (
        {"rl": "dpo", "focalpo_gamma": None, "focalpo_variant": None, "focalpo_margin": "simpo"},
        "focalpo_margin belongs to rl: focalpo, got 'simpo' under rl: dpo",
    ),
    "simpo without its target": (
        {"focalpo_margin": "simpo"},
        "simpo_gamma must be a number with focalpo_margin: simpo, got None: it is the target margin",
    ),
    "simpo's target under dpo's margin": (
        {"simpo_gamma": 0.5},
        "simpo_gamma belongs to focalpo_margin: simpo, got 0.5 with focalpo_margin: dpo",
    ),
    "simpo's target under cpo's margin": (
        {"focalpo_margin": "cpo", "simpo_gamma": 0.5},
        "simpo_gamma belongs to focalpo_margin: simpo, got 0.5 with focalpo_margin: cpo",
    ),
    "orpo's lambda under dpo's margin": (
        {"orpo_alpha": 0.1},
        "orpo_alpha belongs to focalpo_margin: orpo, got 0.1 with focalpo_margin: dpo",
    ),
    "orpo's lambda twice": (
        {"focalpo_margin": "orpo", "orpo_alpha": 0.2, "rl_beta": 0.1},
        "orpo_alpha can't be combined with rl_beta or trl.beta, got 0.2: both",
    ),
    "orpo's lambda 0": (
        {"focalpo_margin": "orpo", "orpo_alpha": 0, "rl_beta": None},
        "orpo_alpha must be a finite number above 0, got 0",
    ),
    "a reference under simpo's margin": (
        {"focalpo_margin": "simpo", "simpo_gamma": 0.5, "precompute_ref_log_probs": True},
        "precompute_ref_log_probs can't be combined with focalpo_margin: simpo, got True",
    ),
    "a reference adapter under orpo's margin": (
        {"focalpo_margin": "orpo", "rl_adapter_ref_model": True},
        "rl_adapter_ref_model can't be combined with focalpo_margin: orpo, got True",
    ),
    "dpo's loss type under simpo's margin": (
        {"focalpo_margin": "simpo", "simpo_gamma": 0.5, "dpo_loss_type": ["sigmoid"]},
        "dpo_loss_type can't be combined with focalpo_margin: simpo, got ['sigmoid']",
    ),
    "fused under simpo's margin": (
        {"focalpo_margin": "simpo", "simpo_gamma": 0.5, "focalpo_fused": True},
        "focalpo_fused can't be combined with focalpo_margin: simpo, got True: the fused path computes only",
    ),
    "gamma's end": (
        {"focalpo_gamma_end": 2.0},
        "focalpo_gamma_end must be below 1/ln 2 = 1.4427 for variant 'correct', got 2.0",
    ),
    "a schedule to nowhere": (
        {"focalpo_gamma_schedule": "cosine"},
        "focalpo_gamma_schedule 'cosine' needs gamma_end, got none",
    ),
    "schedule misspelt": (
        {"focalpo_gamma_end": 0.1, "focalpo_gamma_schedule": "cosin"},
        "focalpo_gamma_schedule must be one of constant, linear, cosine, got 'cosin'",
    ),
    "fused under dpo": (
        {"rl": "dpo", "focalpo_gamma": None, "focalpo_variant": None, "focalpo_fused": True},
        "focalpo_fused belongs to rl: focalpo, got True under rl: dpo. Set rl: focalpo, or remove",
    ),
}

REWRITTEN = {
    "rl": "dpo",
    "trainer_cls": "focalpo_plugins.axolotl.trainer.AxolotlPairwiseTrainer",
    "plugins": [PLUGIN],
    "focalpo_rl": "focalpo",
    "focalpo_gamma": 0.05,
    "focalpo_variant": "correct",
    "focalpo_fused": None,
}
ACCEPTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as it is": ({}, REWRITTEN),
    "defaults": (
        {"focalpo_gamma": None, "focalpo_variant": None},
        {**REWRITTEN, "focalpo_gamma": None, "focalpo_variant": None},
    ),
    "a float that YAML takes for a string": ({"focalpo_gamma": "5e-2"}, REWRITTEN),
    "beside another plugin": (
        {"plugins": ["test_only_plugins.GlooOnCPU"]},
        {**REWRITTEN, "plugins": ["test_only_plugins.GlooOnCPU", PLUGIN]},
    ),
    "backwards on purpose": (
        {"focalpo_gamma": 1.5, "focalpo_allow_reversed": True},
        {**REWRITTEN, "focalpo_gamma": 1.5},
    ),
    "simpo's margin": (
        {"focalpo_margin": "simpo", "simpo_gamma": "5e-1", "rl_beta": 2.0},
        {
            **REWRITTEN,
            "rl": "simpo",
            "trainer_cls": "focalpo_plugins.axolotl.reference_free.AxolotlPairwiseCPOTrainer",
        },
    ),
    "orpo's margin": (
        {"focalpo_margin": "orpo", "rl_beta": None, "orpo_alpha": 0.1},
        {
            **REWRITTEN,
            "rl": "orpo",
            "trainer_cls": "focalpo_plugins.axolotl.reference_free.AxolotlPairwiseORPOTrainer",
        },
    ),
    "dpo's margin by its name": ({"focalpo_margin": "dpo"}, REWRITTEN),
    "a gamma that moves": ({"focalpo_gamma_end": "1e-1"}, REWRITTEN),
    "betas that agree": ({"rl_beta": 0.1, "trl": {"beta": 0.1}}, REWRITTEN),
    "fused": (
        {"focalpo_fused": True, "dpo_loss_type": ["sigmoid"], "dpo_loss_weights": [1.0]},
        {**REWRITTEN, "focalpo_fused": True},
    ),
    "fused with precomputed reference": (
        {"focalpo_fused": True, "precompute_ref_log_probs": True},
        {**REWRITTEN, "focalpo_fused": True},
    ),
    "liger with precomputed reference": (
        {"dpo_use_liger_kernel": True, "precompute_ref_log_probs": True},
        REWRITTEN,
    ),
    "values that mean none": (
        {
            "context_parallel_size": "1",
            "trainer_cls": "",
            "focalpo_fused": True,
            "dpo_loss_type": ["sigmoid"],
            "dpo_loss_weights": ["1.0"],
        },
        {**REWRITTEN, "focalpo_fused": True},
    ),
    "loss types": (
        {"dpo_loss_type": ["sigmoid", "sft"], "dpo_loss_weights": [1.0, 0.1]},
        REWRITTEN,
    ),
    "dpo": (
        {"rl": "dpo", "focalpo_gamma": None, "focalpo_variant": None},
        dict.fromkeys(REWRITTEN) | {"rl": "dpo"},
    ),
    "dpo with the plugin listed": (
        {"rl": "dpo", "focalpo_gamma": None, "focalpo_variant": None, "plugins": [PLUGIN]},
        dict.fromkeys(REWRITTEN) | {"rl": "dpo", "plugins": [PLUGIN]},
    ),
}


def load(
    folder: Path, configs: list[Path], *path: Path, **variables: str
) -> list[dict[str, Any] | str]:
    """The result of ``load_cfg`` for each config, with ``path`` before installed packages. The
    config comes from its file or, if the autoload is off, from the user's own object, which must
    stay unchanged."""
    return results(LOAD, folder, *map(str, configs), path=path, **variables)


def results(
    source: str,
    folder: Path,
    *arguments: str,
    path: tuple[Path, ...] = (),
    fresh: bool = False,
    **variables: str,
) -> list[Any]:
    """What the script prints after ``RESULTS``, in a process forked off one that has imported
    Axolotl, or in its own process if the imports are tested."""
    script = folder / "script.py"
    script.write_text(source)
    if fresh or path:
        run = run_python(
            str(script),
            *arguments,
            path=os.pathsep.join(map(str, [*path, SUPPORT])),
            AXOLOTL_DO_NOT_TRACK="1",
            CUDA_VISIBLE_DEVICES="",
            **variables,
        )
        output, errors = run.stdout, run.stderr
    else:
        _, output, errors = forked.run(str(script), arguments, folder, **variables)
    lines = [line for line in output.splitlines() if line.startswith("RESULTS ")]
    assert lines, errors[-6000:]
    return json.loads(lines[0].removeprefix("RESULTS "))


CASES = {name: case[0] for name, case in {**REFUSED, **ACCEPTED}.items()}


@pytest.fixture(scope="module")
def outcomes(once: Axolotl, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The result of ``load_cfg`` for each case: with the autoload, and with only the ``plugins:``
    line."""
    folder = tmp_path_factory.mktemp("load")
    found = {}
    for way, variables in (("autoload", {}), ("plugins line", {"FOCALPO_AUTOLOAD": "0"})):
        configs = []
        for changes in CASES.values():
            if way == "plugins line" and PLUGIN not in changes.get("plugins", []):
                changes = {**changes, "plugins": [*changes.get("plugins", []), PLUGIN]}
            configs.append(once.config(**changes))
        found[way] = dict(zip(CASES, load(folder, configs, **variables), strict=True))
    return found


@pytest.mark.xdist_group("autoload off")
@pytest.mark.parametrize("way", ["autoload", "plugins line"])
@pytest.mark.parametrize("case", REFUSED)
def test_refused(outcomes, way, case):
    outcome = outcomes[way][case]
    assert isinstance(outcome, str), f"accepted as {outcome}"
    assert REFUSED[case][1] in outcome
    assert "?." not in outcome


@pytest.mark.xdist_group("autoload off")
@pytest.mark.parametrize("way", ["autoload", "plugins line"])
@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted(outcomes, way, case):
    expected = ACCEPTED[case][1]
    if way == "plugins line" and expected["plugins"] is None:
        expected = {**expected, "plugins": [PLUGIN]}
    assert outcomes[way][case] == expected


def test_the_config_of_axolotl_inference(once: Axolotl, tmp_path: Path):
    """The command loads a run's YAML without its ``rl``."""
    source = LOAD.replace("load_cfg(config)", "load_cfg(config, inference=True, rl=None)")
    (found,) = results(source, tmp_path, str(once.config(focalpo_shared_prompts=True)))
    assert found["rl"] is None and found["focalpo_rl"] is None


def test_a_padding_for_columns_that_trl_does_not_have(once: Axolotl, tmp_path: Path):
    """The first step would fail, also with rl: dpo; a release without the key drops it."""
    from axolotl.utils.schemas.config import AxolotlInputConfig

    (found,) = load(tmp_path, [once.config(pad_to_multiple_of=64)])
    if "pad_to_multiple_of" in AxolotlInputConfig.model_fields:
        assert "pad_to_multiple_of must be unset under rl: focalpo, got 64: Axolotl then" in found
    else:
        assert found["focalpo_rl"] == "focalpo"


def test_a_rewritten_config_stays_as_it_is():
    """Ray's worker registers the plug-in again, and validates the config that the driver rewrote."""
    from axolotl.utils.dict import DictDefault

    from focalpo_plugins.axolotl import FocalPOPlugin
    from focalpo_plugins.axolotl.rewriting import rewritten

    given = DictDefault({"rl": "focalpo", "focalpo_gamma": 0.3, "rl_beta": 0.1})
    FocalPOPlugin().register(given)
    assert given == {"rl": "focalpo", "focalpo_gamma": 0.3, "rl_beta": 0.1}
    cfg = rewritten(given)
    assert cfg["rl"] == "dpo"
    once = dict(cfg)
    assert dict(rewritten(cfg)) == once
    # Wrong values are refused there too.
    cfg["focalpo_gamma"] = 7.0
    with pytest.raises(ValueError, match="^focalpo_gamma must be below"):
        rewritten(cfg)


OURS = ["dpo", "focalpo_plugins.axolotl.trainer.AxolotlPairwiseTrainer", "focalpo"]


@pytest.mark.xdist_group("autoload off")
@pytest.mark.parametrize("way", ["autoload", "plugins line", "listed by its module"])
def test_one_config_for_several_losses(once: Axolotl, tmp_path: Path, way: str):
    """A notebook changes `rl` of one object between its cells: each cell trains its own loss."""
    plugins = {"autoload": [], "plugins line": [PLUGIN]}.get(
        way, ["focalpo_plugins.axolotl.plugin.FocalPOPlugin"]
    )
    off = {"FOCALPO_AUTOLOAD": "0"} if way == "plugins line" else {}
    config = once.config(focalpo_gamma=None, focalpo_variant=None)
    loaded = results(CELLS, tmp_path, str(config), *plugins, **off)
    assert loaded[0] == [*OURS, 0.3]
    assert loaded[1].startswith("focalpo_gamma belongs to rl: focalpo, got 0.3 under rl: dpo.")
    assert loaded[2:5] == [["dpo", None, None, None], ["ipo", None, None, None], [*OURS, None]]
    assert loaded[5].startswith("focalpo_gamma must be below 1/ln 2")
    assert loaded[6:] == [[*OURS, 0.5], ["dpo", None, None, None]]


# A user's scripts that pass a config to Axolotl themselves; {} is the import of torch.
SCRIPTS = {
    "load_cfg": "from axolotl.cli.config import load_cfg\n{}\n",
    "validate_config": "from axolotl.utils.config import validate_config\n{}\n"
    "load_cfg = lambda path: validate_config(DictDefault(yaml.safe_load(open(path))))\n",
    # As Ray's worker does, which never imports the command; `_lazy_attr` exists from 0.19 on.
    "train": "from axolotl.cli import train\n{}\n"
    "from axolotl.utils import config\n"
    "find = getattr(train, '_lazy_attr', lambda name: getattr(config, name))\n"
    "validate_config = find('validate_config')\n"
    "load_cfg = lambda path: validate_config(DictDefault(yaml.safe_load(open(path))))\n",
}


# The three with torch imported first: what Axolotl needs of others is the same in each.
AFTER_TORCH = """
import json, os, sys
import torch, transformers, trl, peft, datasets, gradio

found = []
for script in {scripts!r}:
    reader, writer = os.pipe()
    if not os.fork():
        exec(script, {{"__name__": "__main__", "tell": lambda what: os.write(writer, what.encode())}})
        sys.stdout.flush()
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as told:
        found.append(told.read())
    os.wait()
print("RESULTS", json.dumps(found))
"""


def config_script(name: str, torch: str) -> str:
    source = SCRIPTS[name].format("import torch" if torch == "after" else "")
    source = source.replace("load_cfg =", "from axolotl.utils.dict import DictDefault\nload_cfg =")
    return f"import json, sys, yaml\n{source}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_axolotls_python_interface(once: Axolotl, tmp_path: Path, script: str):
    """No command line names Axolotl, and its module is imported before torch."""
    source = config_script(script, "after")
    source += "print('RESULTS', json.dumps([load_cfg(sys.argv[1]).focalpo_rl]))\n"
    assert results(source, tmp_path, str(once.config()), fresh=True) == ["focalpo"]


def test_axolotls_python_interface_after_torch(once: Axolotl, tmp_path: Path):
    told = "tell(load_cfg(sys.argv[1]).focalpo_rl)\n"
    scripts = [config_script(name, "before") + told for name in SCRIPTS]
    source = AFTER_TORCH.format(scripts=scripts)
    found = results(source, tmp_path, str(once.config()), fresh=True)
    assert found == ["focalpo"] * 3


@pytest.mark.releases
def test_no_loss_may_have_a_name_of_axolotls():
    from axolotl.utils.schemas.enums import RLType

    from focalpo_plugins.registry import RESERVED_NAMES

    assert {rl.value for rl in RLType} <= RESERVED_NAMES


def test_a_loss_with_a_key_of_axolotls_is_refused_where_it_is_asked_for(add_loss):
    """No host uses the name `chat`, but `chat_template` is a key of Axolotl's."""
    from axolotl.utils.dict import DictDefault

    from focalpo_plugins.axolotl.rewriting import rewritten

    add_loss("chat", lambda margins, template: -margins, options={"template": 1.0})
    other = DictDefault({"rl": "focalpo", "chat_template": "llama3"})
    assert rewritten(other)["focalpo_rl"] == "focalpo"
    with pytest.raises(ValueError, match="^rl must be a loss whose names Axolotl doesn't use, got "
                       "'chat': the package mine brings chat_template, which Axolotl already has"):  # fmt: skip
        rewritten(DictDefault({"rl": "chat"}))


@pytest.mark.parametrize(
    "cfg, message",
    [
        ({"rl": "dpo", "mine_scale": 2.0}, "mine_scale belongs to rl: mine, got 2.0 under rl: dpo."),
        ({"rl": "mine", "mine_scal": 2.0}, "unknown key mine_scal, got 2.0; did you"
         " mean 'mine_scale'?"),
        ({"rl": "mine", "mine_scale": 0.0}, "mine_scale must be above 0, got 0.0"),
        ({"rl": "mine", "focalpo_gamma": 0.1}, "focalpo_gamma belongs to rl: focalpo, got 0.1 under"),
        ({"rl": "focalpo", "focalpo-gamma": 0.1}, "unknown key focalpo-gamma, got"),
        ({"rl": "dpo", "focalpo": {"gamma": 0.1}}, "unknown key focalpo, got {'gam"),
        # A config that was loaded as FocalPO and is validated again as another loss.
        ({"rl": "ipo", "focalpo_rl": "focalpo", "trainer_cls": OURS[1]}, "focalpo_rl must go with"
         " rl: dpo, got 'focalpo' under rl: ipo: this config was loaded before, as rl: focalpo. Load"),
        ({"rl": "dpo", "_focalpo_fused": False}, "unknown key _focalpo_fused, got "
         "False; did you mean 'focalpo_fused'?"),
    ],
)  # fmt: skip
def test_keys_of_any_loss_of_ours(add_loss, cfg: dict[str, Any], message: str):
    from axolotl.utils.dict import DictDefault

    from focalpo_plugins.axolotl.rewriting import rewritten

    def scaled(margins, scale):
        if scale <= 0:
            raise ValueError(f"scale must be above 0, got {scale}")
        return -scale * margins

    add_loss("mine", scaled, options={"scale": 1.0})
    with pytest.raises(ValueError) as error:
        rewritten(DictDefault(cfg))
    assert str(error.value).startswith(message)


def test_another_trainer_than_ours_never_trains():
    from axolotl.utils.dict import DictDefault

    from focalpo_plugins.axolotl import FocalPOPlugin

    cfg = DictDefault({"rl": "dpo", "focalpo_rl": "focalpo"})
    with pytest.raises(RuntimeError, match="^Axolotl built object, but rl: focalpo needs Axolotl"):
        FocalPOPlugin().post_trainer_create(cfg, object())


@pytest.mark.parametrize("cfg", [None, {"rl": "dpo"}])
def test_our_trainer_trains_no_loss_of_the_hosts(cfg):
    from focalpo_plugins.axolotl import FocalPOPlugin
    from focalpo_plugins.axolotl.trainer import AxolotlPairwiseTrainer

    callbacks = [] if cfg is None else FocalPOPlugin().add_callbacks_pre_trainer(cfg, None)
    with pytest.raises(
        RuntimeError, match="^AxolotlPairwiseTrainer must be built by Axolotl for a"
    ):
        AxolotlPairwiseTrainer(callbacks=callbacks)


def test_what_the_user_set_aside_stays_so():
    """The same as in tests/conftest.py, for these processes."""
    from focalpo_plugins.axolotl.trainer import _SetAside

    before = gc.get_freeze_count()
    assert before > 0
    ours = _SetAside()
    ours.on_train_begin()
    assert gc.get_freeze_count() == before
    ours.undo()
    assert gc.get_freeze_count() == before


def test_broken_plug_in_does_not_stop_rl_dpo(once: Axolotl, package_copy: Path):
    """This package's modules raise, but a run that doesn't use them loads its config; a run that
    does stops."""
    loss = package_copy / "focalpo_plugins" / "loss.py"
    loss.write_text("raise RuntimeError('broken on purpose')")
    plain = once.config(rl="dpo", focalpo_gamma=None, focalpo_variant=None)
    dpo, focalpo = load(package_copy, [plain, once.config()], package_copy)
    assert dpo["rl"] == "dpo"
    assert focalpo == "RuntimeError: broken on purpose"


def test_a_trl_without_the_seam_is_refused_before_the_model_loads(once: Axolotl, tmp_path: Path):
    """A copy of TRL whose loss is computed in another method, as in 0.28 and older."""
    import trl

    shutil.copytree(Path(trl.__file__).parent, tmp_path / "trl")
    module = tmp_path / "trl" / "trainer" / "dpo_trainer.py"
    source = module.read_text()
    assert source.count("    def _compute_loss(self, ") == 1
    module.write_text(
        source.replace("    def _compute_loss(self, ", "    def _computes_loss(self, ")
    )
    plain = once.config(rl="dpo", focalpo_gamma=None, focalpo_variant=None)
    dpo, focalpo = load(tmp_path, [plain, once.config()], tmp_path)
    assert dpo["rl"] == "dpo"
    assert focalpo.startswith("RunError: focalpo_plugins 0.2.0 does not know where trl")


@pytest.mark.xdist_group("autoload off")
def test_axolotl_itself_would_train_dpo(once: Axolotl, tmp_path: Path):
    """The reason for refusing stray keys: without this package Axolotl accepts and drops them."""
    config = once.config(rl="dpo")
    (outcome,) = load(tmp_path, [config], FOCALPO_AUTOLOAD="0")
    assert outcome["rl"] == "dpo"
    assert outcome["focalpo_gamma"] is None


def test_help_is_not_slowed_by_a_listed_loss():
    """`axolotl --help` works with this package installed, and doesn't mention it."""
    done = subprocess.run(["axolotl", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "focalpo" not in without_paths(done.stderr)
