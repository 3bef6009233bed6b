"""In every process of a host's that the tests start: what the machine without a GPU lacks, and what
takes seconds of each process without being what is tested.

Axolotl 0.16 asks for CUDA's capability and expects a RuntimeError if there is none; torch 2.13 raises
an AssertionError.  DeepSpeed asks py-cpuinfo four times what the processor can do, a second each time;
here it finds what Linux says.
"""

import platform
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


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


sys.meta_path.insert(0, Finder())
if find_spec("cpuinfo") and (platform.system(), platform.machine()) == ("Linux", "x86_64"):
    sys.modules["cpuinfo"] = cpuinfo()
