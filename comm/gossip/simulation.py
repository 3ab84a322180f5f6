"""Hundreds of machines in one process: their scripts, run one after another in virtual time."""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from thinwire.comm.gossip.inbox import Inbox
from thinwire.comm.gossip.message import Kind, Message
from thinwire.comm.gossip.port import Script, Wait


class Links(Protocol):
    """How long messages take. A pure function, or one of a seeded generator: runs repeat."""

    def arrival_s(self, source: int, to: int, payload_bytes: int, now_s: float) -> float | None:
        """When a message that is handed over now arrives; None: it is lost on the way."""
        ...


class Instant:
    """Links that take no time."""

    def arrival_s(self, source: int, to: int, payload_bytes: int, now_s: float) -> float | None:
        return now_s


class SimulatedPort:
    """Port of a machine in a Simulation.

    Attributes: sent_bytes, payload bytes so far, by receiver.
    """

    def __init__(self, simulation: Simulation, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.sent_bytes: dict[int, int] = defaultdict(int)
        self.inbox = Inbox()
        self.gone: set[int] = set()
        self._simulation = simulation

    def send(self, to: int, message: Message) -> None:
        if to not in self.gone:
            self.sent_bytes[to] += len(message.payload)
            self._simulation.carry(self.rank, to, message)

    def peek(self, source: int, kind: Kind, stream: int = 0) -> Message | None:
        return self.inbox.peek(source, kind, stream)

    def take(self, source: int, kind: Kind, stream: int = 0) -> Message:
        return self.inbox.take(source, kind, stream)

    def newest(self, source: int, kind: Kind, stream: int = 0) -> int:
        return self.inbox.newest(source, kind, stream)

    def waiting(self, kind: Kind, stream: int = 0) -> list[int]:
        return self.inbox.waiting(kind, stream)

    def lost(self) -> frozenset[int]:
        return frozenset(self.gone)

    def now(self) -> float:
        return self._simulation.now_s


class Simulation:
    """A world of machines that run scripts.

    Args:
        size: machines.
        links: between them.
    Attributes: now_s, virtual seconds; ports, by machine.
    """

    def __init__(self, size: int, links: Links | None = None) -> None:
        self.now_s = 0.0
        self.ports = [SimulatedPort(self, rank, size) for rank in range(size)]
        self._links = links or Instant()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = itertools.count()
        self._waits: dict[int, tuple[Wait, int]] = {}
        self._scripts: dict[int, Script[Any]] = {}
        self._results: dict[int, Any] = {}

    def run(self, scripts: Sequence[Script[Any]]) -> list[Any]:
        """Run one script per machine, all from now on, until each has ended; returns what they returned."""
        self._results = {}
        for rank, script in enumerate(scripts):
            self._scripts[rank] = script
            self.at(self.now_s, partial(self._resume, rank))
        while self._scripts:
            self.now_s, _, happen = heapq.heappop(self._events)
            happen()
        return [self._results.get(rank) for rank in range(len(scripts))]

    def at(self, time_s: float, happen: Callable[[], None]) -> None:
        """Do something at a virtual time."""
        heapq.heappush(self._events, (time_s, next(self._sequence), happen))

    def carry(self, source: int, to: int, message: Message) -> None:
        """Take a message on its way. Between two machines none overtakes another."""
        arrival = self._links.arrival_s(source, to, len(message.payload), self.now_s)
        if arrival is not None:
            self.at(arrival, lambda: self._deliver(source, to, message))

    def kill(self, rank: int) -> None:
        """End a machine's script; the others find it lost at once."""
        self._scripts.pop(rank, None)
        self._waits.pop(rank, None)
        for port in self.ports:
            if port.rank != rank:
                port.gone.add(rank)
                self._wake(port.rank)

    def _deliver(self, source: int, to: int, message: Message) -> None:
        self.ports[to].inbox.put(source, message)
        self._wake(to)

    def _wake(self, rank: int) -> None:
        if rank in self._waits and self._waits[rank][0].ready():
            self._resume(rank)

    def _resume(self, rank: int) -> None:
        self._waits.pop(rank, None)
        script = self._scripts.get(rank)
        if script is None:
            return
        try:
            wait = next(script)
            while wait.ready():
                wait = next(script)
        except StopIteration as end:
            self._results[rank] = end.value
            del self._scripts[rank]
            return
        number = next(self._sequence)
        self._waits[rank] = (wait, number)
        self.at(max(wait.until, self.now_s), lambda: self._time_is_up(rank, number))

    def _time_is_up(self, rank: int, number: int) -> None:
        if rank in self._waits and self._waits[rank][1] == number:
            self._resume(rank)


def pause(port_now_s: float, seconds: float) -> Wait:
    """A wait of so many seconds: what computing is in a simulation."""
    return Wait(lambda: False, port_now_s + seconds)
