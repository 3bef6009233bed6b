"""What runs inside everybody's ``import torch``."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from harness import run_python

import _focalpo_plugins_autoload

HOSTS = ("axolotl", "openrlhf", "trl", "transformers")
# The last that is asked for is the first that is looked at.
AXOLOTL = ["axolotl.cli.utils", "axolotl.utils.config"]
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
    "adapter missing": lambda package: shutil.rmtree(package / "axolotl"),
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
    lost = half in ("adapter missing", "one module")
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
    assert run.stdout == f"waiting for {AXOLOTL} package loaded False\n"
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
    assert run.stdout == f"waiting for {AXOLOTL} package loaded False\n", run.stderr


# How a process can come to run a host's command, with the command's file in {}; what comes before
# is Python's own or the standard library's.  `.../bin/axolotl` is the console script.
RUNS_AXOLOTL = (
    "-m axolotl.cli.train c.yml",
    "-maxolotl.cli.train c.yml",
    "-m axolotl.cli.main train c.yml",
    "-X importtime -m axolotl.cli.train c.yml",
    "-u -m axolotl.cli.train c.yml --focalpo-gamma=0.5",
    "{}/axolotl/cli/train.py c.yml",
    "-m cProfile -o prof -m axolotl.cli.train c.yml",
    "-m cProfile {}/axolotl/cli/train.py c.yml",
    "-m cProfile {}/bin/axolotl train c.yml",
    "-m pdb -c continue -m axolotl.cli.train c.yml",
    "-m pdb -c continue {}/axolotl/cli/train.py c.yml",
    "-m trace --count --missing -C counts --module axolotl.cli.train c.yml",
    "-m trace --count -C counts {}/axolotl/cli/train.py c.yml",
    "-m runpy axolotl.cli.train c.yml",
    "-m other.runner --listen 5678 -m axolotl.cli.train c.yml",
    "-m other.runner --module=axolotl.cli.train c.yml",
    "{}/bin/axolotl train c.yml",
)
RUNS_OPENRLHF = (
    "-m openrlhf.cli.train_dpo --loss focalpo",
    "{}/openrlhf/cli/train_dpo.py --loss focalpo",
    "-m cProfile -o prof -m openrlhf.cli.train_dpo --loss focalpo",
    "-m pdb -c continue -m openrlhf.cli.train_dpo",
    "-m trace --count -C counts --module openrlhf.cli.train_dpo",
    "-m other.runner -m openrlhf.cli.train_dpo",
)
# What has a host's name in its command line and runs none.
RUNS_NONE = (
    "{}/mine/axolotl.py",
    "{}/mine/cli/train.py",
    "-m mine.axolotl",
    "-m other.runner --output_dir {}/axolotl",
    "-m other.runner --output_dir axolotl -m mine.axolotl",
    "-m openrlhf.cli.train_sft",
    "{}/openrlhf/cli/train_sft.py",
)


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packages with the hosts' names, whose commands say what they wait for, and a `torch` that does
    what torch does with us; so that each run is a few milliseconds."""
    folder = tmp_path_factory.mktemp("commands")
    said = "import sys, torch\nprint(torch.waiting())\nsys.exit(0)\n"
    for command in ("axolotl/cli/train.py", "axolotl/cli/main.py", "bin/axolotl",
                    "openrlhf/cli/train_dpo.py", "openrlhf/cli/train_sft.py",
                    "mine/axolotl.py", "mine/cli/train.py"):  # fmt: skip
        path = folder / command
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(said)
        for package in (path.parent, path.parent.parent):
            if package.is_relative_to(folder) and package != folder:
                (package / "__init__.py").touch()
    (folder / "other").mkdir()
    (folder / "other" / "runner.py").write_text(
        "import runpy, sys, torch\n"
        "named = [word for before, word in zip(sys.argv, sys.argv[1:]) if before == '-m']\n"
        "named += [word[9:] for word in sys.argv if word.startswith('--module=')]\n"
        "sys.argv[:] = ['', *sys.argv[-1:]]\n"
        "runpy.run_module(named[0], run_name='__main__') if named else print(torch.waiting())\n"
    )
    (folder / "torch.py").write_text(
        "import sys, _focalpo_plugins_autoload\n"
        "patched = []\n"
        "_focalpo_plugins_autoload._patch = lambda adapter, module: patched.append(module.__name__)\n"
        "_focalpo_plugins_autoload.autoload()\n"
        "def waiting():\n"
        "    found = [f.awaited for f in sys.meta_path if type(f).__name__ == '_Awaiting']\n"
        "    return f'waiting for {found} patched {patched} loaded {\"focalpo_plugins\" in sys.modules}'\n"
    )
    return folder


def said(commands: Path, command: str) -> str:
    words = [word.format(commands) for word in command.split()]
    path = Path(_focalpo_plugins_autoload.__file__).parent
    run = run_python(*words, path=f"{commands}{os.pathsep}{path}", cwd=commands)
    lines = [line for line in run.stdout.splitlines() if line.startswith("waiting for")]
    assert lines, run.stderr
    return lines[-1]


@pytest.mark.parametrize("command", RUNS_AXOLOTL)
def test_knows_axolotl_whoever_runs_it(commands: Path, command: str):
    assert said(commands, command) == f"waiting for {AXOLOTL} patched [] loaded False"


@pytest.mark.parametrize("command", RUNS_OPENRLHF)
def test_knows_openrlhf_whoever_runs_it(commands: Path, command: str):
    """Patched before its command imports anything of it: at once if the package is there already,
    else when it comes, which a script that is run by its path does itself; this one doesn't."""
    by_path = "waiting for ['openrlhf'] patched [] loaded False"
    by_name = "waiting for [] patched ['openrlhf'] loaded False"
    assert said(commands, command) == (by_path if command.startswith("{}") else by_name)


@pytest.mark.parametrize("command", RUNS_NONE)
def test_leaves_every_other_process_alone(commands: Path, command: str):
    assert said(commands, command) == "waiting for [] patched [] loaded False"


@pytest.mark.parametrize("argv", [[], [""], ["-c"], [1], [Path("train.py")]], ids=repr)
def test_any_command_line(argv: list):
    """Whatever a program makes of `sys.argv` before it imports torch."""
    script = f"""
import sys
from pathlib import Path, PosixPath
sys.argv = {argv!r}
import _focalpo_plugins_autoload
_focalpo_plugins_autoload.autoload()
print([finder for finder in sys.meta_path if type(finder).__name__ == "_Awaiting"])
"""
    run = run_python("-c", script)
    assert (run.stdout, run.stderr) == ("[]\n", "")


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


def test_never_raises_where_warnings_are_errors():
    """`python -W error` makes an exception of a warning."""
    lost = "import sys; del sys.argv, sys.orig_argv\n"
    script = "import _focalpo_plugins_autoload as a; a.autoload(); print('on')"
    run = run_python("-W", "error", "-c", lost + script)
    assert run.stdout == "on\n", run.stderr
