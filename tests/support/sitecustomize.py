"""For Axolotl 0.16 in processes without CUDA: it asks for the device's capability and expects a
RuntimeError, where torch 2.13 raises an AssertionError."""

import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec


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
