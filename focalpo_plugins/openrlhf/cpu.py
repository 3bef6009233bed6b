"""The CPU mode: what OpenRLHF asks of CUDA, where there is none.

OpenRLHF is written for CUDA, but for a handful of calls its DPO command runs whole on a CPU, which
is how a command line, a data set and a chat template are tried out before GPUs are rented.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

#: Whether this process runs in CPU mode.
active = False


def stand_in() -> None:
    """Put something that works on a CPU in the place of what OpenRLHF asks of CUDA, and say so.

    Does nothing where CUDA is available, or ``DS_ACCELERATOR`` names another accelerator.  To be
    called when torch is imported and OpenRLHF is not yet.
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
            "focalpo_plugins: CPU mode. No CUDA was found, so OpenRLHF runs on the CPU: meant for "
            "trying a command out on a small model.",
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
    from .names import spelled

    values = vars(namespace)
    for name, what in (("ds.packing_samples", "flash-attn"), ("ds.use_liger_kernel", "Triton")):
        flag = spelled(name, values)
        if values.get(flag):
            raise ValueError(
                f"--{flag} must be left out without CUDA, got it on a CPU: it needs the compiled "
                f"kernels of {what}. Remove it, or run on a CUDA machine."
            )
    flag = spelled("ds.attn_implementation", values)
    attention = values.get(flag, "eager")
    if "flash" in attention:
        raise ValueError(
            f"--{flag} must be eager or sdpa without CUDA, got {attention!r} on a CPU: it needs "
            f"the compiled flash-attn. Give --{flag} eager, or run on a CUDA machine."
        )


def _modules_of_flash_attn() -> None:
    """OpenRLHF imports flash-attn's Python part in any case, and that imports its kernels."""
    if importlib.util.find_spec("flash_attn_2_cuda") is None:
        empty = ModuleType("flash_attn_2_cuda")
        empty.__spec__ = ModuleSpec(empty.__name__, None)
        sys.modules[empty.__name__] = empty
    # A Triton kernel, which a CUDA build of torch brings along; None makes its import fail, and
    # OpenRLHF then computes the log-probabilities with torch.
    sys.modules["flash_attn.ops.triton.cross_entropy"] = None  # type: ignore[assignment]


def _device_mesh() -> None:
    from torch.distributed import device_mesh

    init_device_mesh = device_mesh.init_device_mesh

    def on_cpu(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return init_device_mesh("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    device_mesh.init_device_mesh = on_cpu
