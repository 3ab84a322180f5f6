"""One machine's port over TCP, and the driver that runs its scripts."""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from types import TracebackType
from typing import TypeVar

import torch
from torch.profiler import record_function

from thinwire.comm.errors import PeerLostError
from thinwire.comm.gossip.inbox import Inbox
from thinwire.comm.gossip.message import Kind, Message
from thinwire.comm.gossip.port import Script, Wait
from thinwire.comm.gossip.post.connector import Connector
from thinwire.comm.gossip.post.link import Link, LinkLimits
from thinwire.comm.meter import TrafficMeter

T = TypeVar("T")

_CONTROL = {Kind.END, Kind.BARRIER, Kind.JOIN_ASK}
_FAREWELL_S = 1.0  # for the others to take leave, too
_PAUSE_S = 60.0  # the longest time for which wait() does not look at the clock


class Post:
    """A machine's Port: every other machine has one connection with it, one thread that sends and one that receives.

    Of two machines the one with the lower rank dials. A slow or dead machine holds up nobody else's messages. Only
    the caller's thread runs scripts; the others fill the inbox.

    Args:
        rank: of this machine.
        addresses: (host, port) of every machine, by rank; where higher ranks listen is dialled.
        secret: what all machines share; each proves that it knows it.
        listener: bound and listening socket of this machine; owned from here on. None for a machine alone.
        meter: where payload bytes are counted, under "gossip/<kind>", or "control/<kind>" for END, BARRIER, JOIN_ASK.
        peers: for each machine its number in the meter; default: its rank.
        lost_after_s: seconds of silence after which a machine is lost. A cut or a pause of a process that is shorter
            costs nothing but time.
        grace_s: beyond these, how many seconds a machine may take to appear for the first time.
        backlog_bytes: that may wait for a machine, before it is lost; at least four of the longest message.
        limit_bytes: of the longest payload that is taken from others.
    Attributes: exposed_s, seconds for which wait() has blocked; waited_for_s, the same by the machine whose message or
    loss ended the wait; sent_bytes, payload bytes by receiver; meter.
    """

    def __init__(
        self,
        rank: int,
        addresses: Sequence[tuple[str, int]],
        *,
        secret: bytes,
        listener: socket.socket | None,
        meter: TrafficMeter,
        peers: Sequence[int] | None = None,
        lost_after_s: float = 15.0,
        grace_s: float = 0.0,
        backlog_bytes: int = 1 << 32,
        limit_bytes: int = 1 << 36,
    ) -> None:
        if not lost_after_s > 0:
            raise ValueError(f"lost_after_s: {lost_after_s} must be a positive number of seconds")
        self.rank = rank
        self.size = len(addresses)
        self.meter = meter
        self.exposed_s = 0.0
        self.waited_for_s: dict[int, float] = defaultdict(float)
        self.sent_bytes: dict[int, int] = defaultdict(int)
        self._addresses = list(addresses)
        self._peers = tuple(peers if peers is not None else range(self.size))
        self._lost_after_s = lost_after_s
        self._arrived = threading.Condition(threading.RLock())  # never held while a link's lock is taken
        self._inbox = Inbox()
        self._newest_from = rank  # whose message, or loss, was the last thing to happen
        self._lost: frozenset[int] = frozenset()
        self._returned: set[int] = set()  # of the lost: those that are there again, but have not taken part yet
        self._generations = [0] * self.size
        self._seen = [0] * self.size  # generations that the script may know of
        self._looked = True
        self._failure: BaseException | None = None
        self._closed = False
        limits = LinkLimits(lost_after_s, backlog_bytes, backlog_messages=1 << 20)
        me = (self.size, rank, secrets.randbits(63) | 1)
        self._links = {other: self._link(other, me, limits, grace_s) for other in range(self.size) if other != rank}
        self._connector = Connector(
            rank,
            self._addresses,
            self._links,
            secret=secret,
            listener=listener,
            lost_after_s=lost_after_s,
            limit_bytes=limit_bytes,
            on_connected=self._on_connected,
            on_failure=self._on_failure,
        )
        self._connector.begin()

    def send(self, to: int, message: Message) -> None:
        """As Port says. The payload is sent from where it lies: it must not change any more."""
        self._check()
        payload = message.payload
        assert payload.dtype == torch.uint8
        assert payload.dim() == 1
        assert payload.is_contiguous()
        if self._links[to].push(message, self._seen[to]):
            self.sent_bytes[to] += len(payload)
            self.meter.record(_operation(message.kind), {self._peers[to]: len(payload)}, {}, 0.0)

    def peek(self, source: int, kind: Kind, stream: int = 0) -> Message | None:
        """As Port says."""
        with self._arrived:
            self._look()
            return self._inbox.peek(source, kind, stream)

    def take(self, source: int, kind: Kind, stream: int = 0) -> Message:
        """As Port says."""
        with self._arrived:
            return self._inbox.take(source, kind, stream)

    def newest(self, source: int, kind: Kind, stream: int = 0) -> int:
        """As Port says."""
        with self._arrived:
            self._look()
            return self._inbox.newest(source, kind, stream)

    def waiting(self, kind: Kind, stream: int = 0) -> list[int]:
        """As Port says."""
        with self._arrived:
            self._look()
            return self._inbox.waiting(kind, stream)

    def lost(self) -> frozenset[int]:
        """As Port says. A machine that has closed its post is lost at once.

        One that comes back stays lost until it has sent something else than a JOIN_ASK, so that nobody waits for a
        machine that has not entered yet; but what is sent to it arrives.
        """
        with self._arrived:
            self._look()
            return self._lost

    def generation(self, rank: int) -> int:
        """As Port says."""
        with self._arrived:
            self._seen[rank] = self._generations[rank]
            return self._seen[rank]

    def now(self) -> float:
        """As Port says."""
        return time.monotonic()

    def wait(self, wait: Wait) -> None:
        """Block until it is over.

        Raises:
            RuntimeError: the post was closed, or one of its threads has failed.
        """
        began = time.monotonic()
        came = False
        with self._arrived, record_function("wait: gossip"):
            while not (came := wait.ready()) and (left_s := wait.until - time.monotonic()) > 0:
                self._check()
                self._arrived.wait(min(left_s, _PAUSE_S))
            self._look()
            newest = self._newest_from
        waited_s = time.monotonic() - began
        self.exposed_s += waited_s
        if came:
            self.waited_for_s[newest] += waited_s

    def problems(self) -> dict[int, str]:
        """What is wrong with machines that are not connected, for people."""
        return {rank: link.problem for rank, link in self._links.items() if link.connection is None}

    def wait_for_others(self, count: int, timeout_s: float) -> None:
        """Block until so many others are connected.

        Raises:
            PeerLostError: fewer are after timeout_s; says why.
        """
        until = time.monotonic() + timeout_s
        with self._arrived:
            while self._connected() < count and (left_s := until - time.monotonic()) > 0:
                self._check()
                self._arrived.wait(left_s)
        if self._connected() < count:
            problems = self.problems()
            host_of = {rank: f"{host}:{port}" for rank, (host, port) in enumerate(self._addresses)}
            why = "; ".join(f"machine {rank} ({host_of[rank]}) {problem}" for rank, problem in problems.items())
            raise PeerLostError(
                f"gossip: {self._connected()} of {count} other machines are connected after {timeout_s:g} s: {why}",
                operation="gossip/connect",
                missing_ranks=[self._peers[rank] for rank in problems],
            )

    def give_up_on_absent(self) -> list[int]:
        """Count as lost all that have never been there, until they come; returns them."""
        absent = [link for link in self._links.values() if not link.met]
        for link in absent:
            link.give_up("was not there when the run began")
        return [link.rank for link in absent]

    def hang_up(self, rank: int) -> None:
        """Break the connection with a machine, as a network might. It is made anew, and no message is lost."""
        connection = self._links[rank].connection
        if connection is not None:
            connection.hang_up()

    def close(self, *, linger_s: float | None = None, farewell: bool = True) -> None:
        """Leave: wait until the others have what was sent, tell them, and end all threads.

        Args:
            linger_s: how long to wait at most; default: lost_after_s, but no more than 5.
            farewell: False: just vanish, as a machine does whose process is killed.
        """
        if linger_s is None:
            linger_s = min(self._lost_after_s, 5.0)
        until = time.monotonic() + (linger_s if farewell else 0.0)
        for link in self._links.values():
            link.say_goodbye(until, farewell=farewell)
        with self._arrived:
            self._closed = True
            self._arrived.notify_all()
        self._connector.close(min(_FAREWELL_S, linger_s) if farewell else 0.0)
        self._raise_failure()

    def __enter__(self) -> Post:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close(linger_s=None if kind is None else 0.0)

    def _link(self, rank: int, me: tuple[int, int, int], limits: LinkLimits, grace_s: float) -> Link:
        return Link(
            rank,
            me,
            limits,
            grace_s=grace_s,
            deliver=lambda message: self._deliver(rank, message),
            on_lost=lambda: self._on_lost(rank),
            on_anew=lambda: self._on_anew(rank),
        )

    def _deliver(self, source: int, message: Message) -> None:
        self.meter.record(_operation(message.kind), {}, {self._peers[source]: len(message.payload)}, 0.0)
        with self._arrived:
            if source in self._returned and message.kind != Kind.JOIN_ASK:
                self._returned.discard(source)
                self._lost -= {source}
            self._inbox.put(source, message)
            self._newest_from = source
            self._arrived.notify_all()

    def _on_lost(self, rank: int) -> None:
        with self._arrived:
            self._lost |= {rank}
            self._newest_from = rank
            self._returned.discard(rank)
            self._arrived.notify_all()

    def _on_anew(self, rank: int) -> None:
        with self._arrived:
            self._inbox.forget(rank)
            self._generations[rank] += 1
            self._looked = False
            self._lost |= {rank}
            self._returned.add(rank)
            self._arrived.notify_all()

    def _look(self) -> None:
        """The script sees how things stand: what it sends from now on is of these generations."""
        if not self._looked:
            self._seen = list(self._generations)
            self._looked = True

    def _on_connected(self) -> None:
        with self._arrived:
            self._arrived.notify_all()

    def _on_failure(self, error: BaseException) -> None:
        with self._arrived:
            self._failure = self._failure or error
            self._arrived.notify_all()

    def _connected(self) -> int:
        return sum(link.connection is not None for link in self._links.values())

    def _check(self) -> None:
        self._raise_failure()
        if self._closed:
            raise RuntimeError("the gossip post is closed")

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise RuntimeError("a thread of the gossip post has failed") from self._failure


def drive(script: Script[T], post: Post) -> T:
    """Run a script on the calling thread, waiting where it waits; returns what it returns."""
    try:
        while True:
            post.wait(next(script))
    except StopIteration as end:
        result: T = end.value
        return result


def _operation(kind: Kind) -> str:
    return f"{'control' if kind in _CONTROL else 'gossip'}/{kind.name.lower()}"
