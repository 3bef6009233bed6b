"""The line that a run prints after training, so that the user knows that it trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .messages import say


def say_done(
    steps: int,
    losses: Sequence[float],
    held_out: Mapping[str, float],
    output: str | None,
    report: str | None,
    *,
    since: int = 0,
    moved: Sequence[str] = (),
    best: str | None = None,
    saved: str | None = None,
) -> None:
    """Print the outcome in one line; call it on one rank only.

    Args:
        steps: optimizer steps of the run.
        losses: the logged losses, in order.
        held_out: the last evaluation's numbers, or those of ``best``, by name.
        output: the folder that the host saves the model to, as the user wrote it; None if the host
            leaves that to its user.
        report: the folder that ``focalpo report`` can read; None if there is none.
        since: the step of the first loss, if that of the run's first step isn't known.
        moved: for a loss that changes over the run, the options' values at the first and at the
            last logged step, such as ``gamma 0.5``.
        best: the checkpoint that was loaded after training as the best one.
        saved: the last checkpoint; only named if ``output`` is None.
    """
    parts = [f"done. {steps} step{'s' * (steps != 1)}"]
    if losses:
        begin = f"at step {since}" if since else "at first"
        first, last = (f" ({moved[i]})" if moved else "" for i in (0, -1))
        parts.append(f"loss {losses[0]:.4f} {begin}{first}, {losses[-1]:.4f} at last{last}")
    if best is not None:
        parts.append(f"the model is now that of {best}, the best checkpoint")
    if held_out:
        found = ", ".join(f"{name} {value:.3f}" for name, value in held_out.items())
        parts.append(f"held out{' there' * (best is not None)}: {found}")
    if output is not None:
        parts.append(f"the model goes to {output}")
    elif saved is not None:
        parts.append(f"the last checkpoint is {saved}")
    else:
        parts.append("the model is not saved yet: trainer.save_model() saves it")
    if report is not None:
        parts.append(f"next: focalpo report {report}")
    say("; ".join(parts))
