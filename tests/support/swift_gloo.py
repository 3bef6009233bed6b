"""For `--external_plugins`: lets accelerate start a process group without a GPU, for DeepSpeed."""

from accelerate.state import PartialState
from accelerate.utils import DistributedType

of_accelerate = PartialState._prepare_backend


def prepare(self, *args, **kwargs):
    backend, kind = of_accelerate(self, *args, **kwargs)
    return ("gloo", DistributedType.MULTI_XPU) if kind == DistributedType.NO else (backend, kind)


PartialState._prepare_backend = prepare
