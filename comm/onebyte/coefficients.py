"""From committed bytes to integer coefficients: the same integers on every machine.

A round's update is w <- w - step * sum_s g_s z_s / N, with N the slopes that are there (or its square root), g_s what
byte s stands for, and z_s its direction. In units of a tensor's grid, 2^-exponent, the coefficient of z_s is

    q_s = -sign(g_s) * floor(x_s + u_s),    x_s = |g_s| * step / N * 2^exponent,

u_s uniform in [0, 1): the expected q_s is x_s, also where x_s is far below 1. u_s is a word of the run's stream.
step / N is rounded to fp32 and g_s is an fp32 number, so x_s is exact in fp64: nothing depends on a machine's libm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.comm.onebyte.byte_code import ByteCode
from thinwire.comm.onebyte.manifest import Manifest
from thinwire.comm.onebyte.robust import combine
from thinwire.comm.onebyte.rounds import Round
from thinwire.comm.onebyte.step_size import Pace, scale_of
from thinwire.comm.onebyte.stream import place, rounding_words

_VARIANCE = {"rademacher": 1.0, "gaussian": 8.0}
_MOST_UNITS = 1 << 30


class WeightRangeError(ArithmeticError):
    """A step would move weights beyond what their grid can hold: training has diverged, or the grid is too fine."""


@dataclass(frozen=True)
class Slopes:
    """A round as the update sees it: slopes, fp64 (n,), along the directions at `places`, int64 (n, 2)."""

    places: Tensor
    values: Tensor


def slopes_of(round_: Round, manifest: Manifest) -> Slopes:
    """Read a round's bytes, combine and bound them as the manifest says; absent ones are left out."""
    numerics, code = manifest.numerics, ByteCode(manifest.numerics.floor_log2)
    shared = numerics.directions == "shared"
    pairs = combine(round_.contributions, numerics.robust, numerics.robust_steps, code, shared=shared)
    places = [place(round_.number, slot, sample) for slot, sample, _ in pairs]
    values = [value for _, _, value in pairs]
    return Slopes(torch.tensor(places, dtype=torch.int64).reshape(-1, 2), torch.tensor(values, dtype=torch.float64))


def coefficients(slopes: Slopes, rate: float, pace: Pace, manifest: Manifest, key: int) -> Tensor:
    """int32 (tensors, directions): what each direction adds to each tensor, in units of the tensor's grid.

    Args:
        rate: the round's learning rate.
        pace: what earlier rounds and this one say of the size of slopes.
    Raises:
        WeightRangeError: a tensor would move by 2^30 units or more.
    """
    numerics, count = manifest.numerics, len(slopes.values)
    if not count:
        return torch.empty(len(manifest.tensors), 0, dtype=torch.int32)
    step = rate * scale_of(pace, numerics.step_size) / (math.sqrt(count) if numerics.scaling == "sqrt" else count)
    units = [
        math.ldexp(step * entry.rate_scale, numerics.eps_log2 - entry.eps_log2) / _VARIANCE[numerics.distribution]
        for entry in manifest.tensors
    ]
    steps = torch.tensor(units, dtype=torch.float64).to(torch.float32).double()
    per_unit = torch.tensor([math.ldexp(1.0, entry.exponent) for entry in manifest.tensors], dtype=torch.float64)
    sizes = (steps * per_unit)[:, None] * slopes.values.abs()
    if not bool((sizes.sum(dim=1) < _MOST_UNITS).all()):
        worst = manifest.tensors[int(sizes.sum(dim=1).argmax())].name
        raise WeightRangeError(
            f"one round would move {worst} by {float((steps[:, None] * slopes.values.abs()).max()):.3g}: lower the "
            "learning rate"
        )
    whole = sizes.floor()
    up = rounding_words(key, slopes.places, len(manifest.tensors)) < (sizes - whole) * 2.0**32
    signs = -slopes.values.sign()
    return ((whole + up) * signs).to(torch.int32)
