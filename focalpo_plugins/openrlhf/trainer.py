"""OpenRLHF's DPO trainer with another pairwise loss.

Only the loss changes, and the source of the reference's log-probabilities if they are precomputed.

``DPOTrainer.__init__`` constructs ``DPOLoss``, a name of its module.  During that call the name
refers to our loss.  Afterwards we check the class of the loss, and at every step that it was
called: if an OpenRLHF release moves its loss, it must never train DPO under another loss's name.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from openrlhf.trainer import dpo_trainer
from openrlhf.trainer.dpo_trainer import DPOTrainer
from peft import PeftModel
from torch import Tensor

from ..backbone import SharedPrompts
from ..diagnostics import MARGINS, margin_sums, means
from ..errors import InvalidValue, RunError
from ..guards import pairs, texts
from ..guards.end import say_done
from ..guards.folders import check_folder, write_whole
from ..guards.margins import not_finite, stop
from ..guards.messages import say
from ..guards.resume import RECORD_FILE, check_unchanged, warn_of_another_length, warn_of_unknown
from ..guards.start import check_embeddings, check_first_margins
from ..registry import BoundLoss
from . import data
from .conversations import faults
from .loss import PairwiseDPOLoss
from .names import dotted, given_options, spelled, versions
from .reference import ReferenceLogps, on_all_ranks, on_rank_0, precompute

# OpenRLHF's values that go into the loss: attributes of its `model` arguments.
_IN_LOSS = ("beta", "label_smoothing", "aux_loss_coef", "nll_loss_coef")
# The key of a checkpoint's record whose value tells of the run, and is not compared.
_RUN = "run"


def install(loss: BoundLoss) -> None:
    """Make OpenRLHF's command, which has just parsed its arguments, construct our trainer.

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
        self._sharing: SharedPrompts | None = None
        construct = functools.partial(super().__init__, model, ref_model, strategy)
        with _dpo_loss_replaced(functools.partial(PairwiseDPOLoss, loss=name, **options)):
            # The first rank opens the logs here, which can fail.
            on_all_ranks(strategy, lambda: construct(*args, **kwargs))
        loss_fn = getattr(self, "loss_fn", None)
        if not isinstance(loss_fn, PairwiseDPOLoss):
            raise _moved(name, f"its loss_fn is {type(loss_fn).__name__}")
        on_rank_0(strategy, lambda: data.check_cells(strategy.args))
        allow, allowed = f"--{name}.allow_data", bool(flags.get("allow_data"))
        self._check_pairs(strategy.is_rank_0(), allow, allowed)
        self._check_ids()
        on_rank_0(strategy, lambda: self._check_texts(allow, allowed))
        self._loss = loss_fn.pairwise_loss
        self._mode = "train"
        self._called = False
        self._sums: dict[str, Tensor] = {}
        loss_fn.record, loss_fn.progress = self._record, self._progress
        self._moving: dict[str, float] = {}  # of the last batch
        # Counted here: once OpenRLHF resumes inside an epoch, the loader's length is what is left.
        accumulated = strategy.accumulated_gradient
        self._steps = self.epochs * len(self.train_dataloader) // accumulated
        self._losses: list[float] = []  # of the first step and the last, on the first rank
        self._log_before: str | None = None  # TensorBoard's folder of the run that is resumed
        self._accuracy: float | None = None  # of the last evaluation
        self._margins: list[Tensor] = []
        self._batches = self._to_evaluate = 0
        self._tokens = 0, 0  # of the policy's last batch: computed, and in the padded batch
        self._logged_batches = 0  # batches before the ones that the next log covers
        of_host = dotted(strategy.args)
        in_loss = {key: getattr(of_host.model, key) for key in _IN_LOSS}
        self._record_of_loss = self._loss.record(".", **in_loss)
        ckpt = of_host.ckpt
        if ckpt.load_enable and not flags.get("allow_changed"):
            allow = f"--{name}.allow_changed"
            on_rank_0(strategy, lambda: self._check_resumed(Path(ckpt.path), allow))
        reference = of_host.ref.model_name_or_path
        # If no reference is named, OpenRLHF's flag names the policy.
        same = reference in (None, of_host.model.model_name_or_path)
        self._starts_as_reference = same and not ckpt.load_enable
        _check_folders(self, strategy)
        if flags.get("shared_prompts"):
            key = f"--{name}.shared_prompts"
            self._sharing = SharedPrompts(key, functools.partial(on_all_ranks, strategy))
            on_all_ranks(strategy, lambda: self._attach(key))
        self.strategy = _ReducingDiagnostics(strategy, self._join_diagnostics)
        # Not around the strategy's save_ckpt, which first deletes the oldest of too many folders.
        engine = model.model
        engine.save_checkpoint = functools.partial(
            _save_with_record, strategy, self._record_now, engine.save_checkpoint
        )
        if strategy.is_rank_0():
            packages = ("focalpo_plugins", "openrlhf", "deepspeed", "torch")
            device = next(self.model.parameters()).device
            shared = "" if self._sharing is None else self._sharing.describe(device)
            say(
                f"active. {self._loss.describe()} beta={loss_fn.beta} "
                f"label_smoothing={loss_fn.label_smoothing} {shared}"
                f"trainer={type(self).__name__} "
                + " ".join(f"{package}={version(package)}" for package in packages)
            )
        if flags.get("precompute_ref"):
            folder, flag = Path(flags["precompute_dir"]), f"--{name}.precompute_dir"
            self._reference = precompute(self, strategy, folder, flag, self._sharing is not None)

    def _check_pairs(self, say: bool, allow: str, allowed: bool) -> None:
        """Refuse token ids that can't be learnt from; each rank checks the same rows."""

        def rows(dataset: Any) -> Iterator[tuple[int, list[int], list[int], list[int]]]:
            for row in pairs.places(len(dataset)):
                chosen, _, rejected, _, length = dataset[row]
                chosen, rejected = chosen.flatten().tolist(), rejected.flatten().tolist()
                yield row, chosen[:length], chosen[length:], rejected[length:]

        for evaluation, loader in enumerate((self.train_dataloader, self.eval_dataloader)):
            pairs.check(
                rows([] if loader is None else loader.dataset),
                self.tokenizer,
                key=f"--{spelled('data.max_len', vars(self.args))}",
                limit=dotted(self.args).data.max_len,
                allow=allow,
                allowed=allowed,
                say=say,
                evaluation=bool(evaluation),
            )

    def _check_ids(self) -> None:
        """Refuse a token for which a model has no embedding; each rank checks the same rows."""
        models = {"policy": self.model, "reference": self.ref_model}
        found = {name: _embeddings_of(actor) for name, actor in models.items()}
        known = {name: rows for name, rows in found.items() if rows is not None}
        tokens = len(self.tokenizer)
        if all(rows >= tokens for rows in known.values()):
            return  # without reading the data
        loaders = (self.train_dataloader, self.eval_dataloader)
        sets = [loader.dataset for loader in loaders if loader is not None]
        sides = (ids for rows in sets for row in pairs.places(len(rows)) for ids in rows[row][:4:2])
        largest = max((int(ids.max()) for ids in sides), default=0)
        warning = check_embeddings(known, tokens, largest)
        if warning and self.strategy.is_rank_0():
            say(warning)

    def _check_texts(self, allow: str, allowed: bool) -> None:
        """Refuse rows that would be trained otherwise than they are written; on the first rank."""
        for evaluation in (False, True):
            found = faults(self.args, self.tokenizer, evaluation, allow)
            texts.check(found, allowed=allowed, say=True, evaluation=evaluation)

    def fit(self, args: Any, consumed_samples: int = 0, *more: Any, **kwargs: Any) -> None:
        resumed = consumed_samples // dotted(args).train.batch_size
        self._batches = resumed * self.strategy.accumulated_gradient
        self._logged_batches = self._batches
        whole = not resumed or bool(self._losses)
        if resumed and self._log_before not in (None, self._log()):
            self._link_logs(resumed)
        super().fit(args, consumed_samples, *more, **kwargs)
        if self.strategy.is_rank_0():
            steps = self._batches // self.strategy.accumulated_gradient
            of_host = dotted(args)
            held_out = {} if self._accuracy is None else {"accuracy": self._accuracy}
            report = of_host.logger.tensorboard_dir
            say_done(
                steps,
                self._losses,
                held_out,
                of_host.ckpt.output_dir,
                report,
                since=0 if whole else resumed + 1,
                moved=self._moved(0 if whole else resumed, steps - 1),
            )

    def _moved(self, *steps: int) -> list[str]:
        """The moving options at these steps, the first of which is 0; none if nothing moves."""
        if not self._loss.moving():
            return []
        found = (self._loss.at(self._progress_at(step)).moving() for step in steps)
        return [", ".join(f"{name} {value:.4g}" for name, value in at.items()) for at in found]

    def _record_now(self) -> dict[str, Any]:
        """What a checkpoint records: its loss, and of its run what a resumed run can't know."""
        run = {"steps": self._steps, "losses": self._losses, "log": self._log()}
        return self._record_of_loss | {_RUN: run}

    def _log(self) -> str | None:
        """The name of TensorBoard's folder; None without it, and on other ranks than the first."""
        return None if self._tensorboard is None else Path(self._tensorboard.log_dir).name

    def _link_logs(self, resumed: int) -> None:
        """Name the log of the run that is resumed in this run's, for ``focalpo report``."""
        if self._tensorboard is not None:
            link = {"resumed": {"after": resumed, "log": self._log_before}}
            with suppress(OSError):  # a run is worth more than a part of a picture
                write_whole(Path(self._tensorboard.log_dir) / RECORD_FILE, json.dumps(link))

    def _check_resumed(self, folder: Path, allow: str) -> None:
        """Refuse a checkpoint that another loss trained; on the first rank."""
        latest = folder / "latest"
        if not latest.is_file():
            return
        checkpoint = folder / latest.read_text(encoding="utf-8").strip()
        path = checkpoint / RECORD_FILE
        recorded = _read_record(path) if path.is_file() else None
        run = {} if recorded is None else recorded.pop(_RUN, {})
        asked, of_host = self._record_of_loss, vars(self.args)
        written = {key: f"--{key}" for key in asked}
        written |= {key: f"--{spelled(f'model.{key}', of_host)}" for key in _IN_LOSS}
        check_unchanged(recorded, asked, str(checkpoint), allow, written, _IN_LOSS)
        if recorded is not None:
            warn_of_unknown(recorded, _IN_LOSS, str(checkpoint), written)
        moving = ", ".join(f"--{self._loss.name}.{option}" for option in self._loss.moving())
        if moving:
            warn_of_another_length(run.get("steps"), self._steps, moving)
        self._losses, self._log_before = run.get("losses", []), run.get("log")

    def _attach(self, key: str) -> None:
        assert self._sharing is not None
        for actor in (self.model, self.ref_model):
            model: Any = getattr(actor.model, "module", actor.model)
            if isinstance(model, PeftModel):
                model = model.base_model.model
            if getattr(model.config.get_text_config(), "output_router_logits", None) is not None:
                raise InvalidValue(
                    f"{key} can't be used with a mixture of experts, got {type(model).__name__}: "
                    "OpenRLHF asks for its routers' loss, which would be computed from a row "
                    f"instead of the padded batch. Remove {key}."
                )
            if hasattr(model.config, "vision_config"):
                raise InvalidValue(
                    f"{key} can't be used with a vision model, got {type(model).__name__}: images "
                    f"are no tokens of a pair. Remove {key}."
                )
            self._sharing.attach(model)

    def concatenated_forward(self, model: Any, *batch: Any) -> Any:
        if self._reference is None or model is not self.ref_model:
            return self._forward(model, *batch)
        # NaN for an unknown pair: the check of the margins then stops every rank.
        return *self._reference(*batch), None, None

    def _forward(self, model: Any, *batch: Any) -> Any:
        """OpenRLHF's own forward pass, with shared prompts if they are asked for."""
        sharing = self._sharing
        if sharing is None:
            return super().concatenated_forward(model, *batch)
        chosen_mask, rejected_mask = batch[1], batch[3]
        lengths = None
        if self.packing_samples:
            lengths = [*chosen_mask.sum(1).tolist(), *rejected_mask.sum(1).tolist()]
        with sharing.of(len(chosen_mask), lengths):
            result = super().concatenated_forward(model, *batch)
        if model is self.model:
            self._tokens = sharing.tokens, sharing.places
        return result

    def save_logs_and_checkpoints(
        self, args: Any, global_step: int, *more: Any, **kwargs: Any
    ) -> None:
        logged = next((given for given in more if isinstance(given, dict)), kwargs.get("logs_dict"))
        # Before a checkpoint is saved, whose record has them.
        self._losses = [*self._losses[:1], (logged or {})["loss_mean"]]
        super().save_logs_and_checkpoints(args, global_step, *more, **kwargs)
        if global_step % dotted(args).logger.logging_steps == 0:
            self._sums.pop("train", None)
            self._logged_batches = self._batches

    def evaluate(self, eval_dataloader: Any, *args: Any, **kwargs: Any) -> None:
        self._mode, self._margins = "eval", []
        # The sampler repeats pairs at the end, so that all ranks have the same number.  The first
        # ones of this rank are no repeats: as many as it would have without repeated pairs.
        sampler = eval_dataloader.sampler
        own = range(sampler.rank, len(eval_dataloader.dataset), sampler.num_replicas)
        self._to_evaluate = len(own)
        try:
            super().evaluate(eval_dataloader, *args, **kwargs)
        finally:
            self._mode = "train"
            self._sums.pop("eval", None)

    def _progress(self) -> float:
        """Progress at the step that is trained: 0 at the run's first step, 1 at its last.

        It is 1 in every evaluation, so that the losses of evaluations can be compared.
        """
        if self._mode == "eval":
            return 1.0
        return self._progress_at(self._batches // self.strategy.accumulated_gradient)

    def _progress_at(self, step: int) -> float:
        return min(1.0, step / (self._steps - 1)) if self._steps > 1 else 0.0

    def _record(self, margins: Tensor) -> None:
        """Count the pairs of a batch, and stop every rank if a margin on any rank is not finite.

        The stop comes before the batch's gradients are computed.  Training repeats no pair:
        OpenRLHF drops the pairs that don't fill a batch of every rank, others in each epoch.
        """
        self._called = True
        if self._mode == "train":
            self._margins = []
        else:
            margins = margins[: self._to_evaluate]
            self._to_evaluate -= len(margins)
        self._margins.append(margins.detach())
        tokens = self._tokens if self._mode == "train" else (0, 0)
        loss = self._loss.at(self._progress())
        self._moving = {f"{loss.name}/{name}": value for name, value in loss.moving().items()}
        sums = self.strategy.all_reduce(margin_sums(margins, loss, tokens), "sum")
        if not sums[MARGINS].isfinite().all():
            self._stop(torch.cat(self._margins))
        if self._mode == "train" and self._starts_as_reference:
            self._starts_as_reference = False
            largest = self.strategy.all_reduce(margins.detach().abs().max(), "max").item()
            if self.strategy.is_rank_0():
                narrow = dotted(self.args).ds.param_dtype != "fp32"
                check_first_margins(largest, self.loss_fn.beta, narrow)
        self._batches += self._mode == "train"
        before = self._sums.get(self._mode)
        self._sums[self._mode] = sums if before is None else before + sums

    def _join_diagnostics(self, reduced: dict[str, float]) -> None:
        """Add our diagnostics to the numbers that OpenRLHF has reduced and is about to log."""
        if self._mode == "eval":
            self._accuracy = reduced["acc_mean"]
        reduced.update(self._diagnostics())

    def _diagnostics(self) -> dict[str, float]:
        """Diagnostics of the pairs of all ranks since the last log, or of one evaluation."""
        if not self._called:
            raise _moved(self._loss, "a step was trained that did not call loss_fn")
        self._called = False
        batches = self._batches - self._logged_batches
        steps = max(1, batches // self.strategy.accumulated_gradient)
        return means(self._sums[self._mode], self._loss, steps) | self._moving

    def _stop(self, margins: Tensor) -> None:
        """Raise on every rank, after the reduction has told all ranks about the problem."""
        ranks: list[Any] = [None] * torch.distributed.get_world_size()
        unknown = self._reference and self._reference.unknown
        mine = unknown, not_finite(margins, torch.distributed.get_rank())
        torch.distributed.all_gather_object(ranks, mine)
        for rank, (unknown, _) in enumerate(ranks):
            if unknown:
                raise RunError(f"focalpo_plugins: on rank {rank}, {unknown}")
        accumulated = self.strategy.accumulated_gradient
        if self._mode == "train":
            when = f"step {self._batches // accumulated + 1}"
        else:
            when = f"evaluation after step {self._batches // accumulated}"
        stop(self._loss.name, when, [words for _, words in ranks if words])


class _ReducingDiagnostics:
    """OpenRLHF's strategy, with our diagnostics among the numbers that it reduces.

    The trainer shows and logs the numbers that it has reduced over the ranks.
    """

    def __init__(self, strategy: Any, join: Callable[[dict[str, float]], None]) -> None:
        self._strategy = strategy
        self._join = join

    def all_reduce(self, data: Any, op: str = "mean") -> Any:
        reduced = self._strategy.all_reduce(data, op)
        if isinstance(data, dict):
            self._join(reduced)
        return reduced

    def __getattr__(self, name: str) -> Any:
        return getattr(self._strategy, name)


def _embeddings_of(actor: Any) -> int | None:
    """The number of a model's input embeddings; None if that isn't known."""
    model: Any = getattr(actor.model, "module", actor.model)
    return getattr(model.get_input_embeddings(), "num_embeddings", None)


def _check_folders(trainer: DPOTrainer, strategy: Any) -> None:
    """Stop every rank before the first step if the trained model could not be saved.

    OpenRLHF writes to its output folder only after the last step.  Rank 0 checks.
    """
    ckpt = dotted(strategy.args).ckpt
    # -1, the default, asks for no checkpoints; OpenRLHF makes it infinity later.
    saves = ckpt.save_steps != -1 and (trainer.save_hf_ckpt or not trainer.disable_ds_ckpt)
    used = ("output_dir", "path") if saves else ("output_dir",)

    def check() -> None:
        for name in used:
            flag = spelled(f"ckpt.{name}", vars(strategy.args))
            check_folder(Path(getattr(ckpt, name)), f"--{flag}")

    on_rank_0(strategy, check)


def _save_with_record(
    strategy: Any,
    record: Callable[[], Mapping[str, Any]],
    save: Callable[..., Any],
    folder: str,
    tag: str,
    *more: Any,
    **kwargs: Any,
) -> Any:
    """Write our record into the checkpoint's folder, then call DeepSpeed's ``save_checkpoint``.

    DeepSpeed names a checkpoint in ``latest`` when it is whole, so a whole checkpoint has a record.
    """

    def write() -> None:
        path = Path(folder) / tag / RECORD_FILE
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(record()))
        except OSError as error:
            raise InvalidValue(
                "the folder of checkpoints must have room and be one that can be written to, got "
                f"{folder!r}: {error}. Make room, or name another; the last checkpoint that is "
                "whole can be resumed."
            ) from None

    on_rank_0(strategy, write)
    return save(folder, tag, *more, **kwargs)


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError(f"got {record!r}")
        return record
    except (OSError, ValueError) as error:
        raise InvalidValue(
            f"{path} must say what the checkpoint was trained with, and can't be read ({error}). "
            "Resume an earlier checkpoint, which the file latest beside it names."
        ) from None


@contextmanager
def _dpo_loss_replaced(replacement: Callable[..., PairwiseDPOLoss]) -> Iterator[None]:
    original = dpo_trainer.DPOLoss
    dpo_trainer.DPOLoss = replacement
    try:
        yield
    finally:
        dpo_trainer.DPOLoss = original


def _moved(loss: BoundLoss | str, why: str) -> RuntimeError:
    name = loss if isinstance(loss, str) else loss.name
    return RunError(
        f"{versions()}: {why}, unlike in the releases that are known; this run would have trained "
        f"another loss under the name {name}. Use an openrlhf release that the README lists."
    )
