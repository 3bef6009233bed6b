"""Entry point of the group ``torch.backends``: ``import torch`` calls :func:`autoload`.

This module is outside the package and imports only the standard library, so that a broken package
can't break ``import torch``.  In a process that runs no host, :func:`autoload` looks at the command
line and returns.  In a host's process, it waits for a module of the host and then calls our adapter
for that host.  It never raises, and ``FOCALPO_AUTOLOAD=0`` turns it off.
"""

import atexit
import os
import sys

# The adapter replaces a function of this module; the other modules only have to be imported.
_PATCHED = "axolotl.utils.config"
# The host's command or package of commands, the host's module to wait for, and our adapter.
_HOSTS = (
    ("axolotl.cli", _PATCHED, "focalpo_plugins.axolotl.autoload"),
    ("axolotl.cli", "axolotl.cli.utils", "focalpo_plugins.axolotl.flags"),
    # The CPU mode has to be active before OpenRLHF imports anything.
    ("openrlhf.cli.train_dpo", "openrlhf", "focalpo_plugins.openrlhf.autoload"),
)
# The variable that names the file to which a process writes why it failed.
_LAST_LINE = "FOCALPO_LAST_LINE"
# Commands whose names are not the names of modules.
_SCRIPTS = {"axolotl": "axolotl.cli"}


def autoload():
    """Prepare the adapter of the host that this process runs, if it runs one."""
    try:
        if os.environ.get("FOCALPO_AUTOLOAD", "1") == "0":
            return
        commands = _commands()
        armed = False
        for host, awaited, adapter in _HOSTS:
            if any(f"{command}.".startswith(f"{host}.") for command in commands):
                _when_imported(awaited, adapter)
                armed = True
        if armed:
            _show_last_line()
    except Exception as error:
        _warn(error)


def _commands():
    """The modules that the command line names, by name or by file.

    A profiler, debugger or launcher is a command itself, and the host's command follows it, so each
    word counts.  A word for a host that this process doesn't import costs nothing.
    """
    found = []
    script = sys.argv[0] if sys.argv else ""
    for number, word in enumerate(map(str, [script, *sys.orig_argv[1:]])):
        if "axolotl" not in word and "openrlhf" not in word:
            if number or not word.endswith(".py"):
                continue
            word = os.path.abspath(word)
        name = word.replace(os.sep, "/")
        last = name.rpartition("/")[2].removesuffix(".exe").removesuffix("-script.py")
        if last in _SCRIPTS and (number == 0 or os.path.isfile(word)):
            found.append(_SCRIPTS[last])
        elif name.endswith(".py"):
            found.append(".".join(name.removesuffix(".py").split("/")[-3:]))
        else:  # -m axolotl.cli.train, -maxolotl.cli.train, --module=axolotl.cli.train
            found.append(name.rpartition("=")[2].removeprefix("-m"))
    return found


def _show_last_line():
    """Have the outermost process of a run print, as its last line, why the run failed.

    The processes that it starts inherit the variable, and so does a command that replaces this one.
    """
    process = str(os.getpid())
    name = os.environ.get(_LAST_LINE, "")
    parts = name.split("-")
    digits = set("0123456789abcdef")
    # Any other value could name any file, which would be read and removed.
    if not (
        len(parts) == 3
        and parts[0] == "focalpo_plugins"
        and all(part and set(part) <= digits for part in parts[1:])
    ):
        name = os.environ[_LAST_LINE] = f"focalpo_plugins-{process}-{os.urandom(8).hex()}"
    elif parts[1] != process:
        return

    def show():
        import contextlib
        from tempfile import gettempdir

        with contextlib.suppress(Exception):  # at its end, a process has nobody who would catch it
            path = os.path.join(gettempdir(), name)
            if str(os.getpid()) != process or not os.path.isfile(path):  # a fork, or no failure
                return
            with open(path, encoding="utf-8", errors="replace") as file:
                print(f"focalpo_plugins: {file.read()}", file=sys.stderr)
            os.remove(path)

    atexit.register(show)


def _when_imported(awaited, adapter):
    """Call ``adapter.patch(module)`` as soon as the module ``awaited`` has been executed."""
    module = sys.modules.get(awaited)
    if module is None:
        sys.meta_path.insert(0, _Awaiting(awaited, adapter))
    elif awaited == _PATCHED and getattr(module.__spec__, "_initializing", False):
        raise RuntimeError(f"{awaited} imported torch itself, before it was complete")
    else:
        _patch(adapter, module)


class _Awaiting:
    """An import finder that changes nothing, and only notices the import of one module."""

    def __init__(self, awaited, adapter):
        self.awaited = awaited
        self.adapter = adapter

    def find_spec(self, name, path=None, target=None):
        if name != self.awaited:
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is None:  # a folder without code
            _patch(self.adapter, None)
        elif spec is not None:
            exec_module = spec.loader.exec_module

            def exec_then_patch(module):
                exec_module(module)
                _patch(self.adapter, module)

            spec.loader.exec_module = exec_then_patch
        return spec


def _patch(adapter, module):
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
