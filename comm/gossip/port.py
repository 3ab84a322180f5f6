"""What a script sees of the other machines, and the one thing it yields: a wait."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar

from thinwire.comm.gossip.message import Kind, Message

T = TypeVar("T")


@dataclass(frozen=True)
class Wait:
    """Go on once `ready()` holds, or at the time `until` (seconds of Port.now()), whichever is first.

    ready: reads the port only; asked again whenever a message arrives or a machine is lost.
    """

    ready: Callable[[], bool]
    until: float


Script: TypeAlias = Generator[Wait, None, T]
"""Code of one machine that yields where it must wait, and returns a T."""


class Port(Protocol):
    """One machine's connection to the others. Sending never blocks; what has arrived waits until it is taken.

    Between two machines messages of a kind and stream arrive in the order in which they were sent, each once, as long
    as both live; a machine that dies or cannot be reached for the deadline is lost to the others.

    Attributes: rank, of this machine; size, of the whole, with the lost ones.
    """

    rank: int
    size: int

    def send(self, to: int, message: Message) -> None:
        """Hand over a message; one to a lost machine is dropped."""
        ...

    def peek(self, source: int, kind: Kind, stream: int = 0) -> Message | None:
        """The oldest message of this kind from `source` that has not been taken."""
        ...

    def take(self, source: int, kind: Kind, stream: int = 0) -> Message:
        """Remove and return what peek() shows; there must be one."""
        ...

    def newest(self, source: int, kind: Kind, stream: int = 0) -> int:
        """The highest round of any message of this kind that has arrived from `source` since it joined; -1: none."""
        ...

    def waiting(self, kind: Kind, stream: int = 0) -> list[int]:
        """Machines with a message of this kind that has not been taken, by the arrival of their oldest."""
        ...

    def lost(self) -> frozenset[int]:
        """Machines that are gone. One that comes back in the same place is no longer lost once it takes part."""
        ...

    def generation(self, rank: int) -> int:
        """How often a machine has begun anew in this place since this one started.

        It does when its process starts again, and when it comes back after the two have counted one another as lost: of
        what either sent before and the other had not received, nothing arrives any more. What a script sends right
        after this call is of this generation, or is dropped.
        """
        ...

    def now(self) -> float:
        """Seconds since some moment; of this machine alone."""
        ...


def at_once(script: Script[T]) -> T:
    """Run a script that has nothing to wait for, such as that of a machine alone."""
    try:
        next(script)
    except StopIteration as end:
        result: T = end.value
        return result
    raise AssertionError("the script waits for other machines")
