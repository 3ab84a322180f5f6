"""The two sorts of graphs: one that repeats its rounds, and one whose every round is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from thinwire.comm.gossip.mixing import Mixing


class Repeating:
    """Graph that goes through its mixings in turn; with one mixing, a static one."""

    def __init__(self, name: str, mixings: Sequence[Mixing]) -> None:
        assert mixings
        self.name = name
        self.size = mixings[0].size
        self.period = len(mixings)
        self.symmetric = all(mixing.symmetric for mixing in mixings)
        self._mixings = tuple(mixings)

    def mixing(self, round: int) -> Mixing:
        """As Graph says."""
        return self._mixings[round % self.period]


class Drawn:
    """Graph that never repeats.

    Args:
        draw: the mixing of a round; a pure function, the same on every machine.
    """

    period = 0

    def __init__(self, name: str, size: int, draw: Callable[[int], Mixing], *, symmetric: bool) -> None:
        self.name = name
        self.size = size
        self.symmetric = symmetric
        self._draw = lru_cache(maxsize=64)(draw)  # in a simulation all machines ask for the same rounds

    def mixing(self, round: int) -> Mixing:
        """As Graph says."""
        return self._draw(round)
