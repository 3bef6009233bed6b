"""What a run with a loss of this package does, in every host.

A host's adapter tells a :class:`Run` how the host's ranks add up numbers
(:class:`~focalpo_plugins.guards.ranks.Ranks`) and which step it is at (:class:`Now`).  For each
batch it passes the margins to :meth:`Run.count`.  The run does the rest: options that move,
diagnostics, the checks of the first step, the record of a checkpoint, and what is printed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .balanced import Dealt
from .diagnostics import MARGINS, margin_sums, means, of_ranks
from .errors import NotFinite, RunError
from .guards.messages import say
from .guards.ranks import Ranks
from .guards.resume import check_unchanged, warn_of_another_length, warn_of_unknown
from .registry import BoundLoss
from .releases import install

#: Largest difference of two log-probs of a sequence that rounding explains, in nats: in float32,
#: and below float32.
ROUNDING = (0.01, 1.0)
#: Largest margin of a resumed run's first step, as a share of the mean margin that was logged last
#: before, from which the checkpoint's weights can't have been loaded.
_LOST = 0.01
_SHOWN = 8  # rows in a message


class Now(NamedTuple):
    """Where a run is.

    Attributes:
        step: the number of optimizer steps that are done.
        steps: the number of steps of the whole run; 0 if the host doesn't know it yet.
        training: whether the next batch is trained, and not evaluated.
        ends_step: whether the next batch is the last one of its step.
    """

    step: int
    steps: int
    training: bool
    ends_step: bool = True


@dataclass(frozen=True)
class Host:
    """How messages and records name a host and its settings.

    Attributes:
        name: the host's name.
        packages: the packages whose versions the start-up line names; the first one is the host.
        separator: the text between a loss's name and its option, in the user's spelling.
        allow_changed: what the user sets to resume a checkpoint of another loss.
        allow_data: what the user sets to train on data that is refused.
        keys: the user's names of the host's values, if they differ.
        unsaved: what is said of a model that the run has not saved.
    """

    name: str
    packages: Sequence[str]
    separator: str
    allow_changed: str
    allow_data: str
    keys: Mapping[str, str] = field(default_factory=dict)
    unsaved: str = "the model is not saved yet: trainer.save_model() saves it"

    def moved(self, why: str, loss: str) -> RunError:
        """The error for a release of the host that doesn't train as the tested releases do.

        Args:
            why: what differs, without a full stop.
            loss: the name of the loss that was asked for.
        """
        ours, package = version("focalpo_plugins"), self.packages[0]
        return RunError(
            f"focalpo_plugins {ours} can't train with {package} {version(package)}: "
            f"{why.rstrip('.')}. This run would have trained another loss under the name {loss}. "
            f"{install(package)}"
        )

    def key(self, name: str) -> str:
        """How the user spells the host's value ``name``."""
        return self.keys.get(name, name)

    def versions(self) -> str:
        """``trl=1.9.0 torch=2.13.0``, after this package's own version."""
        packages = ("focalpo_plugins", *self.packages)
        return " ".join(f"{package}={version(package)}" for package in packages)


@dataclass
class _Resumed:
    """What the first step after resuming is compared with."""

    checkpoint: str
    history: Sequence[Mapping[str, Any]] | None
    steps: int | None
    largest: float = 0.0  # margin of the step so far


class _Window:
    """What was counted since the last log."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        self.tokens: Tensor | None = None
        self.steps: set[int] = set()
        self.moving: dict[str, float] = {}  # options of the last batch

    def add(self, sums: Tensor, tokens: Tensor, step: int, moving: dict[str, float]) -> None:
        self.sums = sums if self.sums is None else self.sums + sums
        self.tokens = tokens if self.tokens is None else self.tokens + tokens
        self.steps.add(step)
        self.moving = moving


class Run:
    """A run that trains ``loss``.

    Args:
        loss: a registered loss, bound to its options.
        host: the names in messages.
        ranks: the host's collectives.
        now: returns where the run is.
        in_loss: the host's own values that go into the loss, by the host's names.
        starts_at_zero: whether the first step's margins should all be 0, because the policy starts
            as its reference.
        narrow: whether the model computes in 16 bits.
    """

    def __init__(
        self,
        loss: BoundLoss,
        host: Host,
        ranks: Ranks,
        now: Callable[[], Now],
        *,
        in_loss: Mapping[str, Any],
        starts_at_zero: bool = False,
        narrow: bool = False,
    ) -> None:
        self.asked = loss
        self.host = host
        self.ranks = ranks
        self.now = now
        self._in_loss = dict(in_loss)
        self._starts_at_zero = starts_at_zero
        self._narrow = narrow
        self._resumed: _Resumed | None = None
        self._windows = {True: _Window(), False: _Window()}  # training, and evaluation
        self._counted = 0  # batches since the last check of a step
        self._trained: Tensor | None = None  # the sums of `of_ranks` over the run

    @property
    def loss(self) -> BoundLoss:
        """The loss at the step that is trained; in evaluation, the loss at the run's end.

        So the losses of two evaluations differ by their models only, and can choose the best one.
        """
        now = self.now()
        return self.loss_at(now.step) if now.training else self.asked.at(1.0)

    def loss_at(self, step: int) -> BoundLoss:
        """The loss after ``step`` optimizer steps."""
        steps = self.now().steps
        return self.asked.at(min(1.0, step / (steps - 1)) if steps > 1 else 0.0)

    def count(
        self,
        margins: Tensor,
        *,
        counted: int | None = None,
        tokens: tuple[int, int] = (0, 0),
        rows: Callable[[], Sequence[int | None] | None] | None = None,
        why: str = "",
    ) -> None:
        """Count the pairs of a batch, and stop every rank if a margin on any rank is not finite.

        Call it on all ranks for each batch, before its gradients are computed.

        Args:
            margins: reward margins ``(B,)`` of this rank's pairs.
            counted: how many of them are counted, the first ones; None for all.  A sampler repeats
                pairs at the end of an evaluation.
            tokens: the number of tokens that the policy computed, padding included, and with shared
                prompts that of the padded batch; 0 if it isn't known.
            rows: finds the pairs' rows in the data, None for one that isn't there, or None if the
                data aren't known; only called on a rank with a margin that is not finite.
            why: what this rank knows of margins that are not finite.

        Raises:
            FloatingPointError: a margin is NaN or infinite.
        """
        self._counted += 1
        now, loss, margins = self.now(), self.loss, margins.detach()
        margins = margins[:counted]
        own = margin_sums(margins, loss)
        by_rank = [0] * self.ranks.count  # a place for each rank's tokens
        by_rank[self.ranks.rank] = tokens[0]
        places = own.new_tensor([*by_rank, tokens[1]])
        reduced = self.ranks.reduce(torch.cat([own, places]), "sum")
        sums, computed = reduced[: len(own)], reduced[len(own) :]
        if not sums[MARGINS].isfinite().all():
            self._stop(now, why, _not_finite(margins, self.ranks.rank, rows))
        moving = {f"{loss.name}/{name}": value for name, value in loss.moving().items()}
        tokens_of_ranks = of_ranks(computed[:-1], computed[-1])
        self._windows[now.training].add(sums, tokens_of_ranks, now.step, moving)
        if now.training:
            before = self._trained
            self._trained = tokens_of_ranks if before is None else before + tokens_of_ranks
        if now.training and (self._starts_at_zero or self._resumed is not None):
            self._check_first(now, self.ranks.reduce(margins.abs().max(), "max").item())

    @contextmanager
    def one_step(self) -> Iterator[None]:
        """Stop the run unless the code inside calls :meth:`count` exactly once.

        Raises:
            RuntimeError: it didn't, so the host has trained another loss.
        """
        self._counted = 0
        yield
        self.check_counted()

    def check_counted(self, batches: int = 1) -> None:
        """Stop the run unless :meth:`count` was called for each batch since the last check.

        Args:
            batches: the number of batches since then.

        Raises:
            RuntimeError: it wasn't, so the host has trained another loss.
        """
        counted, self._counted = self._counted, 0
        if counted != batches:
            why = f"it called the loss {counted} times for {batches} batch{'es' * (batches != 1)}"
            raise self.host.moved(why, self.asked.name)

    def logs(self, *, training: bool = True) -> dict[str, float]:
        """The diagnostics since the last :meth:`forget`, by the name in the log."""
        window = self._windows[training]
        if window.sums is None:
            return {}
        found = means(window.sums, self.asked, len(window.steps), window.tokens)
        return found | window.moving

    def forget(self, *, training: bool = True) -> None:
        """Start the diagnostics over: they have been logged, or their evaluation is over."""
        self._windows[training] = _Window()

    def record(self) -> dict[str, Any]:
        """What a checkpoint records about its training, by the user's key."""
        return self.asked.record(self.host.separator, **self._in_loss)

    def check_resumed(
        self,
        recorded: Mapping[str, Any] | None,
        checkpoint: str,
        *,
        history: Sequence[Mapping[str, Any]] | None = None,
        steps: int | None = None,
        allowed: bool = False,
    ) -> None:
        """Refuse a checkpoint that was trained with another loss.

        Args:
            recorded: its record, without what isn't compared; None if there is none.
            checkpoint: its path, for the messages.
            history: what its run has logged; None if the first step's margins can't be compared.
            steps: the optimizer steps of its run, if they are known.
            allowed: whether the user allows another loss.

        Raises:
            ValueError: the loss or one of its values differs.
        """
        self._starts_at_zero = False
        self._resumed = _Resumed(checkpoint, history, steps)
        if allowed:
            return
        host = self.host
        check_unchanged(
            recorded, self.record(), checkpoint, host.allow_changed, host.keys, self._in_loss
        )
        if recorded is not None and self.ranks.rank == 0:
            warn_of_unknown(recorded, self._in_loss, checkpoint, host.keys)

    def say_active(self, of_host: str, trainer: object) -> None:
        """Print what is trained; call it once all checks have passed.

        Args:
            of_host: the host's own values, as ``beta=0.1``.
            trainer: the object that trains.
        """
        if self.ranks.rank == 0:
            said = filter(None, ("active.", self.asked.describe(), of_host))
            say(" ".join([*said, f"trainer={type(trainer).__name__}", self.host.versions()]))

    def moved_options(self, *steps: int) -> list[str]:
        """The moving options after each of the numbers of steps, as ``gamma 0.5``; none if nothing
        moves."""
        if not self.asked.moving():
            return []
        found = (self.loss_at(step).moving() for step in steps)
        return [", ".join(f"{name} {value:.4g}" for name, value in at.items()) for at in found]

    def say_done(
        self,
        losses: Sequence[float],
        held_out: Mapping[str, float | Sequence[float]],
        output: str | None,
        report: str | None,
        *,
        since: int = 0,
        moved: Sequence[str] = (),
        best: str | None = None,
        saved: str | None = None,
        dealt: Dealt | None = None,
    ) -> None:
        """Print the outcome in one line, so that the user knows that it trained.

        Args:
            losses: the logged losses, in order.  The first one is shown, and the mean of the last
                tenth, because single batches scatter.
            held_out: the last evaluation's numbers, or those of ``best``, by name; a sequence has
                the first evaluation's too.
            output: the folder that the host saves the model to, as the user wrote it; None if the
                host leaves that to its user.
            report: the folder that ``focalpo report`` can read; None if there is none.
            since: the step of the first loss, if that of the run's first step isn't known.
            moved: the result of :meth:`moved_options` for the first and the last logged step.
            best: the checkpoint that was loaded after training as the best one.
            saved: the last checkpoint; only named if ``output`` is None.
            dealt: what balanced batches have dealt; None without them.
        """
        if self.ranks.rank != 0:
            return
        steps = self.now().step
        parts = [f"done. {steps} step{'s' * (steps != 1)}"]
        if losses:
            begin = f"at step {since}" if since else "at first"
            tail = losses[-max(1, len(losses) // 10) :]
            mean = [f"mean of the last {len(tail)} logged"] if len(tail) > 1 else []
            first, last = (
                f" ({'; '.join(words)})" if words else ""
                for words in ([*moved[:1]], [*moved[-1:], *mean])
            )
            at_last = sum(tail) / len(tail)
            parts.append(f"loss {losses[0]:.4f} {begin}{first}, {at_last:.4f} at last{last}")
        if best is not None:
            parts.append(f"the model is now that of {best}, the best checkpoint")
        if held_out:
            found = ", ".join(f"{name} {_first_to_last(value)}" for name, value in held_out.items())
            parts.append(f"held out{' there' * (best is not None)}: {found}")
        parts += self._saved(dealt)
        if output is not None:
            parts.append(f"the model goes to {output}")
        elif saved is not None:
            parts.append(f"the last checkpoint is {saved}")
        else:
            parts.append(self.host.unsaved)
        if report is not None:
            parts.append(f"next: focalpo report {report}")
        say("; ".join(parts))

    def _saved(self, dealt: Dealt | None) -> list[str]:
        """How many tokens shared prompts and balanced batches have saved in training, in words."""
        computed, _, padded = [0.0] * 3 if self._trained is None else self._trained.tolist()
        words = []
        if padded:
            words.append(f"shared prompts saved {1 - computed / padded:.0%} of the tokens")
        if dealt is not None and dealt.plain:
            saved = 1 - dealt.path / dealt.plain
            words.append(f"balanced batches saved {saved:.0%} of those that a step waits for")
        return words

    def _check_first(self, now: Now, largest: float) -> None:
        """Check the first step's margins; called for each of its micro-batches."""
        is_first_rank, resumed = self.ranks.rank == 0, self._resumed
        if self._starts_at_zero:
            self._starts_at_zero = False
            if is_first_rank:
                check_first_margins(largest, self._in_loss["beta"], self._narrow)
        elif resumed is not None:
            resumed.largest = max(resumed.largest, largest)
            if now.ends_step:
                self._resumed = None
                if is_first_rank:
                    self._warn_of_resumed(resumed, now.steps)

    def _warn_of_resumed(self, resumed: _Resumed, steps: int) -> None:
        of_loss = f"{self.asked.name}{self.host.separator}"
        moving = ", ".join(self.host.key(of_loss + name) for name in self.asked.moving())
        if moving:
            warn_of_another_length(resumed.steps, steps, moving)
        if resumed.history is not None and self._in_loss.get("margin", "dpo") == "dpo":
            check_resumed_margins(resumed.largest, resumed.history, resumed.checkpoint)

    def _stop(self, now: Now, why: str, where: str) -> NoReturn:
        """Raise on every rank, after the reduction has told all ranks about the problem."""
        found = self.ranks.gather((why, where))
        for rank, (reason, _) in enumerate(found):
            if reason:
                raise RunError(f"on rank {rank}, {reason}")
        when = f"step {now.step + 1}" if now.training else f"evaluation after step {now.step}"
        bad = "; ".join(words for _, words in found if words)
        raise NotFinite(
            f"{self.asked.name}: reward margins are not finite, {when}: {bad}. The host's "
            "log-probabilities of the policy or of the reference are NaN or infinite there. Check "
            "those pairs and the weights; lower the learning rate, or train in bf16 or fp32 if it "
            "is fp16. Checkpoints that were saved before are unharmed."
        )


def _first_to_last(value: float | Sequence[float]) -> str:
    if isinstance(value, float | int):
        return f"{value:.3f}"
    first, last = value[0], value[-1]
    return f"{last:.3f}" if len(value) == 1 else f"{first:.3f} at first, {last:.3f} at last"


def check_first_margins(largest: float, beta: float, narrow: bool) -> None:
    """Print the largest margin of the first step, and warn if rounding can't explain it.

    If the policy starts as its reference and a margin is not 0, something is wrong: for example,
    the reference is not the intended one.

    Args:
        largest: largest absolute reward margin of all pairs on all ranks.
        beta: the factor in the margins.
        narrow: whether the model computes in 16 bits.
    """
    nats = largest / beta
    if nats <= ROUNDING[narrow]:
        say(f"first step: policy and reference agree, largest margin {largest:.2g}.")
        return
    say(
        f"warning: the largest margin of the first step is {largest:.2g} ({nats:.2g} nats), "
        "expected 0: the policy starts as its reference. Check for: a wrong reference, weights "
        "changed after loading, an adapter that doesn't start at 0, dropout, NEFTune's noise, a "
        "wrong attention mask, or packing without an attention that supports it."
    )


def check_resumed_margins(
    largest: float, history: Sequence[Mapping[str, Any]], checkpoint: str
) -> None:
    """Warn if policy and reference of a resumed run are equal, but the policy had been trained.

    Args:
        largest: largest absolute reward margin of the first step's pairs on all ranks.
        history: what the checkpoint's run has logged.
        checkpoint: the checkpoint, for the message.
    """
    logged = [entry for entry in history if "rewards/margins" in entry]
    before = abs(logged[-1]["rewards/margins"]) if logged else 0.0
    # The first step's margins are 0 anyway; its learning rate tells whether it changed anything.
    at_first = not logged or logged[-1]["step"] == 1 and logged[-1].get("learning_rate") != 0
    if largest < _LOST * before or largest == 0 and before == 0 and at_first:
        was = f", but the mean was {before:.2g} when {checkpoint} was saved" if before else ""
        say(
            f"warning: the largest margin of the first step after resuming is {largest:.2g}{was}: "
            f"policy and reference are equal. Either the weights of {checkpoint} were not loaded, "
            "or the reference is that checkpoint. transformers doesn't load the trained adapter "
            "from a checkpoint with a folder `ref`: to resume such a run, pass the policy as "
            f"PeftModel.from_pretrained(BASE_MODEL, {checkpoint!r}, is_trainable=True)."
        )


def _not_finite(
    margins: Tensor, rank: int, find_rows: Callable[[], Sequence[int | None] | None] | None
) -> str:
    """A text about a rank's reward margins ``(B,)`` that are NaN or infinite; empty if none is."""
    bad = (~margins.isfinite()).nonzero().flatten().tolist()
    if not bad:
        return ""
    rows = find_rows() if find_rows is not None else None
    known = rows is not None and all(rows[place] is not None for place in bad)
    numbers = [rows[place] for place in bad] if rows is not None and known else bad
    shown = f"{', '.join(map(str, numbers[:_SHOWN]))}{', ...' * (len(bad) > _SHOWN)}"
    of = " of the data" if known else f" of {len(margins)}"
    values = sorted({str(value) for value in margins[bad].tolist()})
    dtype = str(margins.dtype).removeprefix("torch.")
    return f"rank {rank}, row{'s' * (len(bad) > 1)} {shown}{of} ({', '.join(values)}, {dtype})"
