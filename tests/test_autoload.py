"""What runs inside everybody's ``import torch``."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from harness import run_python

HOSTS = ("axolotl", "openrlhf", "trl", "transformers")
REPORT = """
import sys, torch
waiting = [finder.awaited for finder in sys.meta_path if type(finder).__name__ == "_Awaiting"]
print("waiting for", waiting, "package loaded", "focalpo_plugins" in sys.modules)
"""


@pytest.fixture(scope="module")
def said_by_torch() -> str:
    """What `import torch` prints without any autoload: without NumPy, say, a warning of its own."""
    return run_python("-c", "import torch", TORCH_DEVICE_BACKEND_AUTOLOAD="0").stderr


@pytest.fixture
def broken_package(package_copy: Path) -> Path:
    """The installed package once more, with every module of it broken, first on the path."""
    modules = list((package_copy / "focalpo_plugins").rglob("*.py"))
    assert modules
    for module in modules:
        module.write_text("raise RuntimeError('broken on purpose')\n")
    return package_copy


# What is left of an installation; without `_focalpo_plugins_autoload.py` there is no torch.
HALVES = {
    "syntax error": lambda package: (package / "loss.py").write_text("def focalpo_loss(:\n"),
    "module missing": lambda package: (package / "registry.py").unlink(),
    "room missing": lambda package: shutil.rmtree(package / "axolotl"),
    "one module": lambda package: [
        shutil.rmtree(part) if part.is_dir() else part.unlink()
        for part in package.iterdir()
        if part.name != "__init__.py"
    ],
}


@pytest.mark.parametrize("half", HALVES)
def test_import_torch_survives_half_a_package(package_copy: Path, half: str, said_by_torch: str):
    """In a process that is no host nothing is said, and in a host's at most one warning."""
    HALVES[half](package_copy / "focalpo_plugins")
    run = run_python("-c", REPORT, path=package_copy)
    assert run.stdout == "waiting for [] package loaded False\n"
    assert run.stderr == said_by_torch
    utils = package_copy / "axolotl" / "utils"
    utils.mkdir(parents=True)
    for folder in (utils, utils.parent):
        (folder / "__init__.py").touch()
    (utils / "config.py").write_text("def validate_config(cfg): return cfg\n")
    script = Path(host_script(package_copy))
    script.write_text(
        "import torch, warnings, axolotl.utils.config as config\nprint(config.validate_config)\n"
    )
    run = run_python(str(script), path=package_copy)
    assert run.stdout.startswith("<function validate_config at"), run.stderr
    lost = half in ("room missing", "one module")
    assert run.stderr.count("autoload failed (") == lost
    if lost:
        assert "ModuleNotFoundError: No module named 'focalpo_plugins.axolotl" in run.stderr


def test_silent_in_a_process_that_is_no_host(said_by_torch: str):
    run = run_python("-c", REPORT)
    assert run.stdout == "waiting for [] package loaded False\n"
    assert run.stderr == said_by_torch


def test_runs_at_import_torch_from_its_entry_point():
    """Only the entry point imports this module."""
    run = run_python("-c", "import torch, sys; print('_focalpo_plugins_autoload' in sys.modules)")
    assert run.stdout == "True\n", run.stderr


def test_loads_no_host_module():
    script = f"import sys, torch; print([name for name in {HOSTS} if name in sys.modules])"
    assert run_python("-c", script).stdout == "[]\n"


def host_script(folder: Path) -> str:
    """A command named as Axolotl's, which is all that the autoload looks at."""
    (folder / "bin").mkdir()
    (folder / "bin" / "axolotl").write_text(REPORT)
    return str(folder / "bin" / "axolotl")


def test_waits_in_a_host_process(tmp_path: Path, said_by_torch: str):
    run = run_python(host_script(tmp_path))
    assert run.stdout == "waiting for ['axolotl.utils.config'] package loaded False\n"
    assert run.stderr == said_by_torch


@pytest.mark.parametrize("imports_torch", ("__init__", "train"))
def test_waits_in_a_process_run_as_a_module(tmp_path: Path, imports_torch: str):
    """``python -m`` imports the parents first: torch may come in before ``__main__`` has a spec."""
    package = tmp_path / "axolotl" / "cli"
    package.mkdir(parents=True)
    (tmp_path / "axolotl" / "__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    (package / "train.py").write_text(REPORT)
    if imports_torch == "__init__":
        (package / "__init__.py").write_text("import torch\n")
    run = run_python("-m", "axolotl.cli.train", path=tmp_path)
    assert run.stdout == "waiting for ['axolotl.utils.config'] package loaded False\n", run.stderr


def test_can_be_turned_off(tmp_path: Path):
    run = run_python(host_script(tmp_path), FOCALPO_AUTOLOAD="0")
    assert run.stdout == "waiting for [] package loaded False\n"


def test_import_torch_survives_a_broken_package(broken_package: Path, said_by_torch: str):
    run = run_python("-c", REPORT, path=broken_package)
    assert run.stdout == "waiting for [] package loaded False\n"
    assert run.stderr == said_by_torch


def test_a_host_survives_a_broken_package(broken_package: Path, tmp_path: Path):
    """The module waited for is imported as without us, and one warning says what is missing."""
    config = broken_package / "axolotl" / "utils"
    config.mkdir(parents=True)
    (config.parent / "__init__.py").write_text("")
    (config / "__init__.py").write_text("")
    (config / "config.py").write_text("validate_config = 'the host\\'s own'\n")
    script = Path(host_script(tmp_path))
    script.write_text(
        REPORT + "import axolotl.utils.config as config; print(config.validate_config)\n"
    )
    run = run_python(str(script), path=broken_package)
    assert run.stdout.splitlines()[1] == "the host's own", run.stderr
    assert run.stderr.count("autoload failed (RuntimeError: broken on purpose)") == 1
