"""The CPU mode: replaces OpenRLHF's calls to CUDA on a machine without CUDA.

OpenRLHF is written for CUDA, but only a handful of calls keep its DPO command from running on a
CPU.  With these replaced, users can try a command line, a data set and a chat template before they
rent GPUs.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

from ..errors import InvalidValue

#: Whether this process runs in CPU mode.
active = False


def stand_in() -> None:
    """Replace OpenRLHF's calls to CUDA by ones that work on a CPU, and warn about it.

    Does nothing if CUDA is available or ``DS_ACCELERATOR`` names another accelerator.  Call it
    after torch is imported and before OpenRLHF is.
    """
    global active
    import torch

    if active or torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR", "cpu") != "cpu":
        return
    active = True
    os.environ["DS_ACCELERATOR"] = "cpu"
    _modules_of_flash_attn()
    _device_mesh()
    torch.cuda.set_device = lambda device: None
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda device=None: None
    if os.environ.get("RANK", "0") == "0":
        warnings.warn(
            "focalpo_plugins: CPU mode. No CUDA was found, so OpenRLHF runs on the CPU. This is "
            "meant for trying a command on a small model. DeepSpeed compiles its operators the "
            "first time, which takes about a minute.",
            stacklevel=2,
        )


def check(namespace: SimpleNamespace | Any) -> None:
    """Refuse the flags that need CUDA.

    Args:
        namespace: the parsed command line, by the flags' names.

    Raises:
        ValueError: in CPU mode, a flag can't work on a CPU.
    """
    if not active:
        return
    from .names import installed_flag

    values = vars(namespace)
    for name, what in (("ds.packing_samples", "flash-attn"), ("ds.use_liger_kernel", "Triton")):
        flag = installed_flag(name, values)
        if values.get(flag):
            raise InvalidValue(
                f"--{flag} must be left out without CUDA, got it on a CPU: it needs the compiled "
                f"kernels of {what}. Remove it, or run on a CUDA machine."
            )
    flag = installed_flag("ds.attn_implementation", values)
    attention = values.get(flag, "eager")
    if "flash" in attention:
        raise InvalidValue(
            f"--{flag} must be eager or sdpa without CUDA, got {attention!r} on a CPU: it needs "
            f"the compiled flash-attn. Give --{flag} eager, or run on a CUDA machine."
        )


def _modules_of_flash_attn() -> None:
    """Replace flash-attn's kernels: OpenRLHF always imports flash-attn, which imports them."""
    if importlib.util.find_spec("flash_attn_2_cuda") is None:
        empty = ModuleType("flash_attn_2_cuda")
        empty.__spec__ = ModuleSpec(empty.__name__, None)
        sys.modules[empty.__name__] = empty
    # A Triton kernel; a CUDA build of torch brings Triton along.  None makes its import fail, and
    # OpenRLHF then computes the log-probabilities with torch.
    sys.modules["flash_attn.ops.triton.cross_entropy"] = None  # type: ignore[assignment]


def _device_mesh() -> None:
    from torch.distributed import device_mesh

    init_device_mesh = device_mesh.init_device_mesh

    def on_cpu(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return init_device_mesh("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    device_mesh.init_device_mesh = on_cpu
