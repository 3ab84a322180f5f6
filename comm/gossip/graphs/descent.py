"""The minimum of a smooth function of some hundreds of numbers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_MEMORY = 20
_STEPS = 400
_ENOUGH = 1e-9  # gained in ten steps, it goes on


def descend(function: Callable[[Array], tuple[float, Array]], start: Array) -> Array:
    """Limited-memory BFGS (Nocedal 1980) with steps halved until they gain enough.

    Args:
        function: gives value and gradient; a value that is infinite is out of bounds.
    Returns: where ten steps gain less than 1e-9, or after 400.
    """
    at = start
    value, gradient = function(at)
    memory: deque[tuple[Array, Array]] = deque(maxlen=_MEMORY)
    earlier = value
    for number in range(1, _STEPS + 1):
        direction = -_scaled(gradient, memory)
        slope = float(direction @ gradient)
        if slope >= 0:  # the memory misleads: start afresh
            memory.clear()
            direction, slope = -gradient, -float(gradient @ gradient)
        if -slope < 1e-15:
            break
        length = min(1.0, 2.0 / float(np.abs(direction).max()))
        while True:
            there = at + length * direction
            new_value, new_gradient = function(there)
            if new_value <= value + 1e-4 * length * slope:
                break
            length /= 2
            if length < 1e-12:
                return at
        step, change = there - at, new_gradient - gradient
        if float(step @ change) > 1e-12 * float(np.linalg.norm(step) * np.linalg.norm(change)):
            memory.append((step, change))
        at, value, gradient = there, new_value, new_gradient
        if number % 10 == 0:
            if earlier - value < _ENOUGH:
                break
            earlier = value
    return at


def _scaled(gradient: Array, memory: deque[tuple[Array, Array]]) -> Array:
    """The gradient times the approximate inverse of the second derivatives."""
    direction = gradient.copy()
    kept = []
    for step, change in reversed(memory):
        share = float(step @ direction) / float(step @ change)
        direction -= share * change
        kept.append(share)
    if memory:
        step, change = memory[-1]
        direction *= float(step @ change) / float(change @ change)
    for (step, change), share in zip(memory, reversed(kept), strict=True):
        direction += (share - float(change @ direction) / float(step @ change)) * step
    return direction
