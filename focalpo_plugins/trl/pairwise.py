"""The part that all TRL trainers with another pairwise loss share, for any margin."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from torch import Tensor
from transformers.trainer_utils import get_last_checkpoint

from ..diagnostics import MARGINS, margin_sums, means
from ..errors import InvalidValue, RunError
from ..guards.end import say_done
from ..guards.folders import check_folder
from ..guards.margins import not_finite, stop
from ..guards.messages import say
from ..guards.ranks import together
from ..guards.resume import check_unchanged, warn_of_another_length, warn_of_unknown
from ..guards.start import check_embeddings, check_resumed_margins
from ..guards.texts import Fault
from ..registry import BoundLoss
from .checks import largest_id
from .record import Record, Saved, read

if TYPE_CHECKING:
    # The class of super() in the mixin's methods, by the order of the bases.
    from transformers import Trainer as _Host

    from ..backbone import SharedPrompts
else:
    _Host = object

# What TRL's model card says about the method.
_PAPER = {
    "title": "FocalPO: Enhancing Preference Optimizing by Focusing on Correct Preference Rankings",
    "id": "2501.06645",
    "citation": """\
@inproceedings{liu2025focalpo,
    title = {{FocalPO: Enhancing Preference Optimizing by Focusing on Correct Preference Rankings}},
    author = {Tong Liu and Xiao Yu and Wenxuan Zhou and Jindong Gu and Volker Tresp},
    booktitle = {ACL (Short Papers)},
    year = 2025
}""",
}


class PairwiseBase(_Host):
    """The part of a trainer that is the same for DPO's margin and for margins without a reference.

    It comes before TRL's trainer in the list of bases, and trains nothing before :meth:`set_loss`
    is called.

    Attributes:
        pairwise_loss: the loss that is trained.
    """

    pairwise_loss: BoundLoss | None = None
    _packages: Sequence[str] = ("trl", "torch")  # whose versions the start-up line names
    _said_active = False
    _allow_changed = False
    _allow_data = False
    _marker: str | None = None  # a text that the host renders beside an answer
    _written: Mapping[str, str] = {}  # the config's names of TRL's arguments, if they differ
    _host_saves = False  # whether the host saves the model to output_dir after training
    _checkpoint = ""  # that the run resumes from
    _embeddings: Mapping[str, int | None] = {}  # how many the policy and the reference have

    if TYPE_CHECKING:
        _own_loss: str  # what TRL's trainer trains
        _sharing: SharedPrompts | None
        _tag_names: list[str]

        def _tokens_of_step(self) -> tuple[int, int]: ...

        def _of_host(self) -> dict[str, Any]:
            """TRL's own values that go into the loss, and the name of the margin."""

        def _said_of_host(self) -> str:
            """The part of these values for the start-up line, with a space at the end."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._margin_sums: dict[str, Tensor] = {}
        self._moving: dict[str, dict[str, float]] = {}  # of the last step, and evaluation
        # The checkpoint's state, until the first step after resuming is done.
        self._resumed: dict[str, Any] | None = None
        self._largest = 0.0  # margin of that step
        self._steps_recorded = 0
        self._window: set[int] = set()  # the steps that the next log covers
        self._saved = Saved()
        self.add_callback(self._saved)

    def set_loss(self, loss: BoundLoss) -> None:
        """Train with ``loss`` from now on.

        Args:
            loss: a registered loss, bound to its options.
        """
        self.pairwise_loss = loss
        self._said_active = False
        self.add_callback(Record.of(self._record_of_loss(loss)))
        is_focalpo = loss.name == "focalpo"
        self._name, self._paper = ("FocalPO", _PAPER) if is_focalpo else (loss.name, {})
        self._tag_names: list[str] = [*self._tag_names, loss.name]
        model: Any = self.model
        model.add_model_tags([loss.name])

    def _loss_now(self) -> BoundLoss:
        """The loss at the step that is trained; in evaluation, the loss at the run's end.

        So the losses of two evaluations differ by their models only, and can choose the best one.
        """
        loss, steps = self.pairwise_loss, self.state.max_steps
        if loss is None:
            raise RunError(
                f"{type(self).__name__} has no pairwise loss yet, and would train "
                f"{self._own_loss}: call set_loss() before training."
            )
        if self._mode() == "eval":
            return loss.at(1.0)
        return loss.at(min(1.0, self.state.global_step / (steps - 1)) if steps > 1 else 0.0)

    def _say_active(self) -> None:
        """Print what is trained, once, on the main process, after all checks of the run."""
        if self.pairwise_loss is None or self._said_active:
            return
        self._said_active = True
        if self.accelerator.is_main_process:
            versions = " ".join(
                f"{name}={version(name)}" for name in ("focalpo_plugins", *self._packages)
            )
            sharing = self._sharing
            shared = "" if sharing is None else sharing.describe(self.accelerator.device)
            say(
                f"active. {self.pairwise_loss.describe()} {self._said_of_host()}{shared}"
                f"trainer={type(self).__name__} {versions}"
            )

    def _record_of_loss(self, loss: BoundLoss) -> dict[str, Any]:
        return loss.record("_", **self._of_host())

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """TRL's own training, after our checks.

        Raises:
            ValueError: the checkpoint to resume from was trained with another loss, or checkpoints
                can't be written to the output folder.
        """
        self._all_together(lambda: self._check_before_training(resume_from_checkpoint))
        self._say_active()
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.pairwise_loss is not None and self.accelerator.is_main_process:
            self._say_done()
        return output

    def _say_done(self) -> None:
        loss, history, folder = self.pairwise_loss, self.state.log_history, self.args.output_dir
        assert loss is not None
        trained = [entry for entry in history if "loss" in entry]
        moving = [(name, f"{loss.name}/{name}") for name in loss.moving()]
        moved = [
            ", ".join(f"{name} {entry[key]:.4g}" for name, key in moving if key in entry)
            for entry in (trained[:1] + trained[-1:] if moving else [])
        ]
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        if best is not None:
            step = int(best.rpartition("-")[2])
            history = [entry for entry in history if entry["step"] == step]
        held_out = {}
        for what, name in (("accuracy", "rewards/accuracies"), ("margin", "rewards/margins")):
            # The last value that was logged, for any evaluation set.
            values = [
                value
                for entry in history
                for key, value in entry.items()
                if key.startswith("eval_") and key.endswith(name)
            ]
            if values:
                held_out[what] = values[-1]
        saved = Path(str(folder)) / f"checkpoint-{self._saved.step}"
        has_saved = saved.is_dir()
        say_done(
            self.state.global_step,
            [entry["loss"] for entry in trained],
            held_out,
            str(folder) if self._host_saves else None,
            str(folder) if has_saved else None,
            moved=moved,
            best=best,
            saved=str(saved) if has_saved else None,
        )

    def _check_before_training(self, resume_from_checkpoint: str | bool | None) -> None:
        output_dir = str(self.args.output_dir)
        if self.args.should_save and self.args.save_strategy != "no":
            check_folder(Path(output_dir), "output_dir")
        self._resumed = None
        if self.pairwise_loss is None or not resume_from_checkpoint:
            return
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(output_dir)
        # The host reports these two on the rank that misses the folder, and the others would wait.
        if folder is None:
            raise InvalidValue(
                "resume_from_checkpoint=True needs a checkpoint in output_dir, got none in "
                f"{output_dir!r}. Start without resuming, or name the checkpoint's folder."
            )
        if not Path(folder).is_dir():
            raise InvalidValue(
                f"resume_from_checkpoint must be the folder of a checkpoint, got {folder!r}: there "
                "is no such folder."
            )
        self._checkpoint = str(folder)
        self._check_checkpoint(self.pairwise_loss)

    def _check_checkpoint(self, loss: BoundLoss) -> None:
        """Refuse a checkpoint that was trained with another loss."""
        # On all ranks, even if one can't read the state: later they wait for each other.
        self._resumed = {}
        try:
            recorded, self._resumed = read(Path(self._checkpoint))
        except ValueError:
            if self._allow_changed:
                return
            raise
        if self._allow_changed:
            return
        asked, of_host = self._record_of_loss(loss), list(self._of_host())
        allow = "focalpo_allow_changed: true"
        written = {"margin": "focalpo_margin", **self._written}
        check_unchanged(recorded, asked, self._checkpoint, allow, written, of_host)
        if self.accelerator.is_main_process and recorded is not None:
            warn_of_unknown(recorded, of_host, self._checkpoint, written)

    def _check_ids(
        self, dataset: Any, tokenizer: Any, columns: Sequence[str], is_main: bool
    ) -> None:
        """Refuse tokenized data with a token for which a model has no embedding."""
        known = {name: rows for name, rows in self._embeddings.items() if rows is not None}
        if all(rows >= len(tokenizer) for rows in known.values()):
            return  # without reading the data
        largest = max(largest_id(dataset, columns), tokenizer.pad_token_id or 0)
        warning = check_embeddings(known, len(tokenizer), largest)
        if is_main and warning:
            say(warning)

    def _faults(self, dataset: Any, tokenizer: Any, evaluation: bool) -> list[Fault]:
        """What the host trains of the rows otherwise than the chat template renders it."""
        return []

    def _all_together(self, check: Callable[[], None]) -> None:
        """Run ``check`` on every rank, and raise on all ranks if it raises on one."""
        together(check, lambda mine: gather_object([mine]))

    def _check_step(self, recorded: int) -> None:
        """Stop the run unless the step has called our loss exactly once.

        Args:
            recorded: the number of steps recorded before this one.
        """
        if self._steps_recorded == recorded + 1:
            return
        loss = self.pairwise_loss
        raise RunError(
            f"trl {version('trl')} computed the loss in a way that focalpo_plugins "
            f"{version('focalpo_plugins')} does not know, and this step would not have trained "
            f"{loss and loss.name}. Use a trl release that the README lists."
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

        They have the loop's prefix, so each named evaluation set has its own diagnostics, and so
        has ``predict()``.
        """
        self._say_active()
        self._margin_sums.pop("eval", None)  # of a loop that was interrupted
        output: Any = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        sums = self._margin_sums.pop("eval", None)
        if sums is not None and self.pairwise_loss is not None:
            found = {**means(sums, self.pairwise_loss), **self._moving["eval"]}
            for name, value in found.items():
                output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def _record(self, margins: Tensor) -> None:
        """Add the margins ``(B,)`` of this rank's pairs, and of all other ranks', to the next log.

        In training every trained row is counted, in evaluation each pair is counted once.
        """
        loss, mode, margins = self._loss_now(), self._mode(), margins.detach()
        moving = {f"{loss.name}/{name}": value for name, value in loss.moving().items()}
        self._moving[mode] = moving
        if mode == "train":
            # Not gather_for_metrics: transformers fetches all batches of an update ahead, so in the
            # last update of an epoch each batch would be cut to the size of the last one.
            tokens = self._tokens_of_step()
            self._window.add(self.state.global_step)
            self._check_resumed_step(loss, margins)
            sums = self.accelerator.reduce(margin_sums(margins, loss, tokens), "sum")
        else:
            # gather_for_metrics drops the rows that the sampler repeats to fill the last batches.
            sums = margin_sums(self.accelerator.gather_for_metrics(margins), loss)
        if not sums[MARGINS].isfinite().all():
            when = "step" if mode == "train" else "evaluation before step"
            found = gather_object([not_finite(margins, self.accelerator.process_index)])
            where = [words for words in found if words]
            stop(loss.name, f"{when} {self.state.global_step + 1}", where)
        self._margin_sums[mode] = self._margin_sums.get(mode, 0) + sums
        self._steps_recorded += 1

    def _check_resumed_step(self, loss: BoundLoss, margins: Tensor) -> None:
        """Warn of what the first step after resuming shows; called for each micro-batch."""
        before = self._resumed
        if before is None:
            return
        is_main = self.accelerator.is_main_process
        moving = ", ".join(f"{loss.name}_{name}" for name in loss.moving())
        if is_main and moving and "max_steps" in before:
            # Popped, so that it is said once.
            warn_of_another_length(before.pop("max_steps"), self.state.max_steps, moving)
        largest = self.accelerator.gather(margins.abs().max()).max().item()
        self._largest = max(self._largest, largest)
        if not self.accelerator.sync_gradients:
            return
        if is_main and self._of_host()["margin"] == "dpo":
            check_resumed_margins(self._largest, before.get("log_history", []), self._checkpoint)
        self._resumed, self._largest = None, 0.0

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's own model card, which names the base model if that is from a model hub.

        Here a local folder is named as text: it is no link, and a hub refuses it as `base_model`.
        """
        host: Any = super()
        host.create_model_card(*args, **kwargs)
        if not self.is_world_process_zero():
            return
        path = Path(str(self.args.output_dir)) / "README.md"
        card = path.read_text(encoding="utf-8")
        model: Any = self.model
        base = getattr(model.config, "_name_or_path", "")
        named = f"`{base}`, a local folder" if base else "a model that was given without a name"
        card = card.replace("[None](https://huggingface.co/None)", named, 1)
        card = card.replace('model="None"', f"model={json.dumps(str(self.args.output_dir))}", 1)
        path.write_text(card, encoding="utf-8")

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        sums = self._margin_sums.pop("train", None) if self._mode() == "train" else None
        if sums is not None and self.pairwise_loss is not None:
            found = means(sums, self.pairwise_loss, len(self._window))
            logs.update(found | self._moving["train"])
            self._window.clear()
        super().log(logs, *args, **kwargs)

    def _mode(self) -> str:
        # TRL tells the two apart in this way for its own metrics.
        model: Any = self.model
        return "train" if model.training else "eval"
