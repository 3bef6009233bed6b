"""Axolotl plugins for the tests: they reach its child processes through the YAML."""

import gc
import json
import os
from pathlib import Path
from weakref import WeakSet

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


class FSDPOnCPU(GlooOnCPU):
    """The same for FSDP, whose ranks Axolotl takes for GPUs."""

    def register(self, cfg):
        from accelerate import ParallelismConfig

        super().register(cfg)
        host_build = ParallelismConfig.build_device_mesh
        ParallelismConfig.build_device_mesh = lambda self, kind: host_build(self, "cpu")


class OtherTrainer(BasePlugin):
    """A plugin with its own trainer."""

    def get_trainer_cls(self, cfg):
        from trl import DPOTrainer

        return DPOTrainer


class WhatIsTrained(BasePlugin):
    """Writes what the trainer got into the model's folder, and a batch of the first rows of both
    sets, as its collator makes it."""

    def post_trainer_create(self, cfg, trainer):
        if os.environ.get("RANK", "0") != "0":
            return
        args, state = trainer.args, trainer.accelerator.state
        zero = state.deepspeed_plugin
        seen = {
            "trainer": type(trainer).__name__,
            "ranks": state.num_processes,
            "zero_stage": zero and zero.zero_stage,
            "learning_rate": args.learning_rate,
            "scheduler": args.lr_scheduler_type,
            "warmup": getattr(args, "warmup_ratio", None) or args.warmup_steps,
            "max_length": args.max_length,
            "beta": args.beta,
            "simpo_gamma": getattr(args, "simpo_gamma", None),
            "cpo_alpha": getattr(args, "cpo_alpha", None),
        }
        for name in ("train", "eval"):
            rows = getattr(trainer, f"{name}_dataset")
            batch = trainer.data_collator([rows[i] for i in range(2)])
            seen[name] = {
                key: value.tolist() for key, value in batch.items() if hasattr(value, "tolist")
            }
        folder = Path(cfg.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "seen.json").write_text(json.dumps(seen))


class Batches(BasePlugin):
    """Writes each rank's batches into the model's folder, as lists of pairs: the token ids of the
    chosen and the rejected sequence."""

    def post_trainer_create(self, cfg, trainer):
        host_step, rank = trainer.training_step, os.environ.get("RANK", "0")
        folder = Path(cfg.output_dir)
        folder.mkdir(parents=True, exist_ok=True)

        def step(model, inputs, *args, **kwargs):
            ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
            sequences = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
            half = len(sequences) // 2
            pairs = list(zip(sequences[:half], sequences[half:], strict=True))
            with (folder / f"batches{rank}.jsonl").open("a") as file:
                file.write(json.dumps(pairs) + "\n")
            return host_step(model, inputs, *args, **kwargs)

        trainer.training_step = step


class Forwards(BasePlugin):
    """For every step, writes into the model's folder how often a backbone ran forward, and how many
    backbones exist, wherever they are held."""

    def register(self, cfg):
        from transformers import LlamaModel

        self.alive = WeakSet()

        def new(of, *args, **kwargs):
            model = object.__new__(of)
            self.alive.add(model)
            return model

        LlamaModel.__new__ = new  # which copies are also made by

    def post_trainer_create(self, cfg, trainer):
        import torch
        from transformers import LlamaModel, TrainerCallback

        alive = self.alive
        seen = {"forwards": [], "backbones": [], "reference": trainer.ref_model is not None}
        ran = []
        torch.nn.modules.module.register_module_forward_pre_hook(
            lambda module, given: ran.append(1) if isinstance(module, LlamaModel) else None
        )

        class Count(TrainerCallback):
            def on_step_begin(self, *args, **kwargs):
                gc.collect()
                seen["backbones"].append(len(alive))
                ran.clear()

            def on_step_end(self, *args, **kwargs):
                seen["forwards"].append(len(ran))

            def on_train_end(self, *args, **kwargs):
                (Path(cfg.output_dir) / "forwards.json").write_text(json.dumps(seen))

        trainer.add_callback(Count())


class Garbage(BasePlugin):
    """Writes into the model's folder how many objects a garbage collection looks at in each
    step."""

    def post_trainer_create(self, cfg, trainer):
        from transformers import TrainerCallback

        looked_at = []

        class Count(TrainerCallback):
            def on_step_end(self, *args, **kwargs):
                looked_at.append(len(gc.get_objects()))

            def on_train_end(self, *args, **kwargs):
                (Path(cfg.output_dir) / "garbage.json").write_text(json.dumps(looked_at))

        trainer.add_callback(Count())


class RayOnCPU(BasePlugin):
    """Removes Axolotl's demand for GPUs from its request to Ray."""

    def register(self, cfg):
        import ray.train

        scaling = ray.train.ScalingConfig
        ray.train.ScalingConfig = lambda **asked: scaling(**{**asked, "use_gpu": False})


class Killed(BasePlugin):
    """Silently ends the ranks that ``KILLED_RANKS`` names, in the step ``KILLED_AT``.

    It also seeds the adapter's weights, which Axolotl draws anew in each run.
    """

    def pre_lora_load(self, cfg, model):
        import torch

        torch.manual_seed(cfg.seed)

    def add_callbacks_post_trainer(self, cfg, trainer):
        import signal

        from transformers import TrainerCallback

        class Kill(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                ranks = os.environ.get("KILLED_RANKS", "").split(",")
                at = int(os.environ.get("KILLED_AT", "0"))
                if state.global_step + 1 == at and os.environ.get("RANK", "0") in ranks:
                    os.kill(os.getpid(), signal.SIGKILL)

        return [Kill()]
