"""Hundreds of machines in one process: their scripts, run one after another in virtual time."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from thinwire.comm.gossip.inbox import Inbox
from thinwire.comm.gossip.message import Kind, Message
from thinwire.comm.gossip.port import Script, Wait


@dataclass(frozen=True)
class TryAgain:
    """Nothing gets through now: at_s, when to try again. What is sent meanwhile between the two waits behind it."""

    at_s: float


class Links(Protocol):
    """How long messages take. A pure function, or one of a seeded generator: runs repeat."""

    def arrival_s(self, source: int, to: int, payload_bytes: int, now_s: float) -> float | TryAgain | None:
        """When a message that sets off now arrives; None: it is lost on the way."""
        ...


class Instant:
    """Links that take no time."""

    def arrival_s(self, source: int, to: int, payload_bytes: int, now_s: float) -> float | None:
        return now_s


class SimulatedPort:
    """Port of a machine in a Simulation.

    Attributes: alive; sent_bytes, payload bytes so far, by receiver; sent, the same by (receiver, kind of message);
    sent_messages; inbox; gone, machines that this one has found lost; generations, by machine.
    """

    def __init__(self, simulation: Simulation, rank: int, size: int, gone: Iterable[int] = ()) -> None:
        self.rank = rank
        self.size = size
        self.alive = True
        self.sent_bytes: dict[int, int] = defaultdict(int)
        self.sent: dict[tuple[int, Kind], int] = defaultdict(int)
        self.sent_messages = 0
        self.inbox = Inbox()
        self.gone = set(gone)
        self.generations: dict[int, int] = defaultdict(int)
        self._simulation = simulation

    def send(self, to: int, message: Message) -> None:
        assert to != self.rank, f"machine {to} sends to itself"
        if self.alive and to not in self.gone:
            self.sent_bytes[to] += len(message.payload)
            self.sent[to, message.kind] += len(message.payload)
            self.sent_messages += 1
            self._simulation.carry(self, to, message)

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

    def generation(self, rank: int) -> int:
        return self.generations[rank]

    def now(self) -> float:
        return self._simulation.now_s


class Simulation:
    """A world of machines that run scripts.

    Machines run one after another, and only the order of events decides which is next: a run repeats bit for bit.

    Args:
        size: machines.
        links: between them; messages between two machines keep their order whatever it says.
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
        self._last_arrival_s: dict[tuple[int, int], float] = {}
        self._held: dict[tuple[int, int], deque[tuple[SimulatedPort, SimulatedPort, Message]]] = {}

    def run(self, scripts: Sequence[Script[Any] | None]) -> list[Any]:
        """Run scripts, by machine, all from now on, until each has ended; returns what they returned.

        Args: scripts, None for a machine that does nothing, such as one that is dead.
        Returns: by machine; None of one that was killed.
        Raises:
            RuntimeError: some wait for ever for what nobody will send.
        """
        self._results = {}
        for rank, script in enumerate(scripts):
            if script is not None:
                self.start(rank, script)
        while self._scripts:
            if not self._events:
                stuck = ", ".join(map(str, sorted(self._scripts)))
                raise RuntimeError(f"at {self.now_s:g} s machines {stuck} wait for ever: nothing is on its way to them")
            self.now_s, _, happen = heapq.heappop(self._events)
            happen()
        return [self._results.get(rank) for rank in range(len(self.ports))]

    def start(self, rank: int, script: Script[Any]) -> None:
        """Let a machine that has nothing to do run a script from now on; run() waits for its end too."""
        assert rank not in self._scripts, f"machine {rank} has a script"
        assert self.ports[rank].alive, f"machine {rank} is dead"
        self._scripts[rank] = script
        self.at(self.now_s, partial(self._resume, rank, script))

    def at(self, time_s: float, happen: Callable[[], None]) -> None:
        """Do something at a virtual time."""
        heapq.heappush(self._events, (time_s, next(self._sequence), happen))

    def carry(self, sender: SimulatedPort, to: int, message: Message) -> None:
        """Take a message on its way. Between two machines none overtakes another."""
        held = self._held.setdefault((sender.rank, to), deque())
        held.append((sender, self.ports[to], message))
        if len(held) == 1:
            self._set_off((sender.rank, to))

    def kill(self, rank: int, *, noticed_after_s: float = 0.0) -> None:
        """End a machine where it stands.

        Args: noticed_after_s, until the others find it lost; what it has sent arrives until then.
        """
        port = self.ports[rank]
        port.alive = False
        self._scripts.pop(rank, None)
        self._waits.pop(rank, None)
        if noticed_after_s == 0.0:
            self._notice(port)
        else:
            self.at(self.now_s + noticed_after_s, partial(self._notice, port))

    def revive(self, rank: int) -> SimulatedPort:
        """Put a new machine in the place of a dead one; start() its script. Of the old one nothing more arrives."""
        assert not self.ports[rank].alive, f"machine {rank} is alive"
        self._notice(self.ports[rank])
        dead = [port.rank for port in self.ports if not port.alive and port.rank != rank]
        self.ports[rank] = SimulatedPort(self, rank, len(self.ports), dead)
        for other in range(len(self.ports)):
            for pair in ((rank, other), (other, rank)):
                self._last_arrival_s.pop(pair, None)
                self._held.pop(pair, None)
        for port in self.ports:
            port.gone.discard(rank)
            port.inbox.forget(rank)
            port.generations[rank] += 1
        return self.ports[rank]

    def part(self, a: int, b: int) -> None:
        """Two machines find one another lost, such as after a long cut between them."""
        for port, other in ((self.ports[a], b), (self.ports[b], a)):
            port.gone.add(other)
            self._wake(port.rank)

    def _notice(self, dead: SimulatedPort) -> None:
        if self.ports[dead.rank] is not dead:
            return  # revived meanwhile
        for port in self.ports:
            if port.alive and dead.rank not in port.gone:
                port.gone.add(dead.rank)
                self._wake(port.rank)

    def _set_off(self, pair: tuple[int, int]) -> None:
        """Send what is held between two machines, up to the first message that does not get through."""
        held = self._held.get(pair) or deque()
        while held:
            sender, receiver, message = held[0]
            if sender.alive:
                arrival_s = self._links.arrival_s(*pair, len(message.payload), self.now_s)
                if isinstance(arrival_s, TryAgain):
                    self.at(arrival_s.at_s, partial(self._set_off, pair))
                    return
                if arrival_s is not None:
                    arrival_s = max(arrival_s, self._last_arrival_s.get(pair, 0.0))
                    self._last_arrival_s[pair] = arrival_s
                    self.at(arrival_s, partial(self._deliver, sender, receiver, message))
            held.popleft()

    def _deliver(self, sender: SimulatedPort, receiver: SimulatedPort, message: Message) -> None:
        stale = self.ports[sender.rank] is not sender or sender.rank in receiver.gone
        if receiver.alive and not stale:
            receiver.inbox.put(sender.rank, message)
            self._wake(receiver.rank)

    def _wake(self, rank: int) -> None:
        if rank in self._waits and self._waits[rank][0].ready():
            self._resume(rank, self._scripts[rank])

    def _resume(self, rank: int, script: Script[Any]) -> None:
        if self._scripts.get(rank) is not script:
            return  # killed
        self._waits.pop(rank, None)
        try:
            wait = next(script)
            while wait.ready():
                wait = next(script)
        except StopIteration as end:
            if self._scripts.get(rank) is script:
                self._results[rank] = end.value
                del self._scripts[rank]
            return
        if self._scripts.get(rank) is not script:
            return
        number = next(self._sequence)
        self._waits[rank] = (wait, number)
        if wait.until < math.inf:
            self.at(max(wait.until, self.now_s), partial(self._time_is_up, rank, number))

    def _time_is_up(self, rank: int, number: int) -> None:
        if rank in self._waits and self._waits[rank][1] == number:
            self._resume(rank, self._scripts[rank])


def pause(port_now_s: float, seconds: float) -> Wait:
    """A wait of so many seconds: what computing is in a simulation."""
    return Wait(lambda: False, port_now_s + seconds)
