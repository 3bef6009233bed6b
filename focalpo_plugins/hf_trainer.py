"""What all trainers share that derive from ``transformers.Trainer``, for any margin."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object, reduce
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from .balanced import Cost, Dealt, check_loss
from .errors import InvalidValue, RunError, conflict
from .guards.folders import check_folder
from .guards.messages import say
from .guards.ranks import together
from .guards.resume import IN_TRAINER_STATE, of_trainer_state
from .hf_batches import balance
from .hf_sequences import PairSequences
from .registry import BoundLoss
from .run import Host, Now, Run

if TYPE_CHECKING:
    # The class of super() in the mixin's methods, by the order of the bases.
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class AccelerateRanks:
    """The ranks of a run that accelerate has started."""

    @property
    def rank(self) -> int:
        return int(PartialState().process_index)

    @property
    def count(self) -> int:
        return int(PartialState().num_processes)

    def reduce(self, values: Tensor, how: Literal["sum", "max"]) -> Tensor:
        here = values.to(PartialState().device)  # where the backend can reach it
        every: Any = gather(here[None]) if how == "max" else reduce(here, "sum")
        found: Tensor = every.amax(0) if how == "max" else every
        return found.to(values.device)

    def gather(self, thing: Any) -> list[Any]:
        found: list[Any] = gather_object([thing])
        return found


RANKS = AccelerateRanks()


class PairwiseTrainerMixin(_Trainer):
    """Makes a host's trainer train with a loss of this package.

    It comes before the host's trainer in the list of bases, and trains nothing before
    :meth:`set_loss` is called.  The adapter's class calls :meth:`_count` with the margins of each
    batch, inside ``with self._running().one_step()``.
    """

    _host: Host  # how messages name the host and its settings
    _own_loss: str  # what the host's trainer trains, for a message
    _allow_changed = False
    _allow_data = False
    _host_saves = False  # whether the host saves the model to output_dir after training
    _starts_as_reference = False
    _balanced_key: str | None = None  # the key that asked for balanced batches, for messages
    _balance = staticmethod(balance)  # how the host's data loaders are balanced
    _dealt: Dealt | None = None  # what they have dealt
    _precomputed: Any = None  # a PrecomputedReference, if the host has none of its own
    _run: Run | None = None
    _said_active = False

    if TYPE_CHECKING:

        def _in_loss(self) -> dict[str, Any]:
            """The host's values that go into the loss, and the name of the margin."""

        def _said_of_host(self) -> str:
            """What the start-up line shows of them."""

        def _tokens_of_step(self) -> tuple[int, int]:
            """Tokens computed of the last batch, and with shared prompts those of the padded one;
            zeros if neither batches are balanced nor prompts shared."""

        def _sequences(self) -> PairSequences | None:
            """Those of the training data; None if it isn't known."""

        def _pairs_of_step(self) -> list[tuple[list[int], list[int]]]:
            """The token ids of the chosen and the rejected sequences of the last batch."""

        def _cost(self) -> Cost:
            """What a micro-batch costs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._saved = _Saved()
        self.add_callback(self._saved)

    def _notes(self) -> list[str]:
        """What the user should know of this run before it trains, a sentence each."""
        return []

    @property
    def pairwise_loss(self) -> BoundLoss | None:
        """The loss that is trained; None before :meth:`set_loss`."""
        return None if self._run is None else self._run.asked

    def set_loss(self, loss: BoundLoss) -> None:
        """Train with ``loss`` from now on.

        Args:
            loss: a registered loss, bound to its options.
        """
        if self._balanced_key is not None:
            check_loss(loss, self._balanced_key)
        model: Any = self.model
        narrow = any(weight.dtype.itemsize < 4 for weight in model.parameters())
        self._run = Run(
            loss,
            self._host,
            RANKS,
            self._now,
            in_loss=self._in_loss(),
            starts_at_zero=self._starts_as_reference,
            narrow=narrow or self.accelerator.mixed_precision != "no",
        )
        self._said_active = False
        self.add_callback(_Record.of(self._run.record()))
        model.add_model_tags([loss.name])

    def _running(self) -> Run:
        if self._run is None:
            raise RunError(
                f"{type(self).__name__} has no pairwise loss yet, and would train "
                f"{self._own_loss}: call set_loss() before training."
            )
        return self._run

    def _now(self) -> Now:
        # TRL tells training and evaluation apart in this way for its own metrics.
        model: Any = self.model
        state = self.state
        ends_step = self.accelerator.sync_gradients
        return Now(state.global_step, state.max_steps, model.training, ends_step)

    def _count(self, margins: Tensor) -> None:
        """Count the margins ``(B,)`` of this rank's batch for the next log.

        In training every trained row is counted, in evaluation each pair is counted once.
        """
        run = self._running()
        why = "" if self._precomputed is None else self._precomputed.unknown
        if self._now().training:
            # Not gather_for_metrics: transformers fetches all batches of an update ahead, so in the
            # last update of an epoch each batch would be cut to the size of the last one.
            run.count(margins, tokens=self._tokens_of_step(), rows=self._rows_of_step, why=why)
            return
        # gather_for_metrics drops the rows that the sampler repeats to fill the last batches.
        own = torch.full_like(margins, RANKS.rank, dtype=torch.long)
        kept: Any = self.accelerator.gather_for_metrics(own)
        run.count(margins, counted=int((kept == RANKS.rank).sum()), why=why)

    def _rows_of_step(self) -> list[int | None] | None:
        """The rows of the training data that the last batch has; None if they aren't known."""
        sequences = self._sequences()
        return None if sequences is None else sequences.rows_of(self._pairs_of_step())

    def get_train_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        of_host: Any = super().get_train_dataloader
        loader = of_host(*args, **kwargs)
        key = self._balanced_key
        if key is not None:

            def balanced() -> None:
                sequences, cost = self._sequences(), self._cost()
                if sequences is None:
                    data, why = (
                        type(self.train_dataset).__name__,
                        "the pairs' lengths are not known",
                    )
                    raise conflict(key, "training data", data, why, f"Set {key} to false")
                tokens = sequences.tokens(cost, say=RANKS.rank == 0)
                steps = self.args.gradient_accumulation_steps
                self._dealt = self._balance(loader, tokens, steps, cost, key)

            together(RANKS, balanced)
        return loader

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """The host's own training, after this package's checks.

        Raises:
            ValueError: the checkpoint to resume from was trained with another loss, or checkpoints
                can't be written to the output folder.
        """
        together(RANKS, lambda: self._check_before_training(resume_from_checkpoint))
        self._say_active()
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        self._say_done()
        return output

    def _check_before_training(self, resume_from_checkpoint: str | bool | None) -> None:
        output_dir = str(self.args.output_dir)
        if self.args.should_save and self.args.save_strategy != "no":
            check_folder(Path(output_dir), "output_dir")
        if self._run is None or not resume_from_checkpoint:
            return
        folder: Any = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
        # The host reports these two only on the rank without the folder: the others would wait.
        if folder is None:
            raise InvalidValue(
                "resume_from_checkpoint=True needs a checkpoint in output_dir, got none in "
                f"{output_dir!r}. Start without resuming, or name the checkpoint's folder."
            )
        if not Path(folder).is_dir():
            raise InvalidValue(
                f"resume_from_checkpoint must be the folder of a checkpoint, got {folder!r}, which "
                "doesn't exist. Name another folder, or start without resuming."
            )
        self._check_checkpoint(self._run, str(folder))

    def _check_checkpoint(self, run: Run, checkpoint: str) -> None:
        try:
            recorded, state = _read_checkpoint(Path(checkpoint))
        except ValueError:
            if not self._allow_changed:
                raise
            recorded, state = None, {}
        run.check_resumed(
            recorded,
            checkpoint,
            history=state.get("log_history", []),
            steps=state.get("max_steps"),
            allowed=self._allow_changed,
        )

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The host's own loop, with the diagnostics of its pairs added to its metrics.

        They get the loop's prefix, so each named evaluation set and ``predict()`` have their own
        diagnostics.
        """
        self._say_active()
        if self._run is not None:
            self._run.forget(training=False)  # left over from an interrupted loop
        output: Any = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        if self._run is not None:
            for name, value in self._run.logs(training=False).items():
                output.metrics[f"{metric_key_prefix}_{name}"] = value
            self._run.forget(training=False)
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._run is not None and self._now().training:
            logs.update(self._run.logs())
            self._run.forget()
        super().log(logs, *args, **kwargs)

    def _say_active(self) -> None:
        """Print what is trained, once, after all checks of the run."""
        if self._run is not None and not self._said_active:
            self._said_active = True
            self._run.say_active(self._said_of_host(), self)
            if RANKS.rank == 0:
                for note in self._notes():
                    say(note)

    def _say_done(self) -> None:
        if self._run is None:
            return
        history, folder = self.state.log_history, str(self.args.output_dir)
        trained = [entry for entry in history if "loss" in entry]
        ends = [int(entry["step"]) - 1 for entry in (*trained[:1], *trained[-1:])]
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        if best is not None:
            step = int(best.rpartition("-")[2])
            history = [entry for entry in history if entry["step"] == step]
        saved = Path(folder, f"checkpoint-{self._saved.step}")
        has_saved = saved.is_dir()
        self._run.say_done(
            [entry["loss"] for entry in trained],
            _held_out(history),
            folder if self._host_saves else None,
            folder if has_saved else None,
            moved=self._run.moved_options(*ends),
            best=best,
            saved=str(saved) if has_saved else None,
            dealt=self._dealt,
        )


def _held_out(history: list[dict[str, float]]) -> dict[str, float | list[float]]:
    """The last logged values of the last evaluation set; of its loss, all logged values.

    Hosts log other losses beside a set's own (``eval_nll_loss``), which alone has a run time.
    """
    found: dict[str, float | list[float]] = {}
    for what, name in (
        ("loss", "loss"),
        ("accuracy", "rewards/accuracies"),
        ("margin", "rewards/margins"),
    ):
        values: dict[str, list[float]] = {}
        for entry in history:
            for key, value in entry.items():
                of_set = what != "loss" or f"{key.removesuffix(name)}runtime" in entry
                if key.startswith("eval_") and key.endswith(name) and of_set:
                    values.setdefault(key, []).append(value)
        if values:
            of_last = list(values.values())[-1]
            found[what] = of_last if what == "loss" else of_last[-1]
    return found


class _Record(TrainerCallback, ExportableState):
    """Makes transformers write this run's record into each checkpoint's trainer_state.json."""

    _record: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, record: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            record: what an earlier run trained, as transformers reads it from a checkpoint; unused.
        """

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> _Record:
        """The callback that writes ``record``.

        Transformers may replace it by one of the same class, made from the checkpoint's state.  So
        the record belongs to the class: this run's is written, whatever was restored.
        """
        # Transformers keeps a callback's state under the name of its class.
        of_run: type[_Record] = type(IN_TRAINER_STATE, (cls,), {"_record": record})
        return of_run()

    def state(self) -> dict[str, Any]:
        return {"args": {"record": dict(self._record)}, "attributes": {}}


class _Saved(TrainerCallback):
    """Remembers the step of the last checkpoint that this process has saved.

    Looking into the folder isn't enough: an earlier run may have left checkpoints there.
    """

    step: int | None = None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step


def _read_checkpoint(checkpoint: Path) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The record in a checkpoint, None without a loss of this package; and transformers' state.

    Raises:
        ValueError: the checkpoint's state can't be read.
    """
    path = checkpoint / TRAINER_STATE_NAME
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        found = of_trainer_state(state)
        # Before 0.2.0 dpo was the only margin, and the record did not name it.
        return None if found is None else {"margin": "dpo", **found}, state
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise InvalidValue(
            f"resume_from_checkpoint must be a complete checkpoint, got {str(checkpoint)!r}: "
            f"{path.name} can't be read ({error}); the run may have been killed while it saved. "
            "Remove the folder, and resume from an earlier one."
        ) from None
