"""The line that a run prints after training, so that the user knows that it trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .messages import say


def say_done(
    steps: int,
    losses: Sequence[float],
    held_out: Mapping[str, float],
    output: str,
    report: str | None,
    since: int = 0,
) -> None:
    """Print the outcome in one line; call it on one rank only.

    Args:
        steps: optimizer steps of the run.
        losses: the logged losses, in order.
        held_out: the last evaluation's numbers, by name.
        output: the folder that the model is saved to, as the user wrote it.
        report: the folder that ``focalpo report`` can read; None if there is none.
        since: the step of the first loss, if that of the run's first step isn't known.
    """
    parts = [f"done. {steps} step{'s' * (steps != 1)}"]
    if losses:
        first = f"at step {since}" if since else "at first"
        parts.append(f"loss {losses[0]:.4f} {first}, {losses[-1]:.4f} at last")
    if held_out:
        found = ", ".join(f"{name} {value:.3f}" for name, value in held_out.items())
        parts.append(f"held out: {found}")
    parts.append(f"the model goes to {output}")
    if report is not None:
        parts.append(f"next: focalpo report {report}")
    say("; ".join(parts))
