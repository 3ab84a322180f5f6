"""The step size that follows from the committed slopes alone: every machine derives it, and nothing is sent.

    fixed   step = rate
    std     step = rate / s, s the standard deviation of the round's slopes   FZOO: Dang et al. 2025 (2506.09034)
    ema     step = rate / sqrt(v), v <- b v + (1 - b) mean g^2                MEAZO: 2605.03869

v is divided by 1 - b^t, as in Adam. Differs from FZOO: s is at least a quarter of the slopes' root mean square, and
that itself where there is one slope alone. Few slopes may be nearly alike by chance, above all once each is a byte, and
must not make a giant step of it.

Only +, -, *, / and square roots of fp64 numbers, which IEEE 754 defines to the last bit, and math.fsum, which rounds
once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_SMALLEST = 2.0**-40
_LEAST_SPREAD = 0.25


@dataclass(frozen=True)
class Pace:
    """What the slopes so far say.

    second_moment: running mean of g^2; weight: 1 - b^t; spread: s of the newest round.
    """

    second_moment: float = 0.0
    weight: float = 0.0
    spread: float = 0.0


def next_pace(pace: Pace, slopes: Sequence[float], decay: float) -> Pace:
    """The pace with a round's slopes taken up; a round without any changes nothing."""
    count = len(slopes)
    if not count:
        return pace
    mean_square = math.fsum(g * g for g in slopes) / count
    return Pace(
        second_moment=decay * pace.second_moment + (1.0 - decay) * mean_square,
        weight=decay * pace.weight + (1.0 - decay),
        spread=_spread(slopes, math.sqrt(mean_square)),
    )


def scale_of(pace: Pace, kind: str) -> float:
    """What the rate is multiplied by: fixed, std or ema."""
    if kind == "std":
        return 1.0 / max(pace.spread, _SMALLEST)
    if kind == "ema":
        return 1.0 / max(math.sqrt(pace.second_moment / pace.weight), _SMALLEST) if pace.weight else 1.0
    return 1.0


def _spread(slopes: Sequence[float], root_mean_square: float) -> float:
    if len(slopes) == 1:
        return root_mean_square
    mean = math.fsum(slopes) / len(slopes)
    variance = math.fsum((g - mean) * (g - mean) for g in slopes) / (len(slopes) - 1)
    return max(math.sqrt(variance), _LEAST_SPREAD * root_mean_square)
