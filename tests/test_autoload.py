"""The code that runs inside everybody's ``import torch``."""

from __future__ import annotations

import ast
import os
import shutil
from pathlib import Path
from statistics import median

import pytest
from harness import run_python

import _focalpo_plugins_autoload

HOSTS = ("axolotl", "openrlhf", "trl", "transformers")
REPORT = """
import sys, torch
(finder,) = [finder for finder in sys.meta_path if type(finder).__name__ == "_Waiting"]
print("waits", sorted(finder.modules), "package loaded", "focalpo_plugins" in sys.modules)
"""
AWAITED = sorted({module for module, _, _ in _focalpo_plugins_autoload.HOSTS})
WAITS = f"waits {AWAITED} package loaded False\n"
VALIDATES = """
import torch, axolotl.utils.config as config
print(config.validate_config)
"""


@pytest.fixture(scope="module")
def said_by_torch() -> str:
    """What `import torch` prints without any autoload, for example a warning about NumPy."""
    return run_python("-c", "import torch", TORCH_DEVICE_BACKEND_AUTOLOAD="0").stderr


@pytest.fixture
def broken_package(package_copy: Path) -> Path:
    """A copy of the installed package with every module broken, first on the path."""
    modules = list((package_copy / "focalpo_plugins").rglob("*.py"))
    assert modules
    for module in modules:
        module.write_text("raise RuntimeError('broken on purpose')\n")
    return package_copy


# The rest of an installation; without `_focalpo_plugins_autoload.py`, `import torch` fails.
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
    """Nothing is printed in a process without a host, and at most one warning in a host's."""
    HALVES[half](package_copy / "focalpo_plugins")
    run = run_python("-c", REPORT, path=package_copy)
    assert run.stdout == WAITS
    assert run.stderr == said_by_torch
    utils = package_copy / "axolotl" / "utils"
    utils.mkdir(parents=True)
    for folder in (utils, utils.parent):
        (folder / "__init__.py").touch()
    (utils / "config.py").write_text("def validate_config(cfg): return cfg\n")
    run = run_python("-c", VALIDATES, path=package_copy)
    assert run.stdout.startswith("<function validate_config at"), run.stderr
    lost = half in ("adapter missing", "one module")
    assert run.stderr.count("autoload failed (") == lost
    if lost:
        assert "ModuleNotFoundError: No module named 'focalpo_plugins.axolotl" in run.stderr


def test_silent_in_a_process_that_is_no_host(said_by_torch: str):
    run = run_python("-c", REPORT)
    assert run.stdout == WAITS
    assert run.stderr == said_by_torch


def test_runs_at_import_torch_from_its_entry_point():
    """Only the entry point imports this module."""
    run = run_python("-c", "import torch, sys; print('_focalpo_plugins_autoload' in sys.modules)")
    assert run.stdout == "True\n", run.stderr


def test_loads_no_host_module():
    script = f"import sys, torch; print([name for name in {HOSTS} if name in sys.modules])"
    assert run_python("-c", script).stdout == "[]\n"


def test_no_command_line_changes_what_it_waits_for(said_by_torch: str):
    """Not even one that a program has corrupted before it imports torch."""
    for argv in ("[]", "[1]", "['axolotl']", "[__import__('pathlib').Path('axolotl')]"):
        run = run_python("-c", f"import sys; sys.argv = {argv}; del sys.orig_argv\n{REPORT}")
        assert (run.stdout, run.stderr) == (WAITS, said_by_torch), argv


# The ways in which a process can come to run a host's command, with the command's file in {};
# earlier frames are Python's own or the standard library's. `.../bin/axolotl` is the console
# script.
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
# OpenRLHF's command, which is `__main__` in each.
RUNS_OPENRLHF = (
    "-m openrlhf.cli.train_dpo --loss focalpo",
    "{}/openrlhf/cli/train_dpo.py --loss focalpo",
    "-m cProfile -o prof -m openrlhf.cli.train_dpo --loss focalpo",
    "-m pdb -c continue -m openrlhf.cli.train_dpo",
    "-m trace --count -C counts --module openrlhf.cli.train_dpo",
    "-m other.runner -m openrlhf.cli.train_dpo",
    "-m cProfile {}/openrlhf/cli/train_dpo.py --loss focalpo",
    "-m trace --count -C counts {}/openrlhf/cli/train_dpo.py",
)
# Processes with a host's name in their command line that run no host.
RUNS_NONE = (
    "{}/mine/axolotl.py",
    "{}/mine/cli/train.py",
    "-m mine.axolotl",
    "-m other.runner --output_dir {}/axolotl",
    "-m other.runner --output_dir axolotl -m mine.axolotl",
    "-m openrlhf.cli.train_sft",
    "{}/openrlhf/cli/train_sft.py",
    "{}/mine/library.py",
    "-m mine.library",
)


LAUNCHERS = ("accelerate.commands.launch", "deepspeed.launcher.runner", "torch.distributed.run")
AT_ONCE = "import torch\n"
CALLED = "print(torch.called())\n"
SOURCES = {
    "axolotl/utils/config.py": "import os, torch\n"
    "if 'FAILS' in os.environ: raise OSError\n"
    "validate_config = len\n",
    "axolotl/cli/main.py": "from axolotl.cli import train\n",
    "axolotl/cli/train.py": f"import torch, axolotl.utils.config\n{CALLED}",
    "bin/axolotl": "import axolotl.cli.main\n",
    "openrlhf/cli/train_dpo.py": AT_ONCE + CALLED,
    "openrlhf/cli/train_sft.py": AT_ONCE + CALLED,
    "mine/axolotl.py": AT_ONCE + CALLED,
    "mine/cli/train.py": AT_ONCE + CALLED,
    "mine/library.py": f"import openrlhf.cli.train_dpo, torch\n{CALLED}",
    "other/runner.py": "import runpy, sys, torch\n"
    "named = [word for before, word in zip(sys.argv, sys.argv[1:]) if before == '-m']\n"
    "named += [word[9:] for word in sys.argv if word.startswith('--module=')]\n"
    "sys.argv[:] = ['', *sys.argv[-1:]]\n"
    "runpy.run_module(named[0], run_name='__main__') if named else print(torch.called())\n",
    # What torch does with this package, and what the adapters are called with.
    "torch/__init__.py": "import sys, _focalpo_plugins_autoload as autoload\n"
    "calls = []\n"
    "def called(): return 'CALLED', calls, 'focalpo_plugins' in sys.modules\n"
    "def call(name, module):\n"
    "    state = None if module is None else hasattr(module, 'validate_config')\n"
    "    calls.append((name, state))\n"
    "autoload._call_adapters = call\n"
    "autoload.autoload()\n",
    "torch/distributed/run.py": "",
    "accelerate/commands/launch.py": AT_ONCE,
    "deepspeed/launcher/runner.py": AT_ONCE,
}


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packages with the hosts' names, whose commands print which adapters were called, and a
    `torch` that loads this package as torch does, so that each run takes a few milliseconds."""
    folder = tmp_path_factory.mktemp("commands")
    for command, source in SOURCES.items():
        path = folder / command
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
        for package in (path.parent, path.parent.parent):
            if package.is_relative_to(folder) and package != folder:
                (package / "__init__.py").touch()
    return folder


def called(commands: Path, *words: str) -> list[tuple[str, bool | None]]:
    """The modules that our adapters were called for in a process that ends so, each with None before
    its first line, False in the middle of it, and True after it."""
    path = Path(_focalpo_plugins_autoload.__file__).parent
    run = run_python(*words, path=f"{commands}{os.pathsep}{path}", cwd=commands)
    lines = [line for line in run.stdout.splitlines() if line.startswith("('CALLED'")]
    assert lines, run.stderr
    _, calls, loaded = ast.literal_eval(lines[-1])
    assert not loaded
    return calls


def split(commands: Path, command: str) -> list[str]:
    return [word.format(commands) for word in command.split()]


CONFIG = ("axolotl.utils.config", True)


@pytest.mark.parametrize("command", RUNS_AXOLOTL)
def test_knows_axolotl_whoever_runs_it(commands: Path, command: str):
    """The config's module imports torch in the middle, and is patched when it is complete.  The
    module of the command is still being imported then, or runs as `__main__`."""
    calls = called(commands, *split(commands, command))
    main = [("axolotl.cli.main", None)] * ("-m axolotl.cli.main" in command)
    assert calls == [*main, CONFIG]


@pytest.mark.parametrize("command", RUNS_OPENRLHF)
def test_knows_openrlhf_whoever_runs_it(commands: Path, command: str):
    """Before its command imports anything of it."""
    calls = called(commands, *split(commands, command))
    assert calls == [("openrlhf.cli.train_dpo", None)]


@pytest.mark.parametrize("command", RUNS_NONE)
def test_leaves_every_other_process_alone(commands: Path, command: str):
    """One of them imports the module of OpenRLHF's command as a library."""
    assert called(commands, *split(commands, command)) == []


# Ways in which a program that no host's name starts imports a host's module.
IMPORTS = {
    "after torch": "import torch, axolotl.utils.config",
    "before torch": "import axolotl.utils.config, torch",
    "as a name": "from axolotl.utils.config import validate_config; import torch",
    "through its command": "import axolotl.cli.train, torch",
    "by its name": "from importlib import import_module; import_module('axolotl.utils.config')\n"
    "import torch",
}


@pytest.mark.parametrize("how", IMPORTS)
def test_knows_axolotl_by_its_module(commands: Path, how: str):
    assert called(commands, "-c", f"{IMPORTS[how]}\n{CALLED}") == [CONFIG]


def test_once_only(commands: Path):
    again = "sys.meta_path[0].find_spec('axolotl.utils.config'); importlib.reload(config)"
    script = f"import importlib, sys, torch, axolotl.utils.config as config\n{again}\n{CALLED}"
    assert called(commands, "-c", script) == [CONFIG]


def test_a_module_that_fails_is_not_patched(commands: Path):
    """Axolotl's own error passes through."""
    failing = "import os, torch; os.environ['FAILS'] = ''"
    script = f"{failing}\ntry: import axolotl.utils.config\nexcept OSError: print(torch.called())"
    assert called(commands, "-c", script) == []


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("how", ["imported", "run"])
def test_knows_a_launcher(commands: Path, launcher: str, how: str):
    """As its console script imports it, and as a module."""
    if how == "imported":
        calls = called(commands, "-c", f"import {launcher}, torch\n{CALLED}")
        assert calls == [(launcher, False)]
    else:
        ran = f"import runpy; runpy.run_module({launcher!r}, run_name='__main__'); import torch"
        assert called(commands, "-c", f"{ran}\n{CALLED}") == [(launcher, None)]


def test_can_be_turned_off():
    found = "print([f for f in sys.meta_path if type(f).__name__ == '_Waiting'])"
    run = run_python("-c", f"import sys, torch; {found}", FOCALPO_AUTOLOAD="0")
    assert run.stdout == "[]\n"


def test_import_torch_survives_a_broken_package(broken_package: Path, said_by_torch: str):
    run = run_python("-c", REPORT, path=broken_package)
    assert run.stdout == WAITS
    assert run.stderr == said_by_torch


def test_a_host_survives_a_broken_package(broken_package: Path):
    """The module is imported as without this package, and one warning names what is missing."""
    config = broken_package / "axolotl" / "utils"
    config.mkdir(parents=True)
    (config.parent / "__init__.py").write_text("")
    (config / "__init__.py").write_text("")
    (config / "config.py").write_text("validate_config = 'the host\\'s own'\n")
    run = run_python("-c", VALIDATES, path=broken_package)
    assert run.stdout.splitlines() == ["the host's own"], run.stderr
    assert run.stderr.count("autoload failed (RuntimeError: broken on purpose)") == 1


def test_a_launcher_survives_a_broken_package(broken_package: Path):
    script = "import torch.distributed.run as launcher; print(callable(launcher.main))"
    run = run_python("-c", script, path=broken_package)
    assert run.stdout == "True\n", run.stderr
    assert run.stderr.count("autoload failed (RuntimeError: broken on purpose)") == 1


def test_never_raises_where_warnings_are_errors():
    """`python -W error` turns a warning into an exception."""
    lost = "import sys; sys.meta_path = tuple(sys.meta_path)\n"
    script = "import _focalpo_plugins_autoload as a; a.autoload(); print('on')"
    run = run_python("-W", "error", "-c", lost + script)
    assert run.stdout == "on\n", run.stderr


def test_costs_less_than_a_millisecond():
    """Processor time in a process without a host: the median of five calls, and of a thousand
    imports of modules that aren't in the table."""
    script = """
import sys, time
import _focalpo_plugins_autoload as autoload
clock = time.process_time()
autoload.autoload()
print(1e3 * (time.process_time() - clock))
clock = time.process_time()
for _ in range(1000):
    sys.meta_path[0].find_spec("another.module")
print(1e3 * (time.process_time() - clock))
print("focalpo_plugins" in sys.modules)
"""
    runs = [run_python("-c", script).stdout.split() for _ in range(5)]
    assert {loaded for _, _, loaded in runs} == {"False"}
    assert median(float(once) for once, _, _ in runs) < 1
    assert median(float(imports) for _, imports, _ in runs) < 1
