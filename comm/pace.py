"""How many rounds of an exchange are under way at once: learnt from how long the exchanges took."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

_TRIALS, _KEPT, _ANOTHER_EVERY = 3, 5, 32


@dataclass
class _Known:
    """seconds: of the latest exchanges, by the number of rounds that were under way."""

    seconds: dict[int, deque[float]]
    exchanges: int = 0


@dataclass
class Pace:
    """Chooses for exchanges of like size, among as many ranks, how many rounds are under way at once.

    One fills a link best where its bytes take longer than its latency: more streams share it unevenly, and some links
    idle while others end. Where latency is longer, it hides behind other rounds. Which of the two it is depends on the
    size, the rate and the delay, and changes with them. So one, two and all are tried, each some times in a row, since
    the last frames of an exchange delay the next; then the one with the least median of its latest times is taken, and
    now and then another. Ranks need not agree: all of them post the same messages in the same order.
    """

    _known: dict[tuple[int, int], _Known] = field(default_factory=dict)

    def choose(self, ranks: int, slice_bytes: int) -> int:
        """Rounds under way at once, 1 to ranks - 1, for the next exchange of this size.

        Args:
            ranks: that take part, two at least.
            slice_bytes: the largest that this rank sends or receives.
        """
        known = self._of(ranks, slice_bytes)
        choices = list(known.seconds)
        for choice in choices:
            if len(known.seconds[choice]) < _TRIALS:
                return choice
        if known.exchanges % _ANOTHER_EVERY == 0:
            return choices[known.exchanges // _ANOTHER_EVERY % len(choices)]
        return min(choices, key=lambda choice: statistics.median(known.seconds[choice]))

    def tell(self, ranks: int, slice_bytes: int, choice: int, seconds: float) -> None:
        """An exchange of this size has taken so many seconds with so many rounds under way."""
        known = self._of(ranks, slice_bytes)
        known.exchanges += 1
        known.seconds[choice].append(seconds)

    def _of(self, ranks: int, slice_bytes: int) -> _Known:
        key = ranks, slice_bytes.bit_length()
        if key not in self._known:
            self._known[key] = _Known({n: deque(maxlen=_KEPT) for n in sorted({1, min(2, ranks - 1), ranks - 1})})
        return self._known[key]
