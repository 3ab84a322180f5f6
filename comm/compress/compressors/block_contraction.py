"""How far block absmax quantisation can be from what it quantises."""

from __future__ import annotations

import math


def block_contraction(block: int, levels: int, *, stochastic: bool) -> float | None:
    """alpha in ||C(x) - x||^2 <= (1 - alpha) ||x||^2 for C(x)_i = s round(x_i / s), s = max |x_j| / levels.

    The worst case over all values of a block: with m = block - 1 elements beside the largest, nearest rounding gives
    1 - alpha = m / (m + 4 levels^2), where each of them lies half a step from zero. Stochastic rounding gives, in
    expectation, 1 - alpha = omega with omega (1 + omega) = m / (4 levels^2).

    Returns: alpha; None where it would not be positive.
    """
    others, squared = block - 1, levels**2
    if not stochastic:
        return 4 * squared / (others + 4 * squared)
    omega = (math.sqrt(1 + others / squared) - 1) / 2
    return 1 - omega if omega < 1 else None
