"""What a machine has to do at one step, decided without asking anybody."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from thinwire.comm.gossip.mixing import Mixing


@dataclass(frozen=True)
class Turn:
    """One step's duty.

    Args:
        step: optimizer steps taken before this one.
        round: exchanges before this one; the number of this one, where mixing is given.
        mixing: the weights of this step's exchange; None: no exchange.
        merge: afterwards all machines take the global average.
    """

    step: int
    round: int
    mixing: Mixing | None
    merge: bool = False


class Schedule(Protocol):
    """When to talk: a pure function of the step, the same on every machine."""

    def turn(self, step: int) -> Turn:
        """The duty of step 0, 1, 2, ..."""
        ...
