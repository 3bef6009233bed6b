"""What a run says once it has trained, so that one knows that it did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .messages import say


def say_done(
    steps: int,
    losses: Sequence[float],
    held_out: Mapping[str, float],
    output: str,
    report: str | None,
) -> None:
    """Say the outcome in one line; to be called on one rank.

    Args:
        steps: optimizer steps of the run.
        losses: those that were logged, in their order.
        held_out: the last evaluation's numbers, by what they are.
        output: the folder that the model goes to, as the user wrote it.
        report: what ``focalpo report`` reads; None where nothing was written that it could.
    """
    parts = [f"done. {steps} step{'s' * (steps != 1)}"]
    if losses:
        parts.append(f"loss {losses[0]:.4f} at first, {losses[-1]:.4f} at last")
    if held_out:
        found = ", ".join(f"{name} {value:.3f}" for name, value in held_out.items())
        parts.append(f"held out: {found}")
    parts.append(f"the model goes to {output}")
    if report is not None:
        parts.append(f"next: focalpo report {report}")
    say("; ".join(parts))
