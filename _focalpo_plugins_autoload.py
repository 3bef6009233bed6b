"""Entry point of the group ``torch.backends``: ``import torch`` calls :func:`autoload`.

This module is outside the package and imports only the standard library, so that a broken package
can't break ``import torch``.  :func:`autoload` puts one import finder before all others.  It waits
for the modules of :data:`HOSTS`; every other import costs it one look into a set.  When such a
module comes, the finder calls our adapter for it.  Nothing here raises, and ``FOCALPO_AUTOLOAD=0``
turns it off.
"""

import os
import sys
from importlib.machinery import ModuleSpec

# A module of a host, when our adapter is called, and the adapter.
# "imported": after the module's last line; if the module is run as the command, before its first.
# "run": only if the module is run as the command, before its first line.
HOSTS = (
    ("axolotl.utils.config", "imported", "focalpo_plugins.axolotl.autoload"),
    ("axolotl.cli.main", "imported", "focalpo_plugins.axolotl.flags"),
    # The adapter replaces calls to CUDA: a process that only imports OpenRLHF keeps its own.
    ("openrlhf.cli.train_dpo", "run", "focalpo_plugins.openrlhf.autoload"),
    # These start the processes of a run.
    ("axolotl.cli.main", "imported", "focalpo_plugins.guards.last_line"),
    ("accelerate.commands.launch", "imported", "focalpo_plugins.guards.last_line"),
    ("deepspeed.launcher.runner", "imported", "focalpo_plugins.guards.last_line"),
    ("torch.distributed.run", "imported", "focalpo_plugins.guards.last_line"),
)


def autoload():
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
                _call_when_complete(sys.modules[name].__spec__)
    except Exception as error:
        _warn(error)


def command_of(namespace):
    """The module of a host whose globals these are, if it runs as ``__main__``; else None."""
    if namespace.get("__name__") == "__main__":
        name = getattr(namespace.get("__spec__"), "name", None)
        path = os.path.abspath(str(namespace.get("__file__")))
        for module, _, _ in HOSTS:
            # A script that is run by its path has no name.
            if name == module or path.endswith(f"{os.sep}{module.replace('.', os.sep)}.py"):
                return module
    return None


def _running(frame):
    """The host's command that imports torch; None if none does.

    A profiler or debugger runs a command within a ``__main__`` of its own, so all frames count.
    """
    command = None
    while frame is not None and command is None:
        command, frame = command_of(frame.f_globals), frame.f_back
    return command


def _acts_on_import(name):
    return any(module == name and when == "imported" for module, when, _ in HOSTS)


class _Waiting:
    """An import finder that finds nothing itself and notices the imports of some modules."""

    def __init__(self, modules):
        self.modules = modules

    def find_spec(self, name, path=None, target=None):
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
                    _call_when_complete(spec)
                return spec
        except Exception as error:
            _warn(error)
        return None


def _runpy_asks(frame):
    """Whether runpy looks for a module, which it then runs; an import statement only loads one."""
    while str(frame.f_globals.get("__name__")).partition(".")[0] in ("importlib", "_frozen_importlib"):
        frame = frame.f_back
    of_frame = frame.f_globals
    return "runpy" in (of_frame.get("__name__"), getattr(of_frame.get("__spec__"), "name", None))


class _Watched(ModuleSpec):
    """Python sets ``_initializing`` of a module's spec to False after the module's last line."""

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "_initializing" and not value:
            self.__class__ = ModuleSpec
            if self.name in sys.modules:  # else the module failed
                _call_adapters(self.name, sys.modules[self.name])


def _call_when_complete(spec):
    # Of a module that is being imported for the first time, the attribute is not there yet.
    if spec.name in sys.modules and not getattr(spec, "_initializing", False):
        _call_adapters(spec.name, sys.modules[spec.name])
    else:
        spec.__class__ = _Watched


def _call_adapters(name, module):
    """Call ``patch(module)`` of each adapter; the module is None if it is about to run."""
    for awaited, _, adapter in HOSTS:
        if awaited == name:
            try:
                from importlib import import_module

                import_module(adapter).patch(module)
            except Exception as error:
                _warn(error)


def _warn(error):
    import contextlib
    import warnings

    with contextlib.suppress(Warning):  # which `python -W error` raises
        warnings.warn(
            f"focalpo_plugins: autoload failed ({type(error).__name__}: {error}) and does nothing; "
            "its losses now need the host's plugin line or our own command",
            stacklevel=2,
        )
