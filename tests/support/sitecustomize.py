"""In every process of a host's that the tests start.

Half of the time of most is what they import, a sixth of which the garbage collector takes, and finds
nothing.  Axolotl before 0.21 collects garbage after every micro-batch, half a second each time in all
that was imported; the first time sets that aside.  Axolotl 0.16 asks for CUDA's capability and expects
a RuntimeError where there is none; torch 2.13 raises an AssertionError.  And TRL imports trackio to
write a model card, whether it tracks the run or not, which is half of what a short run computes: here
it finds that no run is tracked.  DeepSpeed asks py-cpuinfo four times what the processor can do, which
takes it a second each: here it finds what Linux says.
"""

import gc
import platform
import sys
from contextvars import ContextVar
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace


def tracks_nothing():
    trackio = ModuleType("trackio")
    trackio.__spec__ = ModuleSpec("trackio", None)
    trackio.context_vars = SimpleNamespace(current_run=ContextVar("current_run", default=None))
    return trackio


def cpuinfo():
    with open("/proc/cpuinfo") as file:
        said = dict(map(str.strip, line.split(":", 1)) for line in file if ":" in line)
    found = {"arch": "X86_64", "vendor_id_raw": said["vendor_id"], "flags": said["flags"].split()}
    module = ModuleType("cpuinfo")
    module.__spec__ = ModuleSpec("cpuinfo", None)
    module.get_cpu_info = lambda: found
    return module


class Finder(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "torch.cuda":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            of_torch = module.get_device_capability

            def get_device_capability(device=None):
                try:
                    return of_torch(device)
                except AssertionError as error:
                    raise RuntimeError(str(error)) from None

            module.get_device_capability = get_device_capability

        spec.loader.exec_module = exec_module
        return spec


def collect(generation=2, of_python=gc.collect):
    if not gc.get_freeze_count():
        gc.freeze()
    return of_python(generation)


gc.set_threshold(100_000, 20, 20)
gc.collect = collect
sys.meta_path.insert(0, Finder())
if find_spec("trackio"):
    sys.modules["trackio"] = tracks_nothing()
if find_spec("cpuinfo") and (platform.system(), platform.machine()) == ("Linux", "x86_64"):
    sys.modules["cpuinfo"] = cpuinfo()
