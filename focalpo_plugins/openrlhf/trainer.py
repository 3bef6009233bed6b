"""OpenRLHF's DPO trainer with another pairwise loss; the only change to it is the loss, and where
the reference's log-probabilities come from if they are precomputed.

``DPOTrainer.__init__`` constructs ``DPOLoss``, a name of its module, which for the length of that
call stands for our loss.  What it constructed is looked at, and so is at every step that our loss
was called: an OpenRLHF that moves its loss must never train DPO under another loss's name.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FunctionType
from typing import Any

from openrlhf.trainer import dpo_trainer
from openrlhf.trainer.dpo_trainer import DPOTrainer
from torch import Tensor

from ..diagnostics import margin_sums, means
from ..registry import BoundLoss
from .flags import given_options
from .loss import FocalPOLoss
from .reference import ReferenceLogps, precompute


def versions() -> str:
    """``focalpo_plugins 0.1.0 with openrlhf 0.11.2``."""
    return f"focalpo_plugins {version('focalpo_plugins')} with openrlhf {version('openrlhf')}"


def install(loss: BoundLoss) -> None:
    """Have OpenRLHF's command, whose arguments have just been parsed, construct our trainer.

    Raises:
        RuntimeError: the installed OpenRLHF constructs its trainer or its loss elsewhere.
    """
    command = vars(sys.modules["__main__"])
    train = command.get("train")
    if not (
        isinstance(train, FunctionType)
        and train.__globals__ is command
        and "DPOTrainer" in train.__code__.co_names
    ):
        raise _moved(loss, "its command's train() constructs no DPOTrainer")
    if command.get("DPOTrainer") is not DPOTrainer:
        raise _moved(loss, f"its command's DPOTrainer is not that of {dpo_trainer.__name__}")
    names = vars(DPOTrainer)["__init__"].__code__.co_names
    if "DPOLoss" not in names or not hasattr(dpo_trainer, "DPOLoss"):
        raise _moved(loss, "DPOTrainer.__init__ constructs no DPOLoss")
    command["DPOTrainer"] = PairwiseDPOTrainer


class PairwiseDPOTrainer(DPOTrainer):
    """``DPOTrainer`` with the loss that ``strategy.args.loss`` names, and its diagnostics.

    Raises:
        RuntimeError: OpenRLHF constructed its own loss, or trains a step without calling ours.
    """

    def __init__(
        self, model: Any, ref_model: Any, strategy: Any, *args: Any, **kwargs: Any
    ) -> None:
        name = strategy.args.loss
        options, flags = given_options(strategy.args)
        self._reference: ReferenceLogps | None = None
        with _dpo_loss_replaced(functools.partial(FocalPOLoss, loss=name, **options)):
            super().__init__(model, ref_model, strategy, *args, **kwargs)
        loss_fn = getattr(self, "loss_fn", None)
        if not isinstance(loss_fn, FocalPOLoss):
            raise _moved(name, f"its loss_fn is {type(loss_fn).__name__}")
        self._loss = loss_fn.pairwise_loss
        self._mode = "train"
        self._step_sums: Tensor | None = None
        self._sums: dict[str, Tensor] = {}
        loss_fn.record = self._record
        self.strategy = _ReducingDiagnostics(strategy, self._diagnostics)
        if strategy.is_rank_0():
            packages = ("focalpo_plugins", "openrlhf", "deepspeed", "torch")
            print(
                f"focalpo_plugins: active. {self._loss.describe()} beta={loss_fn.beta} "
                f"label_smoothing={loss_fn.label_smoothing} trainer={type(self).__name__} "
                + " ".join(f"{package}={version(package)}" for package in packages),
                file=sys.stderr,
                flush=True,
            )
        if flags.get("precompute_ref"):
            folder, flag = Path(flags["precompute_dir"]), f"--{name}.precompute_dir"
            self._reference = precompute(self, strategy, folder, flag)

    def concatenated_forward(self, model: Any, *batch: Any) -> Any:
        if self._reference is None or model is not self.ref_model:
            return super().concatenated_forward(model, *batch)
        return *self._reference(*batch), None, None

    def save_logs_and_checkpoints(
        self, args: Any, global_step: int, *more: Any, **kwargs: Any
    ) -> None:
        super().save_logs_and_checkpoints(args, global_step, *more, **kwargs)
        if global_step % args.logger.logging_steps == 0:
            self._sums.pop("train", None)

    def evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._mode = "eval"
        try:
            super().evaluate(*args, **kwargs)
        finally:
            self._mode = "train"
            self._sums.pop("eval", None)

    def _record(self, margins: Tensor) -> None:
        sums = margin_sums(margins, self._loss)
        self._step_sums = sums if self._step_sums is None else self._step_sums + sums

    def _diagnostics(self, reduce: Callable[[Tensor, str], Tensor]) -> dict[str, float]:
        """Diagnostics of the pairs of all ranks since the last log, or of one evaluation."""
        if self._step_sums is None:
            raise _moved(self._loss, "a step was trained that did not call loss_fn")
        sums, self._step_sums = reduce(self._step_sums, "sum"), None
        before = self._sums.get(self._mode)
        self._sums[self._mode] = sums if before is None else before + sums
        return means(self._sums[self._mode], self._loss)


class _ReducingDiagnostics:
    """OpenRLHF's strategy; the numbers that the trainer has reduced over the ranks are what it
    shows and logs, so that is where ours join them."""

    def __init__(self, strategy: Any, diagnostics: Callable[..., dict[str, float]]) -> None:
        self._strategy = strategy
        self._diagnostics = diagnostics

    def all_reduce(self, data: Any, op: str = "mean") -> Any:
        reduced = self._strategy.all_reduce(data, op)
        if isinstance(data, dict):
            reduced.update(self._diagnostics(self._strategy.all_reduce))
        return reduced

    def __getattr__(self, name: str) -> Any:
        return getattr(self._strategy, name)


@contextmanager
def _dpo_loss_replaced(replacement: Callable[..., FocalPOLoss]) -> Iterator[None]:
    original = dpo_trainer.DPOLoss
    dpo_trainer.DPOLoss = replacement
    try:
        yield
    finally:
        dpo_trainer.DPOLoss = original


def _moved(loss: BoundLoss | str, why: str) -> RuntimeError:
    name = loss if isinstance(loss, str) else loss.name
    return RuntimeError(
        f"{versions()}: {why}, unlike in the releases that are known; this run would have trained "
        f"another loss under the name {name}. Use an openrlhf release that the README lists."
    )
