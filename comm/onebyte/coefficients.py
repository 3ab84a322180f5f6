"""From committed bytes to integer coefficients: the same integers on every machine.

A round's update is w <- w - step * sum_s g_s z_s / N, with N the slopes that are there (or its square root), g_s what
byte s stands for, and z_s its direction. In units of a tensor's grid, 2^-exponent, the coefficient of z_s is

    q_s = -sign(g_s) * floor(x_s + u_s),    x_s = |g_s| * step / N * 2^exponent,

u_s uniform in [0, 1): the expected q_s is x_s, also where x_s is far below 1. u_s is a word of the run's stream.
step / N is rounded to fp32 and g_s is an fp32 number, so x_s is exact in fp64: nothing depends on a machine's libm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from thinwire.comm.onebyte.byte_code import ByteCode
from thinwire.comm.onebyte.errors import WeightRangeError
from thinwire.comm.onebyte.manifest import Manifest, Numerics
from thinwire.comm.onebyte.robust import combine
from thinwire.comm.onebyte.rounds import Round
from thinwire.comm.onebyte.step_size import Pace, next_pace, scale_of
from thinwire.comm.onebyte.stream import LARGEST_ELEMENT, VARIANCE, place, rounding_words

_MOST_UNITS = 1 << 30


@dataclass(frozen=True)
class Progress:
    """What a run has come to, beside its weights. rate_sum: of the learning rates since the last snapshot."""

    rounds: int = 0
    rate_sum: float = 0.0
    pace: Pace = field(default_factory=Pace)


@dataclass
class Slopes:
    """The slopes of some rounds one after the other, as the update sees them: absent ones are left out.

    places: words c2 and c3 of each direction; values: fp32 numbers; steps: step / N of its round; rounds: which it is.
    """

    c2: list[int] = field(default_factory=list)
    c3: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)

    def take(self, round_: Round, before: Progress, numerics: Numerics, code: ByteCode) -> Progress:
        """Read a round's bytes, combine and bound them as the run says. Returns the progress after the round."""
        shared = numerics.directions == "shared"
        pairs = combine(round_.contributions, numerics.robust, numerics.robust_steps, code, shared=shared)
        values = [value for _, _, value in pairs]
        pace, count = before.pace, len(values)
        if numerics.step_size != "fixed":
            pace = next_pace(pace, values, numerics.ema_decay)
        if count:
            step = round_.rate * scale_of(pace, numerics.step_size)
            step /= math.sqrt(count) if numerics.scaling == "sqrt" else count
            for slot, sample, _ in pairs:
                c2, c3 = place(round_.number, slot, sample)
                self.c2.append(c2)
                self.c3.append(c3)
            self.values += values
            self.steps += [step] * count
            self.rounds += [round_.number] * count
        return Progress(before.rounds + 1, before.rate_sum + round_.rate, pace)

    @property
    def places(self) -> Tensor:
        """int64 (directions, 2)."""
        return torch.stack((_int64(self.c2), _int64(self.c3)), dim=1)


def coefficients(slopes: Slopes, manifest: Manifest, key: int) -> Tensor:
    """int32 (tensors, directions): what each direction adds to each tensor, in units of the tensor's grid.

    Raises:
        WeightRangeError: a round could move a tensor by 2^30 units or more.
    """
    numerics, tensors = manifest.numerics, manifest.tensors
    if not slopes.values:
        return torch.empty(len(tensors), 0, dtype=torch.int32)
    sizes_of_slopes = _fp64(slopes.values).abs()
    steps = torch.outer(_fp64([entry.rate_scale for entry in tensors]), _fp64(slopes.steps))
    steps *= _fp64([_per_step(numerics, entry.eps_log2) for entry in tensors])[:, None]
    steps = steps.to(torch.float32).double()
    sizes = steps * _fp64([math.ldexp(1.0, entry.exponent) for entry in tensors])[:, None] * sizes_of_slopes
    limit = _MOST_UNITS // LARGEST_ELEMENT[numerics.distribution]
    if bool((sizes < limit).all()):
        whole = sizes.floor()
        up = rounding_words(key, slopes.places, len(tensors)) < (sizes - whole) * 2.0**32
        units = (whole + up).to(torch.int64)
        first = slopes.rounds[0]
        of_rounds = torch.zeros(len(tensors), slopes.rounds[-1] - first + 1, dtype=torch.int64)
        of_rounds.index_add_(1, _int64(slopes.rounds) - first, units)
        if bool((of_rounds < limit).all()):
            return (units * -_fp64(slopes.values).sign().to(torch.int64)).to(torch.int32)
    worst, most = divmod(int((steps * sizes_of_slopes).argmax()), len(slopes.values))
    raise WeightRangeError(
        f"round {slopes.rounds[most]} would move {tensors[worst].name} by {float(steps[worst, most]):.3g} * "
        f"{slopes.values[most]:.3g} along one direction, far beyond its grid: lower the learning rate"
    )


def _per_step(numerics: Numerics, eps_log2: int) -> float:
    """A tensor that is perturbed by other than the run's eps has a larger or smaller share in the slope."""
    return math.ldexp(1.0, numerics.eps_log2 - eps_log2) / VARIANCE[numerics.distribution]


def _fp64(numbers: list[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def _int64(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)
