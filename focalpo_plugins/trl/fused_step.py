"""A training step that never holds the logits of the batch, in a TRL trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from trl import DPOTrainer
from trl.models.utils import _ForwardRedirection, disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from ..balanced import Cost
from ..compute.fused_loss import IGNORED, FusedLoss, fused_logps, fused_pairwise_loss
from ..compute.output_layer import Head, check_config, check_logits
from ..guards.ranks import together
from ..hf_models import gathered
from ..hf_trainer import RANKS
from .parts import check_fused_parts, head_of
from .shared_step import SharedStepMixin

if TYPE_CHECKING:
    # The class of super() in the mixin's methods, by the order of the bases.
    from trl import DPOTrainer as _Host

    from ..run import Now, Run
else:
    _Host = object

# Tokens of the first sequence on which the output layer is compared with the model, once.
_TOKENS_COMPARED = 16


class FusedStepMixin(SharedStepMixin, _Host):
    """The fused path's part of :class:`~focalpo_plugins.trl.trainer.PairwiseLossMixin`."""

    _fused_key: str | None = None  # the key that asked for the fused path, for messages

    if TYPE_CHECKING:  # of PairwiseTrainerMixin

        def _count(self, margins: Tensor) -> None: ...
        def _now(self) -> Now: ...
        def _running(self) -> Run: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Ids of the models whose output layer has been checked to give their logits.
        self._compared: set[int] = set()
        super().__init__(*args, **kwargs)
        if self._fused:
            self._check_fused()

    @property
    def _fused(self) -> bool:
        return self._fused_key is not None

    # TRL reads this to decide on Liger's path, and never takes it, because ours replaces it.  The
    # argument of the same name still puts Liger's layers into the model.
    @property
    def use_liger_kernel(self) -> bool:
        return False

    @use_liger_kernel.setter
    def use_liger_kernel(self, asked: bool) -> None:
        pass

    def _cost(self) -> Cost:
        # TRL's own path, from 1.14 on, computes the logits of the padded batch on a CPU only.
        on_cpu = self.accelerator.device.type == "cpu"
        answers_only = self._fused or not (hasattr(DPOTrainer, "_compute_loss_liger") or on_cpu)
        return "unpadded" if answers_only and self._sharing is not None else super()._cost()

    def _fused_step(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """The loss of a batch by the fused path, with the metrics that TRL logs on Liger's path."""
        ref_logps = None
        if self.precompute_ref_logps:
            ref_logps = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        elif self.ref_model is not None:
            ref_logps = self._inside(self.ref_model, self._fused_logps, inputs)
        result, ref_logps = self._inside(model, self._fused_loss, inputs, ref_logps)

        mode = "train" if self._now().training else "eval"
        metrics = self._metrics[mode]
        # As TRL's plain path does; gather_for_metrics would drop rows that are trained.
        gather = self.accelerator.gather
        if mode == "train":
            tokens = gather(inputs["attention_mask"].sum()).sum().item()
            self._total_train_tokens += tokens // getattr(self, "_tp_size", 1)
        metrics["num_tokens"] = [self._total_train_tokens]
        rewards = self.beta * (result.logps - ref_logps)
        counts = inputs["completion_mask"][:, 1:].sum(1)
        sides = zip(
            ("chosen", "rejected"),
            *(values.chunk(2) for values in (rewards, result.logps, result.mean_logits, counts)),
            strict=True,
        )
        for side, reward, logps, mean_logits, count in sides:
            metrics[f"rewards/{side}"].append(gather(reward).mean().item())
            metrics[f"logps/{side}"].append(gather(logps).mean().item())
            total, answers = gather(mean_logits).sum(), gather(count).sum()
            metrics[f"logits/{side}"].append((total / answers.clamp_min(1)).item())
        chosen, rejected = rewards.chunk(2)
        margins = gather(chosen - rejected)
        metrics["rewards/margins"].append(margins.mean().item())
        metrics["rewards/accuracies"].append((margins > 0).float().mean().item())
        self._count(chosen - rejected)
        loss: Tensor = result.loss
        return loss

    def _inside(self, wrapper: Any, method: Callable[..., Any], inputs: Any, *more: Any) -> Any:
        """Call ``method(model, inputs, ...)`` in place of the forward of the model in ``wrapper``.

        So DDP, DeepSpeed and FSDP do around this call what they do around a forward pass.
        """
        model = self.accelerator.unwrap_model(wrapper)
        return _ForwardRedirection()(
            wrapper,
            model,
            # The wrappers may cast what passes through them, and some need a tensor to pass.
            lambda ids: method(model, inputs, *more),
            inputs["input_ids"],
        )

    def _fused_loss(
        self, model: Any, inputs: Mapping[str, Tensor], ref_logps: Tensor | None
    ) -> tuple[FusedLoss, Tensor]:
        loss = self._running().loss
        if ref_logps is None:
            ref_logps = self._fused_logps(model, inputs)
        with self.accelerator.autocast():
            head, states, labels = self._states(model, inputs)
            with gathered(head.weight, head.bias):
                result = fused_pairwise_loss(
                    states,
                    head.weight,
                    labels,
                    ref_logps,
                    lambda margins: loss(margins, self.label_smoothing),
                    beta=self.beta,
                    bias=head.bias,
                )
        return result, ref_logps

    def _fused_logps(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """The reference's log-probs ``(2B,)``, computed by ``model``.

        If there is no reference model, its adapters are off, or its adapter "ref" is on.
        """
        adapter: AbstractContextManager[Any]
        if self.ref_model is None and is_peft_model(model):
            adapter = use_adapter(model, "ref" if "ref" in model.peft_config else None)
        else:
            adapter = nullcontext()
        with torch.no_grad(), self._without_checkpointing(), adapter, self.accelerator.autocast():
            head, states, labels = self._states(model, inputs)
            with gathered(head.weight, head.bias):
                return fused_logps(states, head.weight, labels, bias=head.bias)

    def _states(self, model: Any, inputs: Mapping[str, Tensor]) -> tuple[Head, Tensor, Tensor]:
        """The output layer, the last hidden states, and the label of each."""
        key = str(self._fused_key)
        head = head_of(model, key)
        ids, completion = inputs["input_ids"], inputs["completion_mask"]
        if id(head.model) not in self._compared:
            check_config(head.model.config, key)
            few = ids[0][inputs["attention_mask"][0].bool()][:_TOKENS_COMPARED]
            with torch.no_grad(), self._without_checkpointing():
                together(RANKS, lambda: check_logits(head, few, key, gathered))
            self._compared.add(id(head.model))
        others = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
        arguments = {key: value for key, value in inputs.items() if key not in others}
        states = head.backbone(**arguments, use_cache=False).last_hidden_state
        labels = torch.full_like(ids, IGNORED)
        labels[:, :-1] = torch.where(completion[:, 1:].bool(), ids[:, 1:], IGNORED)
        return head, states, labels

    def _without_checkpointing(self) -> Any:
        model: Any = self.model
        options: Any = self.args.gradient_checkpointing_kwargs
        return disable_gradient_checkpointing(model, options)

    def compute_ref_log_probs(self, *args: Any) -> Any:
        # TRL 0.29 has no model among the arguments.
        with self._prompts_shared(len(args[-1]["input_ids"]) // 2):
            if not self._fused:
                return super().compute_ref_log_probs(*args)
            model = args[0] if len(args) > 1 else self.ref_model or self.model
            return self._inside(model, self._fused_logps, args[-1]).chunk(2)

    def _check_fused(self) -> None:
        """Raise ``ValueError`` for what only the built trainer knows for certain."""
        built = {
            "model": self.accelerator.unwrap_model(self.model),
            "processing_class": self.processing_class,
            "compute_metrics": self.compute_metrics,
        }
        check_fused_parts(built, self.args, str(self._fused_key))
