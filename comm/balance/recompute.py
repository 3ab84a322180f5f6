"""Which micro-batch a recomputed forward pass belongs to."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor

from thinwire.comm.balance.unit import Unit


def recognise(step: Sequence[Unit], layer: int, row: Tensor) -> Unit:
    """The micro-batch whose counts this recomputation repeats.

    A reentrant checkpoint builds its graph in the recomputation, which may come in any order; the routing tells which
    it is. Two that routed alike are balanced alike.

    Args:
        row: what the recomputation would count.
    """
    assert step, "a backward pass without a forward pass"
    if len(step) == 1:
        return step[0]
    distances = [(unit.row(layer) - row).abs().sum() for unit in step]
    nearest = min(range(len(step)), key=lambda place: int(distances[place]))
    if int(distances[nearest]):
        warnings.warn(
            "recomputing a checkpointed block selected other experts than its first forward pass: its router draws "
            "random numbers that the checkpoint does not repeat; leave preserve_rng_state on, or draw none",
            RuntimeWarning,
            stacklevel=2,
        )
    return step[nearest]
