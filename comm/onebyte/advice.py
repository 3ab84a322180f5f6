"""Warnings of settings that are allowed and yet do little: what a byte cannot say, what a 16-bit weight cannot show."""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from thinwire.comm.onebyte.byte_code import ABSENT, LARGEST, SIGN, ZERO, ByteCode
from thinwire.comm.onebyte.manifest import TensorEntry
from thinwire.comm.onebyte.rounds import Round
from thinwire.comm.onebyte.settings import nearest_log2

_log = logging.getLogger("thinwire")

_ROUNDS = 100
_SATURATED, _ZERO = 0.01, 0.5
_OCTAVES_BELOW = 8  # of the code's nearly 16: the median slope belongs into its middle
_MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10}


class RangeWatch:
    """Warns once if, over 100 rounds, too many slopes are beyond what `slope_floor` lets a byte say."""

    def __init__(self, code: ByteCode) -> None:
        self._code = code
        self._counts: deque[tuple[int, int, int]] = deque(maxlen=_ROUNDS)  # present, saturated, zero
        self._own: deque[float] = deque(maxlen=_ROUNDS)
        self._has_warned = False

    def take(self, round_: Round, own: Sequence[float]) -> None:
        """Count a committed round. own: slopes that this machine has measured, as they were before the code."""
        codes = b"".join(contribution.codes for contribution in round_.contributions)
        saturated = codes.count(LARGEST) + codes.count(LARGEST | SIGN)
        self._counts.append((len(codes) - codes.count(ABSENT), saturated, codes.count(ZERO)))
        self._own.extend(abs(slope) for slope in own if slope and math.isfinite(slope))
        if len(self._counts) == _ROUNDS and not self._has_warned:
            present, saturated, zero = (sum(column) for column in zip(*self._counts, strict=True))
            if saturated > _SATURATED * present or zero > _ZERO * present:
                self._has_warned = True
                self._warn(saturated / present, zero / present)

    def _warn(self, saturated: float, zero: float) -> None:
        floor = self._code.floor_log2
        if self._own:
            better = nearest_log2(statistics.median(self._own)) - _OCTAVES_BELOW
        else:
            better = floor + (_OCTAVES_BELOW if saturated > _SATURATED else -_OCTAVES_BELOW)
        _log.warning(
            "method.slope_floor: %g lets a byte say slopes from that to %.3g; of the last %d rounds' slopes, %.1f %% "
            "were larger and %.1f %% were taken for zero. Begin a run with slope_floor: %g",
            2.0**floor,
            self._code.values[LARGEST],
            _ROUNDS,
            100 * saturated,
            100 * zero,
            2.0**better,
        )


def warn_of_invisible_eps(tensors: Iterable[tuple[TensorEntry, Tensor]]) -> None:
    """Warn of 16-bit tensors in which adding eps moves fewer than half of the weights.

    Args:
        tensors: entries of the run, and their parameters.
    """
    found = [(entry, share) for entry, parameter in tensors if (share := _moved_share(entry, parameter)) < 0.5]
    if found:
        worst, least = min(found, key=lambda pair: pair[1])
        names = ", ".join(entry.name for entry, _ in found[:3]) + (" and others" if len(found) > 3 else "")
        _log.warning(
            "OneByteSPSA: eps 2^%d is lost in the rounding of %s weights: it moves %.0f %% of %s. Of so little, the "
            "loss tells nothing: keep %s in float32, or give a group of theirs a larger eps",
            worst.eps_log2,
            worst.dtype,
            100 * least,
            worst.name,
            names,
        )


def _moved_share(entry: TensorEntry, parameter: Tensor) -> float:
    """Share of weights whose 16-bit image changes by adding eps: those of which it is more than half of a last bit."""
    bits = _MANTISSA_BITS.get(parameter.dtype)
    if bits is None:
        return 1.0
    octave = torch.frexp(parameter.detach().float()).exponent - 1
    return float((octave - bits - 1 < entry.eps_log2).float().mean())
