"""examples/multinode.md, as far as one machine allows: each node has its own launcher."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

import pytest
from contract import FIRST
from harness import ON_CPU, Axolotl, Run, at_once, environment, free_port, zero3_on_cpu

# Ray on a machine of any size and with busy cores: it waits forever for a core that it doesn't
# count, restarts a process that hasn't answered in time, and gives its workers a niceness of 15.
RAY = {
    "RAY_worker_niceness": "0",
    "RAY_OVERRIDE_RESOURCES": '{"CPU": 4}',
    "RAY_worker_register_timeout_seconds": "500",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@pytest.fixture(scope="module")
def one_node(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three steps on two ranks."""
    axolotl = Axolotl(tiny, tmp_path_factory.mktemp("one_node"))
    config = axolotl.config(
        deepspeed=zero3_on_cpu(axolotl.folder), max_steps=3, plugins=["test_only_plugins.GlooOnCPU"]
    )
    run = axolotl("train", config, ranks=2, **ON_CPU)
    assert run.code == 0, run.output[-6000:]
    return run


@pytest.mark.xdist_group("one_node")
def test_torchrun_on_two_nodes(axolotl: Axolotl, one_node: Run):
    """The page's command, once for each node, gives the losses of one node with two ranks."""
    config = axolotl.config(
        deepspeed=zero3_on_cpu(axolotl.folder), max_steps=3, plugins=["test_only_plugins.GlooOnCPU"]
    )
    command = ["axolotl", "train", str(config), "--launcher", "torchrun", "--", "--nnodes", "2"]
    command += ["--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_id", "focalpo"]
    command += ["--rdzv_endpoint", f"127.0.0.1:{free_port()}"]
    ends = at_once(
        [[*command, "--node_rank", str(rank)] for rank in range(2)],
        [environment(**ON_CPU)] * 2,
        axolotl.folder,
    )
    for code, output in ends:
        assert code == 0, output[-6000:]
    run = Run(0, "".join(output for _, output in ends), axolotl.folder / "out")
    assert run.output.count("focalpo_plugins: active") == 1
    assert run.steps("loss")[0][0] == pytest.approx(FIRST, abs=1e-6)
    names = ("loss", "grad_norm", "focalpo/p")
    for two, one in zip(run.steps(*names), one_node.steps(*names), strict=True):
        assert two == pytest.approx(one, rel=1e-6)


@pytest.mark.xdist_group("one_node")
def test_ray_with_two_workers(axolotl: Axolotl, one_node: Run):
    assert importlib.util.find_spec("ray"), 'pip install "axolotl[ray]"'
    # A short path, because sockets need one, and outside the environment, where Ray refuses it.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        run = axolotl.train(
            "--use-ray",
            "--ray-num-workers",
            "2",
            deepspeed=zero3_on_cpu(axolotl.folder),
            max_steps=3,
            resources_per_worker={"CPU": 1},
            plugins=["test_only_plugins.GlooOnCPU", "test_only_plugins.RayOnCPU"],
            how={**ON_CPU, **RAY, "RAY_TMPDIR": folder, "fresh": True},
        )
    assert run.output.count("focalpo_plugins: active") == 1
    names = ("loss", "grad_norm", "focalpo/p")
    for ray, one in zip(run.steps(*names), one_node.steps(*names), strict=True):
        assert ray == pytest.approx(one, rel=1e-6)
