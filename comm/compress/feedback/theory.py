"""Constants and step sizes of EF21's theory, in plain numbers.

A compressor C with ||C(x) - x||^2 <= (1 - alpha) ||x||^2 has contraction factor alpha (Top-k of d: k/d). L is the
smoothness constant of f = mean f_i, L_i that of rank i's f_i; L <= mean L_i always, so mean L_i may stand for L.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def theta(alpha: float) -> float:
    """1 - sqrt(1 - alpha): how fast the estimates g_i forget their error."""
    _check_alpha(alpha)
    return 1.0 - math.sqrt(1.0 - alpha)


def beta(alpha: float) -> float:
    """(1 - alpha) / (1 - sqrt(1 - alpha)): how much a change of the gradient adds to it."""
    return (1.0 - alpha) / theta(alpha)


def xi(alpha: float) -> float:
    """sqrt(beta / theta) = (1 + sqrt(1 - alpha)) / alpha - 1: what compression costs; 0 without any."""
    _check_alpha(alpha)
    return (1.0 + math.sqrt(1.0 - alpha)) / alpha - 1.0


def quadratic_mean(smoothness: Sequence[float]) -> float:
    """L_QM = sqrt(mean L_i^2)."""
    return math.sqrt(sum(value * value for value in _checked(smoothness)) / len(smoothness))


def arithmetic_mean(smoothness: Sequence[float]) -> float:
    """L_AM = mean L_i, at most L_QM."""
    return sum(_checked(smoothness)) / len(smoothness)


def step_size(L: float, alpha: float, mean_smoothness: float) -> float:
    """The largest step size that is proven: 1 / (L + mean_smoothness * xi(alpha)).

    Args: mean_smoothness, quadratic_mean() as in EF21 (arXiv 2106.05203); arithmetic_mean() as in Richtárik, Gasanov,
    Burlachenko (2024), arXiv 2402.10774, for EF21-W and, with its sharper proof, for EF21 unchanged.
    """
    return 1.0 / (L + mean_smoothness * xi(alpha))


def step_size_partial(
    L: float, alpha: float, mean_smoothness: float, participation: float, *, rho: float | None = None
) -> float:
    """The same when each rank takes part with this probability (EF21-PP, arXiv 2110.03294).

    1 / (L + mean_smoothness * sqrt(B / theta_p)),  theta_p = theta p - rho (1 - p),  B = beta p + (1 + 1/rho) (1 - p).

    Args: rho, free within 0 < rho < theta p / (1 - p); default: the best. With p = 1 this is step_size().
    Raises:
        ValueError: rho or the probability is out of range.
    """
    if not 0.0 < participation <= 1.0:
        raise ValueError(f"participation: {participation} is not a probability above 0")
    absence = 1.0 - participation
    if absence == 0.0:
        return step_size(L, alpha, mean_smoothness)
    present, kept = beta(alpha) * participation + absence, theta(alpha) * participation
    # d/d rho of (present + absence / rho) / (kept - absence rho) is zero where present rho^2 + 2 absence rho = kept.
    if rho is None:
        rho = (math.sqrt(absence * absence + present * kept) - absence) / present
    if not 0.0 < rho < kept / absence:
        raise ValueError(f"rho: {rho} is not between 0 and theta p / (1 - p) = {kept / absence}")
    return 1.0 / (L + mean_smoothness * math.sqrt((present + absence / rho) / (kept - absence * rho)))


def weights(smoothness: Sequence[float]) -> list[float]:
    """EF21-W's w_i = L_i / sum L_j."""
    total = sum(_checked(smoothness))
    return [value / total for value in smoothness]


def clones(smoothness: Sequence[float]) -> list[int]:
    """N_i = ceil(L_i / L_AM): so many copies bring cloned_mean() below sqrt(2) L_AM, with at most 2 n in all."""
    mean = arithmetic_mean(smoothness)
    return [math.ceil(value / mean) for value in smoothness]


def cloned_mean(smoothness: Sequence[float], copies: Sequence[int]) -> float:
    """What takes the place of L_QM in EF21 when rank i is there copies[i] times, and each copy sends its part of f_i.

    (1/n) sqrt(sum_i L_i^2 N / N_i), N = sum N_i.
    """
    total = sum(copies)
    pairs = zip(_checked(smoothness), copies, strict=True)
    return math.sqrt(sum(value * value * total / count for value, count in pairs)) / len(smoothness)


def _check_alpha(alpha: float) -> None:
    if not 0.0 < alpha <= 1.0:
        raise ValueError(f"alpha: {alpha} is not a contraction factor; it must be above 0 and at most 1")


def _checked(smoothness: Sequence[float]) -> Sequence[float]:
    if not smoothness or not all(math.isfinite(value) and value >= 0.0 for value in smoothness) or not any(smoothness):
        raise ValueError(f"smoothness: {list(smoothness)} must be finite numbers, none negative, not all zero")
    return smoothness
