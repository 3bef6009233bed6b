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
from ..errors import RunError
from ..guards.end import say_done
from ..guards.folders import check_folder
from ..guards.margins import not_finite, stop
from ..guards.messages import say
from ..guards.ranks import together
from ..guards.resume import check_unchanged
from ..guards.texts import Fault
from ..registry import BoundLoss
from .record import Record, recorded

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
        self._moving: dict[str, float] = {}  # of the last step or evaluation
        self._steps_recorded = 0
        self._window: set[int] = set()  # the steps that the next log covers

    def set_loss(self, loss: BoundLoss) -> None:
        """Train with ``loss`` from now on.

        Args:
            loss: a registered loss, bound to its options.
        """
        self.pairwise_loss = loss
        self._said_active = False
        self.add_callback(Record(self._record_of_loss(loss)))
        is_focalpo = loss.name == "focalpo"
        self._name, self._paper = ("FocalPO", _PAPER) if is_focalpo else (loss.name, {})
        self._tag_names: list[str] = [*self._tag_names, loss.name]
        model: Any = self.model
        model.add_model_tags([loss.name])

    def _loss_now(self) -> BoundLoss:
        """The loss at the step that is trained, or at the last one before an evaluation."""
        loss, steps = self.pairwise_loss, self.state.max_steps
        if loss is None:
            raise RunError(
                f"{type(self).__name__} has no pairwise loss yet, and would train "
                f"{self._own_loss}: call set_loss() before training."
            )
        before = self.state.global_step - (self._mode() == "eval")
        return loss.at(min(1.0, max(0, before) / (steps - 1)) if steps > 1 else 0.0)

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
        history, folder = self.state.log_history, str(self.args.output_dir)
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
        say_done(
            self.state.global_step,
            [entry["loss"] for entry in history if "loss" in entry],
            held_out,
            folder,
            folder if get_last_checkpoint(folder) else None,
        )

    def _check_before_training(self, resume_from_checkpoint: str | bool | None) -> None:
        if self.args.should_save and self.args.save_strategy != "no":
            check_folder(Path(str(self.args.output_dir)), "output_dir")
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(str(self.args.output_dir))
        if self.pairwise_loss is None or self._allow_changed or not folder:
            return
        if Path(folder).is_dir():  # else the host reports it itself
            asked = self._record_of_loss(self.pairwise_loss)
            allow = "focalpo_allow_changed: true"
            written = {"margin": "focalpo_margin", **self._written}
            check_unchanged(recorded(Path(folder)), asked, str(folder), allow, written)

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
            found = {**means(sums, self.pairwise_loss), **self._moving}
            for name, value in found.items():
                output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def _record(self, margins: Tensor) -> None:
        """Add the margins ``(B,)`` of this rank's pairs, and of all other ranks', to the next log.

        In training every trained row is counted, in evaluation each pair is counted once.
        """
        loss, mode, margins = self._loss_now(), self._mode(), margins.detach()
        self._moving = {f"{loss.name}/{name}": value for name, value in loss.moving().items()}
        if mode == "train":
            # Not gather_for_metrics: transformers fetches all batches of an update ahead, so in the
            # last update of an epoch each batch would be cut to the size of the last one.
            tokens = self._tokens_of_step()
            self._window.add(self.state.global_step)
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
            logs.update(means(sums, self.pairwise_loss, len(self._window)) | self._moving)
            self._window.clear()
        super().log(logs, *args, **kwargs)

    def _mode(self) -> str:
        # TRL tells the two apart in this way for its own metrics.
        model: Any = self.model
        return "train" if model.training else "eval"
