"""How fast a rank draws the directions of method onebyte and adds them to its weights, while all ranks do."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from thinwire.dist.plan.cluster import SweepSpeed
from thinwire.dist.probe.clock import Lockstep
from thinwire.kernels.lattice_add import lattice_add

_NUMEL = 1 << 18
_FEW, _MANY = 2, 10  # directions: their difference leaves out what a pass costs in itself
_REPEATS = 3


def measure_directions(lockstep: Lockstep) -> SweepSpeed:
    """Of the slowest rank. Collective."""
    weights = torch.zeros(_NUMEL, device=lockstep.device)
    out = torch.empty_like(weights)

    def sweep(directions: int) -> Callable[[], object]:
        places = torch.arange(2 * directions, device=lockstep.device).view(-1, 2)
        units = torch.ones(directions, dtype=torch.int32, device=lockstep.device)
        return lambda: lattice_add(weights, units, places, key=0, tensor=0, exponent=24, out=out)

    # The first call may compile.
    few, many = (statistics.median(lockstep.time(sweep(count), 1 + _REPEATS)[1:]) for count in (_FEW, _MANY))
    direction_s = max(0.0, many - few) / (_MANY - _FEW)
    return SweepSpeed(pass_s=max(0.0, few - _FEW * direction_s) / _NUMEL, direction_s=direction_s / _NUMEL)
