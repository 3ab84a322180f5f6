"""Random numbers of a round, the same on every machine: a pure function of seed, round and purpose."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Purpose(IntEnum):
    """What is drawn; no two purposes see the same numbers."""

    MATCHING = 1
    ERDOS_RENYI = 2
    EQUI = 3
    THINNING = 4
    EDGE_USE = 5
    PROBE = 5


def raw(purpose: Purpose, seed: int, round: int, count: int) -> NDArray[np.uint64]:
    """`count` independent numbers, uniform in 0..2^64-1.

    They come straight from Philox (Salmon et al. 2011), whose stream numpy keeps from version to version; that of its
    generator's shuffle() and integers() may change, and machines of two versions would draw different graphs.

    Args:
        seed, round: 0..2^64-1.
    """
    key = np.array([seed, round], dtype=np.uint64)
    counter = np.array([0, 0, 0, purpose], dtype=np.uint64)
    drawn: NDArray[np.uint64] = np.random.Philox(key=key, counter=counter).random_raw(count)
    return drawn


def unit(purpose: Purpose, seed: int, round: int, count: int) -> NDArray[np.float64]:
    """`count` independent numbers, uniform in [0, 1) on the grid of 2^-53."""
    return (raw(purpose, seed, round, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(purpose: Purpose, seed: int, round: int, size: int) -> list[int]:
    """The machines in an order of which each is as likely as another."""
    order: list[int] = np.argsort(raw(purpose, seed, round, size), kind="stable").tolist()
    return order
