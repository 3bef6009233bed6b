"""A third party's loss: what another package needs to write."""

import torch

from focalpo_plugins import hookimpl


def hinge_loss(margins, offset=1.0):
    if offset <= 0:
        raise ValueError(f"offset must be above 0, got {offset!r}: the paper uses 1.")
    return torch.relu(offset - margins)


@hookimpl
def register_losses(register):
    register("hinge", hinge_loss, options={"offset": 1.0})
