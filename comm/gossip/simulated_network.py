"""A network in virtual time: rates, delays, losses and cuts between simulated machines."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from thinwire.comm.gossip.simulation import TryAgain

HEADER_BYTES = 48  # what a message takes on the wire beside its payload


@dataclass(frozen=True)
class Trunk:
    """What lies between two machines, for each direction by itself.

    Args:
        rate_bps: bits per second, shared by all pairs that are given the same object: one line between two sites.
        delay_s: one way.
    """

    rate_bps: float = math.inf
    delay_s: float = 0.0


@dataclass(frozen=True)
class Cut:
    """For a while nothing passes between two groups of machines; what is sent waits, as TCP would have it.

    Args:
        side, other: the groups; other None: all that are not in side.
        begin_s, end_s: from when on, and until when, virtual seconds.
    """

    side: frozenset[int]
    begin_s: float
    end_s: float
    other: frozenset[int] | None = None

    def separates(self, a: int, b: int, now_s: float) -> bool:
        """Whether a message between a and b has to wait."""
        if not self.begin_s <= now_s < self.end_s:
            return False
        other = self.other
        return any(
            p in self.side and (q not in self.side if other is None else q in other) for p, q in ((a, b), (b, a))
        )


class Network:
    """Links of a Simulation: every machine has a line of its own to a switch that is never busy.

    A message occupies the sender's line, then the path between the two, then the receiver's line, each in the order in
    which messages were handed over; its first bit goes on while its last one is still on its way.

    Args:
        rate_bps: of each machine's line, in each direction.
        delay_s: one way between two machines.
        lines: rates of machines that have other lines.
        paths: what lies between particular pairs (a, b), both ways; its delay takes the place of delay_s.
        cuts: times when machines cannot reach one another.
        loss: share of messages that do not arrive at the first try.
        resend_s: after which a lost message is sent again; None: it is gone, which a Port forbids: only algorithms that
            heal losses by themselves stand it.
        seed: of the losses.
    Raises:
        ValueError: a number that no network has.
    """

    def __init__(
        self,
        *,
        rate_bps: float = math.inf,
        delay_s: float = 0.0,
        lines: Mapping[int, float] | None = None,
        paths: Mapping[tuple[int, int], Trunk] | None = None,
        cuts: Sequence[Cut] = (),
        loss: float = 0.0,
        resend_s: float | None = 0.2,
        seed: int = 0,
    ) -> None:
        for name, value in (("rate_bps", rate_bps), *((f"lines[{m}]", r) for m, r in (lines or {}).items())):
            if not value > 0:
                raise ValueError(f"{name}: {value} bits per second; a rate is above 0")
        if not 0 <= delay_s < math.inf:
            raise ValueError(f"delay_s: {delay_s}; a delay is 0 or more, and ends")
        if not 0 <= loss < 1:
            raise ValueError(f"loss: {loss}; the share of messages lost is 0 up to, not including, 1")
        self._rate_bps = rate_bps
        self._delay_s = delay_s
        self._lines = dict(lines or {})
        self._paths = dict(paths or {})
        self._cuts = tuple(cuts)
        self._loss = loss
        self._resend_s = resend_s
        self._chance = np.random.Generator(np.random.Philox(key=seed))
        self._up_free_s: dict[int, float] = defaultdict(float)
        self._down_free_s: dict[int, float] = defaultdict(float)
        self._path_free_s: dict[tuple[int, bool], float] = defaultdict(float)

    def arrival_s(self, source: int, to: int, payload_bytes: int, now_s: float) -> float | TryAgain | None:
        """As Links says."""
        cut_until_s = max((cut.end_s for cut in self._cuts if cut.separates(source, to, now_s)), default=None)
        if cut_until_s is not None:
            return TryAgain(cut_until_s)
        late_s = 0.0
        while self._loss and self._chance.random() < self._loss:
            if self._resend_s is None:
                return None
            late_s += self._resend_s
        bits = 8 * (payload_bytes + HEADER_BYTES)
        path = self._paths.get((source, to)) or self._paths.get((to, source))
        delay_s = self._delay_s if path is None else path.delay_s
        up_s = bits / self._lines.get(source, self._rate_bps)
        begin_s = max(now_s, self._up_free_s[source])
        self._up_free_s[source] = begin_s + up_s
        end_s = begin_s + up_s
        if path is not None:
            direction = (id(path), source < to)
            begin_s = max(begin_s, self._path_free_s[direction])
            self._path_free_s[direction] = begin_s + bits / path.rate_bps
            end_s = max(end_s, self._path_free_s[direction])
        down_s = bits / self._lines.get(to, self._rate_bps)
        begin_s = max(begin_s + delay_s, self._down_free_s[to])
        self._down_free_s[to] = begin_s + down_s
        return max(end_s + delay_s, self._down_free_s[to]) + late_s
