"""Entry point of the group ``torch.backends``: ``import torch`` calls :func:`autoload`.

This module is outside the package and imports only the standard library, so that a broken package
can't break ``import torch``.  :func:`autoload` puts one import finder before all others.  It waits
for the modules of :data:`HOSTS`; every other import costs it one look into a set.  When such a
module is imported, the finder calls our adapter for it.  Nothing here raises, and
``FOCALPO_AUTOLOAD=0`` turns it off.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from types import FrameType, ModuleType
from typing import Any

# A module of a host, when our adapter is called, and the adapter.
# "imported": after the module's last line; if the module is run as the command, before its first.
# "run": only if the module is run as the command, before its first line.
HOSTS = (
    ("axolotl.utils.config", "imported", "focalpo_plugins.axolotl.autoload"),
    ("axolotl.cli.main", "imported", "focalpo_plugins.axolotl.flags"),
    # The adapter replaces calls to CUDA: a process that only imports OpenRLHF keeps its own.
    ("openrlhf.cli.train_dpo", "run", "focalpo_plugins.openrlhf.autoload"),
    ("llamafactory.hparams.parser", "imported", "focalpo_plugins.llamafactory.autoload"),
    ("swift.arguments.rlhf_args", "imported", "focalpo_plugins.swift.autoload"),
    ("swift.pipelines.train.rlhf", "imported", "focalpo_plugins.swift.autoload"),
    ("swift.trainers.trainer_factory", "imported", "focalpo_plugins.swift.autoload"),
    ("swift.cli._megatron.rlhf", "run", "focalpo_plugins.swift.megatron"),
    ("swift.megatron.arguments.rlhf_args", "imported", "focalpo_plugins.swift.megatron"),
    # These start the processes of a run.
    ("axolotl.cli.main", "imported", "focalpo_plugins.guards.last_line"),
    ("llamafactory.launcher", "imported", "focalpo_plugins.guards.last_line"),
    ("accelerate.commands.launch", "imported", "focalpo_plugins.guards.last_line"),
    ("deepspeed.launcher.runner", "imported", "focalpo_plugins.guards.last_line"),
    ("torch.distributed.run", "imported", "focalpo_plugins.guards.last_line"),
)


def autoload() -> None:
    """Wait for the modules of the hosts, and call the adapters of those that are there already."""
    try:
        if os.environ.get("FOCALPO_AUTOLOAD", "1") == "0":
            return
        waiting = {module for module, _, _ in HOSTS}
        sys.meta_path.insert(0, _Waiting(waiting))
        running = _running(sys._getframe())
        for name in list(waiting):
            if name == running:
                waiting.remove(name)
                _call_adapters(name, None)
            elif name in sys.modules and _acts_on_import(name):
                waiting.remove(name)
                _call_when_complete(name, sys.modules[name].__spec__)
    except Exception as error:
        _warn(error)


def command_of(namespace: dict[str, Any]) -> str | None:
    """The module of a host whose globals these are, if it runs as ``__main__``; else None."""
    if namespace.get("__name__") == "__main__":
        name = getattr(namespace.get("__spec__"), "name", None)
        path = f"{os.sep}{namespace.get('__file__')}"
        for module, _, _ in HOSTS:
            # A script that is run by its path has no name.
            if name == module or path.endswith(f"{os.sep}{module.replace('.', os.sep)}.py"):
                return module
    return None


def may_ask(words: Iterable[Any]) -> bool:
    """Whether the words of a YAML or of a command line may ask for a loss that isn't the host's.

    Our other modules are imported only then: a broken one must not stop a run that doesn't use our
    losses.
    """
    from importlib.metadata import entry_points

    named = any("focal" in str(word).lower() for word in words)
    return named or bool(entry_points(group="focalpo_plugins"))


def _running(frame: FrameType | None) -> str | None:
    """The host's command that imports torch; None if none does.

    A profiler or debugger runs a command within a ``__main__`` of its own, so all frames count.
    """
    command = None
    while frame is not None and command is None:
        command, frame = command_of(frame.f_globals), frame.f_back
    return command


def _acts_on_import(name: str) -> bool:
    return any(module == name and when == "imported" for module, when, _ in HOSTS)


class _Waiting:
    """An import finder that finds nothing itself and notices the imports of some modules."""

    def __init__(self, modules: set[str]) -> None:
        self.modules = modules

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in self.modules:
            return None
        try:
            if _runpy_asks(sys._getframe(1)):
                self.modules.remove(name)
                _call_adapters(name, None)
            elif _acts_on_import(name):
                from importlib.util import find_spec

                self.modules.remove(name)
                spec = find_spec(name)
                if spec is not None:
                    _call_when_complete(name, spec)
                return spec
        except Exception as error:
            _warn(error)
        return None


def _runpy_asks(frame: FrameType | None) -> bool:
    """Whether runpy looks for a module, which it then runs; an import statement only loads one."""
    while frame is not None and _name(frame).startswith(("importlib.", "_frozen_importlib")):
        frame = frame.f_back
    return frame is not None and _name(frame) == "runpy"


def _name(frame: FrameType) -> str:
    """The module that a frame runs in, by its own name if it runs as ``__main__``."""
    spec = frame.f_globals.get("__spec__")
    return str(getattr(spec, "name", None) or frame.f_globals.get("__name__"))


class _Watched(ModuleSpec):
    """Python sets ``_initializing`` of a module's spec to False after the module's last line."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_initializing" and not value:
            self.__class__ = ModuleSpec  # type: ignore[assignment]
            if self.name in sys.modules:  # else the module failed
                _call_adapters(self.name, sys.modules[self.name])


def _call_when_complete(name: str, spec: ModuleSpec | None) -> None:
    # A module that was not found yet has no such attribute.
    complete = name in sys.modules and not getattr(spec, "_initializing", False)
    if spec is None or complete:
        _call_adapters(name, sys.modules.get(name))
    else:
        spec.__class__ = _Watched


def _call_adapters(name: str, module: ModuleType | None) -> None:
    """Call ``patch(module)`` of each adapter; the module is None if it is about to run."""
    for awaited, _, adapter in HOSTS:
        if awaited == name:
            try:
                from importlib import import_module

                import_module(adapter).patch(module)
            except Exception as error:
                _warn(error)


def _warn(error: Exception) -> None:
    import contextlib
    import warnings

    with contextlib.suppress(Warning):  # which `python -W error` raises
        warnings.warn(
            f"focalpo_plugins: autoload failed ({type(error).__name__}: {error}) and is off; its "
            "losses now need the host's plugin line or the command of focalpo_plugins",
            stacklevel=2,
        )
