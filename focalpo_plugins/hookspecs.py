"""The hook that a package implements to add a pairwise loss.

A package declares an entry point in the group ``focalpo_plugins`` that names a module, and in
that module::

    import torch
    from focalpo_plugins import hookimpl

    @hookimpl
    def register_losses(register):
        register("hinge", lambda margins: torch.relu(1 - margins))

After that ``rl: hinge`` trains this loss in Axolotl, and ``hinge`` is in every list of losses.
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
    """The function that a ``register_losses`` hook is given."""

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
                or double underscores, and not one of the registry's ``RESERVED_NAMES``, which hosts
                use.  OpenRLHF also refuses a loss whose name is the first word of one of its flags.
            loss: ``loss(margins, **options)`` returns the per-pair losses ``(B,)`` of the reward
                margins ``(B,)``: a floating-point tensor with a gradient, finite at margin 0.  It
                raises ``ValueError`` for an option out of range, with a message that begins with
                the option's name.
            weight: ``weight(margins, **options)``, the factors ``(B,)`` of the loss on DPO's
                gradient.  Without it the diagnostics ``NAME/weight`` and ``NAME/reversed`` are left
                out.
            reversal: ``reversal(**options)``, the margin below which the weight is negative.
            options: the options' names and default values.  JSON must be able to hold the values,
                because a checkpoint records them.  A host's key for the option ``o`` is ``NAME_o``,
                its flag is ``--NAME.o``.  A name is an identifier without outer or double
                underscores, and not one of ``RESERVED_OPTIONS``, which every loss has in a host.
            help: for each option, a phrase that says what it does, for the hosts' ``--help``.
            at: for a loss that changes over the run.  ``at(progress, **options)`` returns the
                options, by name, for the calls of the functions above at a point of the run.
                ``progress`` is 0 at the first optimizer step and 1 at the last.  Evaluations use 1,
                so that their losses can be compared.  A returned number that changes over the run
                is logged as ``NAME/OPTION``.  The result must depend only on the arguments, so that
                a resumed run continues like an uninterrupted one.

        ``loss`` is called with all options by name, or with those that ``at`` returns.  ``weight``
        and ``reversal`` are called with the options that they name, or with all options if they
        take ``**options``.  All functions are tried before training: one that can't be called in
        this way stops the run.

        Raises:
            ValueError: a name breaks a rule above or is taken, or a default is a value that JSON
                can't hold.
        """


@hookspec
def register_losses(register: Register) -> None:
    """Call ``register(name, loss)`` once for each loss.

    :meth:`Register.__call__` describes its other arguments.
    """
