"""OpenRLHF's DPO trainer with another pairwise loss.

Only the loss changes, and the source of the reference's log-probabilities if they are precomputed.

``DPOTrainer.__init__`` constructs ``DPOLoss``, a name of its module.  During that call the name
refers to our loss.  Afterwards we check the class of the loss, and at every step that it was
called: if an OpenRLHF release moves its loss, it must never train DPO under another loss's name.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FunctionType
from typing import Any

from openrlhf.trainer import dpo_trainer
from openrlhf.trainer.dpo_trainer import DPOTrainer
from torch import Tensor

from ..errors import conflict
from ..guards import embeddings, pairs
from ..guards.faults import Policy
from ..reference import ReferenceLogps
from ..registry import BoundLoss
from ..run import Host, Now, Run
from ..sharing import SharedPrompts
from . import batches, data
from .checkpoints import Saved, check_folders, link_logs, read, save_with_record, with_run
from .conversations import text_faults
from .loss import PairwiseDPOLoss
from .names import given_options, installed_flag, nested_args
from .ranks import StrategyRanks, on_all_ranks, on_rank_0
from .reference import precompute

# OpenRLHF's values that go into the loss: attributes of its `model` arguments.
_IN_LOSS = ("beta", "label_smoothing", "aux_loss_coef", "nll_loss_coef")
# How messages name OpenRLHF; the flags are filled in once the loss and its name are known.
_HOST = Host(
    "OpenRLHF",
    packages=("openrlhf", "deepspeed", "torch"),
    separator=".",
    allow_changed="--LOSS.allow_changed",
    allow_data="--LOSS.allow_data",
)


def install(loss: BoundLoss) -> None:
    """Make OpenRLHF's command, which has just parsed its arguments, construct our trainer.

    Raises:
        RuntimeError: the installed OpenRLHF constructs its trainer or its loss elsewhere.
    """
    command = vars(sys.modules["__main__"])
    train = command.get("train")
    names = vars(DPOTrainer)["__init__"].__code__.co_names
    if not (
        isinstance(train, FunctionType)
        and train.__globals__ is command
        and "DPOTrainer" in train.__code__.co_names
    ):
        why = "its command's train() constructs no DPOTrainer"
    elif command.get("DPOTrainer") is not DPOTrainer:
        why = f"its command's DPOTrainer is not that of {dpo_trainer.__name__}"
    elif "DPOLoss" not in names or not hasattr(dpo_trainer, "DPOLoss"):
        why = "DPOTrainer.__init__ constructs no DPOLoss"
    else:
        command["DPOTrainer"] = PairwiseDPOTrainer
        return
    raise _HOST.moved(why, loss.name)


class PairwiseDPOTrainer(DPOTrainer):
    """``DPOTrainer`` with the loss that ``strategy.args.loss`` names, and its diagnostics.

    Raises:
        RuntimeError: OpenRLHF constructed its own loss, or trained a step without calling this one.
    """

    strategy: Any

    def __init__(
        self, model: Any, ref_model: Any, strategy: Any, *args: Any, **kwargs: Any
    ) -> None:
        self._name = strategy.args.loss
        options, self._flags = given_options(strategy.args)
        self._reference: ReferenceLogps | None = None
        self._sharing: SharedPrompts | None = None
        self._balanced = False
        self._tokens = 0, 0  # of the policy's last batch: computed, and in the padded batch
        self._batches = 0  # that were trained
        self._epoch: int | None = None  # of the last batch
        self._before_epoch = 0  # batches that were trained before that epoch
        self._evaluated: list[int] = []  # rows of the evaluation's next pairs
        self._evaluating = 0  # batches of the evaluation
        self._losses: list[float] = []  # of the run's first step and those of this process
        self._held_out: dict[str, list[float]] = {}  # of each evaluation, by what it is
        self._resumed: Saved | None = None
        construct = functools.partial(super().__init__, model, ref_model, strategy)
        with _dpo_loss_replaced(functools.partial(_CountedLoss, self, loss=self._name, **options)):
            # The first rank opens the logs here, which can fail.
            on_all_ranks(strategy, lambda: construct(*args, **kwargs))
        loss_fn = getattr(self, "loss_fn", None)
        if not isinstance(loss_fn, _CountedLoss):
            raise _HOST.moved(f"its loss_fn is {type(loss_fn).__name__}", self._name)
        # Counted here: once OpenRLHF resumes inside an epoch, the loader's length is what is left.
        self._steps = self.epochs * len(self.train_dataloader) // strategy.accumulated_gradient
        self._run = self._start(loss_fn.pairwise_loss)
        # Cheap checks come first, and the reference, which can take an hour, last.  The start-up
        # line is printed once nothing can be refused any more.
        self._check_data()
        self._check_resumed()
        saves = self.save_hf_ckpt or not self.disable_ds_ckpt
        on_rank_0(strategy, lambda: check_folders(self.args, saves))
        self._share_prompts()
        self._balance()
        self._watch(model.model)
        self._say_active()
        self._precompute()

    def _start(self, loss: BoundLoss) -> Run:
        of_host, flags = nested_args(self.args), vars(self.args)
        in_loss = {key: getattr(of_host.model, key) for key in _IN_LOSS}
        keys = {key: f"--{key}" for key in loss.record(".", **in_loss)}
        keys |= {key: f"--{installed_flag(f'model.{key}', flags)}" for key in _IN_LOSS}
        host = replace(
            _HOST,
            allow_changed=f"--{loss.name}.allow_changed",
            allow_data=f"--{loss.name}.allow_data",
            keys=keys,
        )
        # Without a reference, OpenRLHF uses the policy.
        same = of_host.ref.model_name_or_path in (None, of_host.model.model_name_or_path)
        return Run(
            loss,
            host,
            StrategyRanks(self.strategy),
            self._now,
            in_loss=in_loss,
            starts_at_zero=same and not of_host.ckpt.load_enable,
            narrow=of_host.ds.param_dtype != "fp32",
        )

    def _now(self) -> Now:
        of_step = self.strategy.accumulated_gradient
        ends_step = (self._batches + 1) % of_step == 0
        return Now(self._batches // of_step, self._steps, self.model.training, ends_step)

    def _check_data(self) -> None:
        """Refuse useless data, and data that would be trained differently than written."""
        is_first, limit = self.strategy.is_rank_0(), nested_args(self.args).data.max_len
        allowed = bool(self._flags.get("allow_data"))
        policy = Policy(self._run.host.allow_data, allowed, is_first)
        cutting = pairs.Cutting(f"--{installed_flag('data.max_len', vars(self.args))}", limit)
        loaders = (self.train_dataloader, self.eval_dataloader)
        sets = [[] if loader is None else loader.dataset for loader in loaders]
        sources = data.listed(self.args)  # each is read once for both checks of the first rank
        on_rank_0(self.strategy, lambda: data.check_cells(sources))

        def check_tokens() -> None:
            for evaluation, dataset in enumerate(sets):
                rows = data.tokenized(dataset)
                policy.check(pairs.find(rows, self.tokenizer, cutting, bool(evaluation)))

        def largest_id() -> int:
            tokenized = (row for dataset in sets for row in data.tokenized(dataset))
            return max((max(map(max, filter(None, ids))) for _, *ids in tokenized), default=0)

        def check_embeddings() -> None:
            models = {"policy": self.model, "reference": self.ref_model}
            known = {name: _embeddings_of(actor) for name, actor in models.items()}
            embeddings.check(known, self.tokenizer, largest_id, say=is_first)

        def check_texts() -> None:
            for evaluation in (False, True):
                policy.check(text_faults(sources, self.tokenizer, evaluation))

        on_all_ranks(self.strategy, check_tokens)
        on_all_ranks(self.strategy, check_embeddings)
        on_rank_0(self.strategy, check_texts)

    def _check_resumed(self) -> None:
        """Refuse a checkpoint that was trained with another loss."""
        ckpt = nested_args(self.args).ckpt
        if not ckpt.load_enable or self._flags.get("allow_changed"):
            return
        found: Saved | None = None

        def look() -> None:
            nonlocal found
            found = read(Path(ckpt.path))

        on_rank_0(self.strategy, look)
        # All ranks continue with what the first one has read.
        self._resumed = saved = self._run.ranks.gather(found)[0]
        if saved is None:
            return
        self._losses = saved.losses or []
        on_all_ranks(
            self.strategy,
            lambda: self._run.check_resumed(saved.record, saved.checkpoint, steps=saved.steps),
        )

    def _share_prompts(self) -> None:
        if not self._flags.get("shared_prompts"):
            return
        key = f"--{self._name}.shared_prompts"
        sharing = SharedPrompts(key, functools.partial(on_all_ranks, self.strategy))

        def attach() -> None:
            for actor in (self.model, self.ref_model):
                model: Any = getattr(actor.model, "module", actor.model)
                _check_shared(model, key)
                sharing.attach(model)

        on_all_ranks(self.strategy, attach)
        self._sharing = sharing

    def _balance(self) -> None:
        if not self._flags.get("balanced_batches"):
            return
        key, loader = f"--{self._name}.balanced_batches", self.train_dataloader
        max_len = nested_args(self.args).data.max_len
        flag = f"--{installed_flag('data.max_len', vars(self.args))}"

        def check() -> None:
            batches.check_loader(loader, key)
            for actor in (self.model, self.ref_model):
                model: Any = getattr(actor.model, "module", actor.model)
                batches.check_model(model, max_len, key, flag)

        on_all_ranks(self.strategy, check)
        shared = self._sharing is not None
        cost = batches.cost_of(self.packing_samples, shared)
        tokens = batches.read_tokens(loader.dataset, cost, shared, self._run.ranks)
        accumulation = self.strategy.accumulated_gradient
        batches.balance(loader, tokens, accumulation, cost, lambda: self._batches)
        self._balanced = True

    def _watch(self, engine: Any) -> None:
        """Add our diagnostics to what OpenRLHF logs, and our record to its checkpoints."""
        strategy = self.strategy
        self.strategy = _ReducingDiagnostics(strategy, self._join_diagnostics)
        # Not around the strategy's save_ckpt, which first deletes the oldest of too many folders.
        engine.save_checkpoint = functools.partial(
            save_with_record, strategy, self._record, engine.save_checkpoint
        )

    def _say_active(self) -> None:
        device = next(self.model.parameters()).device
        said = [f"beta={self.loss_fn.beta} label_smoothing={self.loss_fn.label_smoothing}"]
        if self._sharing is not None:
            said.append(self._sharing.describe(device))
        if self._balanced:
            said.append("batches=balanced")
        self._run.say_active(" ".join(said), self)

    def _precompute(self) -> None:
        if self._flags.get("precompute_ref"):
            folder = Path(self._flags["precompute_dir"]).expanduser()
            flag = f"--{self._name}.precompute_dir"
            shared = self._sharing is not None
            self._reference = precompute(self, self.strategy, folder, flag, shared)

    def fit(self, args: Any, consumed_samples: int = 0, *more: Any, **kwargs: Any) -> None:
        resumed = consumed_samples // nested_args(args).train.batch_size
        self._batches = resumed * self.strategy.accumulated_gradient
        self._epoch = None
        whole = not resumed or bool(self._losses)
        before = None if self._resumed is None else self._resumed.log
        if resumed and self._tensorboard is not None and before not in (None, self._log()):
            link_logs(Path(self._tensorboard.log_dir), str(before), resumed)
        super().fit(args, consumed_samples, *more, **kwargs)
        since = 0 if whole else resumed
        self._run.say_done(
            self._losses,
            self._of_evaluations(),
            nested_args(args).ckpt.output_dir,
            nested_args(args).logger.tensorboard_dir,
            since=0 if whole else resumed + 1,
            moved=self._run.moved_options(since, self._now().step - 1),
            dealt=self.train_dataloader.sampler.dealt if self._balanced else None,
        )

    def _record(self) -> dict[str, Any]:
        record = self._run.record()
        losses = [*self._losses[:1], *self._losses[1:][-1:]]
        return with_run(record, steps=self._steps, losses=losses, log=self._log())

    def _of_evaluations(self) -> dict[str, float | Sequence[float]]:
        loss, accuracy = (self._held_out.get(name, []) for name in ("eval_loss", "acc_mean"))
        return {"loss": loss, "accuracy": accuracy[-1]} if accuracy else {}

    def _log(self) -> str | None:
        """The name of TensorBoard's folder; None without it, and on other ranks than the first."""
        return None if self._tensorboard is None else Path(self._tensorboard.log_dir).name

    def concatenated_forward(self, model: Any, *batch: Any) -> Any:
        if self._reference is None or model is not self.ref_model:
            return self._forward(model, *batch)
        # NaN for an unknown pair: the check of the margins then stops every rank.
        return *self._reference(*batch), None, None

    def _forward(self, model: Any, *batch: Any) -> Any:
        """OpenRLHF's own forward pass, with shared prompts if they are asked for."""
        sharing, chosen_mask, rejected_mask = self._sharing, batch[1], batch[3]
        if sharing is None:
            if self._balanced and model is self.model:
                self._tokens = self._computed(chosen_mask, rejected_mask), 0
            return super().concatenated_forward(model, *batch)
        lengths = None
        if self.packing_samples:
            lengths = [*chosen_mask.sum(1).tolist(), *rejected_mask.sum(1).tolist()]
        with sharing.of(len(chosen_mask), lengths):
            result = super().concatenated_forward(model, *batch)
        if model is self.model:
            self._tokens = sharing.tokens, sharing.tokens_before
        return result

    def _computed(self, chosen_mask: Tensor, rejected_mask: Tensor) -> int:
        # The ranks of a ring, or of a tensor-parallel group, compute a batch together.
        ranks = self._run.ranks.count // self.train_dataloader.sampler.num_replicas
        return batches.computed_tokens(chosen_mask, rejected_mask, self.packing_samples, ranks)

    def count(self, margins: Tensor) -> BoundLoss:
        """Count the pairs of a batch, before its gradients are computed; return its loss.

        Training repeats no pair: OpenRLHF drops the pairs that don't fill a batch of every rank,
        and different ones in each epoch.
        """
        loss = self._run.loss
        why = "" if self._reference is None else self._reference.unknown
        if self.model.training:
            self._note_epoch()
            self._run.count(margins, tokens=self._tokens, rows=self._rows, why=why)
            self._batches += 1
        else:
            rows, self._evaluated = self._evaluated, self._evaluated[len(margins) :]
            self._run.count(margins, counted=len(rows), rows=lambda: rows, why=why)
        return loss

    def _note_epoch(self) -> None:
        epoch = getattr(self.train_dataloader.sampler, "epoch", None)
        if epoch != self._epoch:
            self._epoch, self._before_epoch = epoch, self._batches

    def _rows(self) -> list[int] | None:
        """The rows of this rank's next batch in the training data, if they are known."""
        return batches.rows_of_batch(self.train_dataloader, self._batches - self._before_epoch)

    def save_logs_and_checkpoints(
        self, args: Any, global_step: int, *more: Any, **kwargs: Any
    ) -> None:
        logged = next((given for given in more if isinstance(given, dict)), kwargs.get("logs_dict"))
        # Before a checkpoint is saved, whose record has them.
        self._losses.append((logged or {})["loss_mean"])
        super().save_logs_and_checkpoints(args, global_step, *more, **kwargs)
        if global_step % nested_args(args).logger.logging_steps == 0:
            self._run.forget()

    def evaluate(self, eval_dataloader: Any, *args: Any, **kwargs: Any) -> None:
        # The sampler repeats pairs at the end, so that all ranks have the same number.  The first
        # ones of this rank aren't repeats: as many as it would have without repeated pairs.
        sampler = eval_dataloader.sampler
        own = range(sampler.rank, len(eval_dataloader.dataset), sampler.num_replicas)
        self._evaluated = list(sampler)[: len(own)]
        self._evaluating = len(eval_dataloader)
        try:
            super().evaluate(eval_dataloader, *args, **kwargs)
        finally:
            self._run.forget(training=False)

    def _join_diagnostics(self, reduced: dict[str, float]) -> None:
        """Add our diagnostics to the numbers that OpenRLHF has reduced and is about to log."""
        training = self.model.training
        self._run.check_counted(1 if training else self._evaluating)
        if not training:
            for name in ("eval_loss", "acc_mean"):
                self._held_out.setdefault(name, []).append(reduced[name])
        reduced.update(self._run.logs(training=training))


class _CountedLoss(PairwiseDPOLoss):
    """The loss at the step that is trained; it counts the pairs of each batch."""

    def __init__(self, trainer: PairwiseDPOTrainer, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._trainer = trainer

    def loss_of(self, margins: Tensor) -> BoundLoss:
        return self._trainer.count(margins)


class _ReducingDiagnostics:
    """OpenRLHF's strategy, with our diagnostics among the numbers that it reduces.

    The trainer shows and logs the numbers that it reduces over the ranks.
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


def _check_shared(model: Any, key: str) -> None:
    """Refuse models that would train a row of shared prompts differently."""
    if hasattr(model, "get_base_model"):  # PEFT's
        model = model.get_base_model()
    kind, config = type(model).__name__, model.config
    if getattr(config.get_text_config(), "output_router_logits", None) is not None:
        why = "OpenRLHF asks for its routers' loss, which would count the row, not the padded batch"
        raise conflict(key, "a mixture of experts", kind, why, f"Remove {key}")
    if hasattr(config, "vision_config"):
        raise conflict(key, "a vision model", kind, "images can't be shared", f"Remove {key}")


@contextmanager
def _dpo_loss_replaced(replacement: Callable[..., PairwiseDPOLoss]) -> Iterator[None]:
    original = dpo_trainer.DPOLoss
    dpo_trainer.DPOLoss = replacement
    try:
        yield
    finally:
        dpo_trainer.DPOLoss = original
