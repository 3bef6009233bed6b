"""What the package imports, declares and ships."""

from __future__ import annotations

import ast
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from harness import run_python

import focalpo_plugins

PACKAGE = Path(focalpo_plugins.__file__).parent
HOSTS = {
    "axolotl",
    "llamafactory",
    "openrlhf",
    "swift",
    "trl",
    "transformers",
    "accelerate",
    "deepspeed",
    "peft",
    "liger_kernel",
}
# For each module or folder: which hosts, and which of this package's own modules, it may import.
OF_HOST = {
    "axolotl": {"axolotl", "transformers", "accelerate"},
    "llamafactory": {"llamafactory", "peft"},
    # OpenRLHF is built on DeepSpeed and requires it.
    "openrlhf": {"openrlhf", "transformers", "peft", "deepspeed"},
    "swift": {"swift", "accelerate", "peft"},
    "trl": {"trl", "transformers", "accelerate", "peft", "deepspeed"},
    "sharing": {"transformers"},  # under each of them
    # For every host that is a transformers.Trainer.
    "hf_trainer": {"transformers", "accelerate"},
    "hf_batches": {"transformers", "accelerate"},
    "hf_models": {"deepspeed"},
    "hf_reference": {"transformers"},
    "cli": {"transformers", "peft"},  # to count a model's parameters, whoever trains it
}
CORE = {
    "errors", "loss", "hookspecs", "options", "pairwise_loss", "registry", "diagnostics", "plan",
    "guards", "compute", "balanced", "releases", "run", "yaml_keys",
}  # fmt: skip
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "loss": {"errors"},
    "hookspecs": set(),
    "guards": {"errors"},
    "compute": {"errors"},
    "sharing": {"errors", "compute"},
    "options": {"loss"},
    "pairwise_loss": {"errors", "loss", "guards"},
    "registry": {"errors", "loss", "hookspecs", "options", "pairwise_loss", "guards"},
    "yaml_keys": {"errors", "guards", "options", "registry"},
    "reference_file": {"errors", "guards"},
    "reference": {"errors", "guards", "reference_file"},
    "diagnostics": {"registry"},
    "balanced": {"errors", "registry"},
    "plan": {"errors", "balanced", "registry"},
    "releases": set(),
    "run": {"errors", "guards", "diagnostics", "registry", "releases", "balanced"},
    "hf_sequences": {"balanced"},
    "hf_batches": {"errors", "balanced"},
    "hf_models": set(),
    "hf_trainer": {
        "errors", "guards", "registry", "run", "balanced", "hf_batches", "hf_sequences"
    },
    "hf_reference": {"errors", "guards", "reference", "hf_models", "hf_sequences", "hf_trainer", "yaml_keys"},
    "trl": {
        "errors", "loss", "options", "registry", "run", "balanced", "hf_trainer", "hf_batches",
        "hf_models", "hf_sequences", "hf_reference", "guards", "compute", "sharing", "plan",
        "releases", "yaml_keys"
    },
    "axolotl": {
        "errors", "loss", "registry", "balanced", "plan", "guards", "compute", "trl", "yaml_keys"
    },
    "llamafactory": {
        "errors", "loss", "registry", "run", "plan", "hf_models", "hf_sequences", "guards", "trl",
        "yaml_keys"
    },
    "swift": {
        "errors", "loss", "registry", "run", "plan", "balanced", "guards", "hf_trainer",
        "hf_batches", "trl", "yaml_keys"
    },
    "openrlhf": {
        "errors", "loss", "options", "registry", "run", "plan", "balanced", "guards", "sharing",
        "reference", "releases"
    },
    "cli": {
        "errors", "loss", "balanced", "plan", "guards", "hf_trainer", "trl", "axolotl", "openrlhf",
        "llamafactory", "swift"
    },
    "__main__": {"cli"},
    "__init__": {"errors", "loss", "hookspecs", "trl", "cli"},
}  # fmt: skip


def loaded_by(statement: str) -> set[str]:
    """Top-level names of the modules that a fresh interpreter holds after ``statement``."""
    run = run_python(
        "-c", f"{statement}; import sys; print(*sys.modules)", TORCH_DEVICE_BACKEND_AUTOLOAD="0"
    )
    assert run.returncode == 0, run.stderr
    return {name.partition(".")[0] for name in run.stdout.split()}


def test_importing_the_package_loads_neither_torch_nor_a_host():
    loaded = loaded_by("import focalpo_plugins")
    assert "focalpo_plugins" in loaded
    assert not loaded & {"torch", "pluggy", *HOSTS}


def test_the_core_loads_no_host():
    files = [path for path in PACKAGE.rglob("*.py") if place(path) in CORE]
    assert len(files) > len(CORE)
    names = [".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in files]
    loaded = loaded_by("import " + ", ".join(f"focalpo_plugins.{name}" for name in names))
    assert "torch" in loaded
    assert not loaded & HOSTS


def imports_of(file: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(file.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {
        node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level
    }
    return {name.partition(".")[0] for name in names}


def place(file: Path) -> str:
    """The module or the folder of this package that a file belongs to."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def ours_in(file: Path) -> set[str]:
    """The parts of this package that the file imports, at its top and inside its functions."""
    package = ["focalpo_plugins", *file.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            name = ".".join([*start, node.module or ""]).strip(".")
            found |= {f"{name}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("focalpo_plugins.")}


def test_a_host_is_imported_in_its_own_adapter_only():
    for file in sorted(PACKAGE.rglob("*.py")):
        allowed = OF_HOST.get(place(file), set())
        assert not imports_of(file) & (HOSTS - allowed), file


def test_the_arrows():
    """ARROWS lists what each part imports from the others.  `guards` and `compute` import only the
    errors.  TRL is the only adapter that other adapters import.  Only the package itself imports
    the command, for `check(trainer)`."""
    files = sorted(PACKAGE.rglob("*.py"))
    assert {place(file) for file in files} == ARROWS.keys()
    arrows: dict[str, set[str]] = {name: set() for name in ARROWS}
    for file in files:
        arrows[place(file)] |= ours_in(file) - {place(file)}
    assert arrows == ARROWS


def test_the_autoload_imports_the_standard_library_alone():
    """Our own module is imported by name, only in a host's process."""
    file = PACKAGE.parent / "_focalpo_plugins_autoload.py"
    assert {"os", "sys", "importlib"} <= imports_of(file) <= {*sys.stdlib_module_names}
    of_module = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import)]
    assert {alias.name for node in of_module for alias in node.names} == {"os", "sys"}


# Functions that could run or fetch something named in a user's data or config.
NEVER_IMPORTED = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "socket", "urllib",
                  "http", "requests", "httpx", "ftplib", "subprocess", "ctypes"}  # fmt: skip
NEVER_CALLED = {"eval", "exec", "compile", "__import__", "system", "popen"}
OF_TORCH = {"load", "save"}  # both use pickle


def test_nothing_is_unpickled_fetched_or_run():
    """By name, so it holds for the source as it is written; ``import_module`` is called with names
    of this package's own or of installed entry points alone, which its callers show."""
    files = [*PACKAGE.rglob("*.py"), PACKAGE.parent / "_focalpo_plugins_autoload.py"]
    assert len(files) > 20
    for file in files:
        assert not imports_of(file) & NEVER_IMPORTED, file
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = node.func
            name = called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")
            where = f"{file}:{node.lineno}"
            # model.eval() turns dropout off.
            evaluates = name == "eval" and isinstance(called, ast.Attribute) and not node.args
            assert name not in NEVER_CALLED or evaluates or of_module(called, "re"), where
            assert not (name in OF_TORCH and of_module(called, "torch")), where
            for keyword in node.keywords:
                if keyword.arg == "trust_remote_code":
                    assert isinstance(keyword.value, ast.Constant) and not keyword.value.value
                assert keyword.arg != "shell" or not ast.literal_eval(keyword.value), where


def of_module(called: ast.expr, module: str) -> bool:
    """Whether it is ``module.something``."""
    owner = getattr(called, "value", None)
    return isinstance(owner, ast.Name) and owner.id == module


# Tested where TRL is installed.
OF_TRL = {name for name in focalpo_plugins.__all__ if name.endswith(("Config", "Trainer"))}


@pytest.mark.parametrize("name", sorted({*focalpo_plugins.__all__} - OF_TRL))
def test_public_names_say_what_they_are(name: str):
    assert name in dir(focalpo_plugins)
    assert getattr(focalpo_plugins, name).__doc__


def test_help_without_trl():
    """It begins with the package's names, and leaves out those that need TRL."""
    shown = run_python(
        "-c",
        "import pydoc, sys; sys.modules['trl'] = None\n"
        "import focalpo_plugins\n"
        "print(pydoc.plain(pydoc.render_doc(focalpo_plugins)))",
    ).stdout
    assert shown.index("focalpo_loss(margins, gamma)") < 400
    assert "class FocalPOLoss" in shown
    assert "class FocalPOTrainer" not in shown


def test_unknown_name():
    with pytest.raises(AttributeError, match="has no attribute 'focal_loss'"):
        focalpo_plugins.focal_loss  # noqa: B018


def test_the_wheel_holds_what_it_should():
    """Fails for an editable install: the tests run against an installed wheel."""
    dist = distribution("focalpo_plugins")
    files = {str(file) for file in dist.files}
    assert {
        "focalpo_plugins/py.typed",
        "focalpo_plugins/loss.py",
        "_focalpo_plugins_autoload.py",
    } <= files
    assert not any(file.startswith(("tests/", "examples/")) for file in files)
    # pip removes what it lists: our modules together with the entry points that name them.
    assert any(file.endswith(".dist-info/entry_points.txt") for file in files)
    listed = {dist.locate_file(file).resolve() for file in dist.files}
    assert {path.resolve() for path in PACKAGE.rglob("*.py")} <= listed
    assert dist.locate_file("focalpo_plugins/loss.py").resolve() == (PACKAGE / "loss.py").resolve()
    assert dist.version == focalpo_plugins.__version__
    required = [requirement for requirement in dist.requires if "extra" not in requirement]
    assert sorted(required) == ["pluggy>=1.0", "torch>=2.5"]


OWN_LOSS = """
import pluggy
from focalpo_plugins import hookimpl, registry

assert pluggy.__version__.startswith("1.0."), pluggy.__version__

def module(name):
    hook = staticmethod(hookimpl(lambda register: register(name, lambda margins: -margins)))
    return type("Module", (), {"register_losses": hook})

try:
    registry.add("broken", module("dpo"))
except ValueError as error:
    assert "broken" not in dict(registry.manager.list_name_plugin())
else:
    raise AssertionError("a name of a host's was registered")
registry.add("whole", module("mine"))
print(*registry.losses())
"""


def test_the_lowest_pluggy(tmp_path: Path):
    """With the oldest pluggy that setup.cfg allows, a loss can be added after one that was refused."""
    lowest = ["--target", str(tmp_path), "pluggy==1.0.*"]
    run_pip = run_python("-m", "pip", "install", "--quiet", "--no-deps", *lowest)
    assert run_pip.returncode == 0, run_pip.stderr
    run = run_python("-c", OWN_LOSS, path=tmp_path)
    assert run.stdout.split() == ["focalpo", "mine"], run.stderr
