"""The hook that a package implements to add a pairwise loss.

A package declares an entry point in the group ``focalpo_plugins`` that names a module, and in
that module::

    import torch
    from focalpo_plugins import hookimpl

    @hookimpl
    def register_losses(register):
        register("hinge", lambda margins: torch.relu(1 - margins))

From then on ``rl: hinge`` trains in Axolotl, and ``hinge`` is offered wherever losses are listed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import pluggy

if TYPE_CHECKING:
    from torch import Tensor

hookspec = pluggy.HookspecMarker("focalpo_plugins")
hookimpl = pluggy.HookimplMarker("focalpo_plugins")


class Register(Protocol):
    """What a ``register_losses`` hook is given to call."""

    def __call__(
        self,
        name: str,
        loss: Callable[..., Tensor],
        *,
        weight: Callable[..., Tensor] | None = None,
        reversal: Callable[..., float] | None = None,
        options: Mapping[str, Any] | None = None,
        help: Mapping[str, str] | None = None,
        at: Callable[..., Mapping[str, Any]] | None = None,
    ) -> None:
        """Add a loss.

        Args:
            name: what the user writes as ``rl: NAME``; an identifier in lower case, without outer
                or double underscores, and none of the registry's ``RESERVED_NAMES``, which hosts
                use.
            loss: ``loss(margins, **options)`` gives per-pair losses of the shape ``(B,)`` of the
                reward margins; it raises ``ValueError`` for an option out of range, with a message
                that begins with the option's name.
            weight: ``weight(margins, **options)``, what the loss multiplies DPO's gradient by.
                Without it the diagnostics ``NAME/weight`` and ``NAME/reversed`` are left out.
            reversal: ``reversal(**options)``, the margin below which the weight is negative.
            options: the options' names and default values, which JSON can hold: a checkpoint says
                them.  A host's key for the option ``o`` is ``NAME_o``, its flag ``--NAME.o``.  A
                name is an identifier without outer or double underscores, and none of
                ``RESERVED_OPTIONS``, which every loss has in a host.
            help: what each option does, a phrase each, for the hosts' ``--help``.
            at: ``at(progress, **options)`` gives the options by name that the functions above are
                called with at a point of the run, for a loss that changes as it trains: progress is
                0 at the first optimizer step and 1 at the last.  A number among them that changes
                over the run is logged as ``NAME/OPTION``.  It has to be a function of its
                arguments alone, so that a resumed run goes on as the uninterrupted one.

        ``loss`` is called with all options by name, or with what ``at`` gives.  ``weight`` and
        ``reversal`` are called with those that they name, or with all where they take
        ``**options``.

        Raises:
            ValueError: a name is not as said above or is taken, a default is nothing that JSON can
                hold, or a function can't be called in this way.
        """


@hookspec
def register_losses(register: Register) -> None:
    """Call ``register(name, loss)`` once for each loss; :meth:`Register.__call__` tells what
    else it takes."""
