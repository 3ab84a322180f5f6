"""How many rounds of an exchange are under way at once: as many as the latency of the links asks for."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

Members: TypeAlias = Sequence[int]
"""Ranks of a group, in the order of a channel."""

_KEPT = 16  # exchanges that tell the rate
_NEGLIGIBLE = 0.1  # of a slice's time: a latency that another round need not hide


@dataclass
class _Rate:
    """moved: (bytes, seconds of the link) of the latest exchanges."""

    moved: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_KEPT))

    @property
    def s_per_byte(self) -> float | None:
        moved_bytes, seconds = (math.fsum(column) for column in zip(*self.moved, strict=True)) if self.moved else (0, 0)
        return seconds / moved_bytes if moved_bytes else None


class Pace:
    """Chooses how many rounds of an exchange are under way at once.

    In a round every rank sends one slice and receives one, so a single round under way gives each link one stream each
    way, which fills it best: more streams share it unevenly, and some links idle while others end. But between two
    rounds the link idles for a latency. With latency L and t seconds for a slice,

        under way = 1 + ceil(L / t), and 1 where L / t is negligible

    hides it with as few streams as can be. L is what the monitor has measured, t follows from how long the latest
    exchanges took, so both follow the links. Ranks need not agree: all post the same messages in the same order.

    Args:
        latency_s: seconds from the end of one slice to the first byte of the next with the farthest of these ranks, or
            infinity where it is not known.
    """

    def __init__(self, latency_s: Callable[[Members], float]) -> None:
        self._latency_s = latency_s
        self._rates: dict[tuple[int, ...], _Rate] = {}

    def choose(self, members: Members, slice_bytes: int) -> int:
        """Rounds under way at once, 1 to the number of members less 1, for the next exchange.

        Args:
            members: that take part, two at least.
            slice_bytes: the largest that this rank sends or receives.
        """
        most = len(members) - 1
        latency_s = self._latency_s(members)
        s_per_byte = self._rate(members).s_per_byte
        if math.isinf(latency_s):
            return most
        if s_per_byte is None:
            return min(2, most)
        waiting = latency_s / max(1e-9, slice_bytes * s_per_byte)
        return min(most, 1 + max(0, math.ceil(waiting - _NEGLIGIBLE)))

    def tell(self, members: Members, moved_bytes: int, under_way: int, seconds: float) -> None:
        """An exchange has taken so many seconds with so many rounds under way.

        Args:
            moved_bytes: that this rank has sent, or received, whichever is more.
        """
        latency_s = self._latency_s(members)
        waves = math.ceil((len(members) - 1) / under_way)
        idle_s = 0.0 if math.isinf(latency_s) else waves * latency_s
        self._rate(members).moved.append((moved_bytes, max(seconds - idle_s, seconds / 4)))

    def _rate(self, members: Members) -> _Rate:
        return self._rates.setdefault(tuple(members), _Rate())
