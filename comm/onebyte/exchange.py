"""How contributions become committed rounds: all that the optimizer knows of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from thinwire.comm.onebyte.rounds import Record


class Turn(NamedTuple):
    """What this machine evaluates next: directions 0 .. samples-1 of its slot in a round."""

    round: int
    slot: int
    samples: int


class Change(NamedTuple):
    """A record to carry out, or (undone) the newest one, to take back exactly."""

    record: Record
    undone: bool = False


class Exchange(Protocol):
    """Machines that commit rounds together."""

    def begin(self) -> Turn:
        """What to evaluate next. Blocks while this machine does not take part."""
        ...

    def commit(self, turn: Turn, codes: bytes, rate: float) -> Sequence[Change]:
        """Hand in this machine's codes; blocks until something is decided.

        Returns: what to carry out, in this order. It may lack the turn's round (the next begin() gives another), or
            hold many rounds, after a pause.
        """
        ...

    def close(self) -> None:
        """Leave."""
        ...


@runtime_checkable
class MeteredExchange(Exchange, Protocol):
    """An Exchange that has something to tell."""

    def metrics(self) -> dict[str, float]:
        """Numbers worth logging, by name."""
        ...
