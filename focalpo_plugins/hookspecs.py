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

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from .registry import Register

hookspec = pluggy.HookspecMarker("focalpo_plugins")
hookimpl = pluggy.HookimplMarker("focalpo_plugins")


@hookspec
def register_losses(register: Register) -> None:
    """Call ``register(name, loss)`` once for each loss; :meth:`.registry.Register.__call__` tells
    what else it takes."""
