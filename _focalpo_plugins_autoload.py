"""Entry point of the group ``torch.backends``: ``import torch`` calls :func:`autoload`.

It stands outside the package, and imports nothing but the standard library, so that a broken
package can't break ``import torch``.  In a process that is no host it looks at the command line
and returns; in a host's process it waits for one module of the host and then lets the host's
room do the rest.  It never raises, and ``FOCALPO_AUTOLOAD=0`` turns it off.
"""

import os
import sys

# The command's package or module, the host's module to wait for, and who is called with it.
_HOSTS = (
    ("axolotl", "axolotl.utils.config", "focalpo_plugins.axolotl.autoload"),
    # At once, as soon as there is a torch: the CPU mode has to be there before the host is.
    ("openrlhf.cli.train_dpo", "torch", "focalpo_plugins.openrlhf.autoload"),
)


def autoload():
    """Arm the room of the host that this process runs, if it is one."""
    try:
        if os.environ.get("FOCALPO_AUTOLOAD", "1") == "0":
            return
        command = _command()
        for host, awaited, room in _HOSTS:
            if command == host or command.startswith(host + "."):
                _when_imported(awaited, room)
    except Exception as error:
        _warn(error)


def _command():
    """The module or script that this process runs: ``axolotl.cli.train``, ``axolotl``."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None:
        return spec.name.removesuffix(".__main__")
    argv = sys.orig_argv
    if sys.argv[:1] == ["-m"] and "-m" in argv[:-1]:  # runpy is still importing the parents
        return argv[argv.index("-m") + 1]
    script = os.path.basename(sys.argv[0]) if sys.argv else ""
    return script.removesuffix(".exe").removesuffix("-script.py")


def _when_imported(awaited, room):
    """Call ``room.patch(module)`` as soon as the module ``awaited`` has been executed."""
    module = sys.modules.get(awaited)
    if awaited == "torch":  # calls us as the last thing that it does while it is imported
        _patch(room, module)
    elif module is None:
        sys.meta_path.insert(0, _Awaiting(awaited, room))
    elif getattr(module.__spec__, "_initializing", False):
        raise RuntimeError(f"{awaited} imported torch itself, before it was complete")
    else:
        _patch(room, module)


class _Awaiting:
    """A finder that finds nothing, and is there to see one module being imported."""

    def __init__(self, awaited, room):
        self.awaited = awaited
        self.room = room

    def find_spec(self, name, path=None, target=None):
        if name != self.awaited:
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None:
            exec_module = spec.loader.exec_module

            def exec_then_patch(module):
                exec_module(module)
                _patch(self.room, module)

            spec.loader.exec_module = exec_then_patch
        return spec


def _patch(room, module):
    try:
        from importlib import import_module

        import_module(room).patch(module)
    except Exception as error:
        _warn(error)


def _warn(error):
    import warnings

    warnings.warn(
        f"focalpo_plugins: autoload failed ({type(error).__name__}: {error}) and does nothing; its "
        "losses are reached through the host's plugin line or our own command alone",
        stacklevel=2,
    )
