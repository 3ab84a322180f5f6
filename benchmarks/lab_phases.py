"""One run at several link rates, one after another: which steps belong to which rate, and what a step takes there."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

_PERIODS = 3


class Phases:
    """Says when to change the links of a run that goes on, and which of its steps were wholly at which rate.

    The slowest rate comes first: a link that becomes slower loses frames, and at gigabits emulated links let frames
    overtake one another. TCP's windows would stay small for long after both, as on no link of the slower rate.

    Args:
        rates: bits per second.
        warm_up_steps: of the run, which do not count, nor does its first period: what is sent for the first time opens
            connections, compiles, and touches memory.
        period: steps from one synchronisation to the next; only whole periods count.
        settle_steps: that may have begun before a change of the links, which is made as soon as a step was seen to have
            ended.
        timed_steps: that are enough at a rate, in three whole periods at least. enough_s: so are fewer, once whole
            periods have taken so long.
    """

    def __init__(
        self,
        rates: Sequence[float],
        *,
        warm_up_steps: int = 2,
        period: int = 1,
        settle_steps: int = 1,
        timed_steps: int = 6,
        enough_s: float,
    ) -> None:
        self._rates = sorted(set(rates))
        self._period = period
        self._settle_steps = settle_steps
        self._wanted = max(_PERIODS, -(-timed_steps // period)) * period
        self._enough_s = enough_s
        self._first = warm_up_steps + (period if period > 1 else 0)
        self.timed: dict[float, tuple[int, int]] = {}

    @property
    def rate_bps(self) -> float | None:
        """The rate that the links must have now; None = all have been timed."""
        return self._rates[len(self.timed)] if len(self.timed) < len(self._rates) else None

    def see(self, step_s: Sequence[float]) -> bool:
        """Take in the seconds of all steps that have ended; returns whether the links must now change."""
        if self.rate_bps is None:
            return False
        clean = step_s[self._first :]
        whole = len(clean) // self._period * self._period
        if not whole or (whole < self._wanted and sum(clean[:whole]) < self._enough_s):
            return False
        self.timed[self.rate_bps] = (self._first, self._first + whole)
        self._first = len(step_s) + self._settle_steps
        return True


def steady_step_s(step_s: Sequence[float], period: int) -> float:
    """Seconds per step: the median of the means of whole periods, each of which has one synchronisation."""
    means = [statistics.mean(step_s[i : i + period]) for i in range(0, len(step_s) - period + 1, period)]
    return statistics.median(means)
