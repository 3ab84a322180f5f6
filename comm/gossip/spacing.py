"""Which of many rounds have an exchange, spaced as evenly as whole numbers allow."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """`count` exchanges among the rounds first..end-1.

    Args:
        end: None: for ever, and then every round has one.
        count: None: every round has one.
    """

    first: int
    end: int | None
    count: int | None = None

    def before(self, round: int) -> int:
        """How many exchanges come before a round."""
        passed = max(0, (round if self.end is None else min(round, self.end)) - self.first)
        if self.count is None or self.end is None:
            return passed
        return passed * self.count // (self.end - self.first) if self.end > self.first else 0

    def has(self, round: int) -> bool:
        """Whether a round has one."""
        return self.before(round + 1) > self.before(round)
