"""Axolotl plugins for the tests: they reach its child processes through the YAML."""

from axolotl.integrations.base import BasePlugin


class GlooOnCPU(BasePlugin):
    """Lets accelerate start a process group without a GPU, for DeepSpeed on CPU ranks."""

    def register(self, cfg):
        from accelerate.state import PartialState
        from accelerate.utils import DistributedType

        host_prepare = PartialState._prepare_backend

        def prepare(self, *args, **kwargs):
            backend, kind = host_prepare(self, *args, **kwargs)
            return (
                ("gloo", DistributedType.MULTI_XPU)
                if kind == DistributedType.NO
                else (backend, kind)
            )

        PartialState._prepare_backend = prepare


class OtherTrainer(BasePlugin):
    """A plugin that brings a trainer of its own."""

    def get_trainer_cls(self, cfg):
        from trl import DPOTrainer

        return DPOTrainer
