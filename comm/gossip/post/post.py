"""One machine's port over TCP, and the driver that runs its scripts."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TypeVar

import torch

from thinwire.comm.errors import PeerLostError
from thinwire.comm.gossip.inbox import Inbox
from thinwire.comm.gossip.message import Kind, Message
from thinwire.comm.gossip.port import Script, Wait
from thinwire.comm.gossip.post.connection import Connection
from thinwire.comm.gossip.post.handshake import answer_greeting, check_run, greet_as_dialler, read_greeting
from thinwire.comm.gossip.post.link import Link, LinkLimits
from thinwire.comm.meter import TrafficMeter
from thinwire.comm.wire import PayloadError

T = TypeVar("T")

_CONTROL = {Kind.END, Kind.BARRIER, Kind.JOIN_ASK}
_STRANGERS = 64  # connections at once whose greeting is awaited
_GREET_S = 10.0
_RETRY_S = (0.02, 1.0)  # between attempts to connect: the first, and the longest
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
    Attributes: exposed_s, seconds for which wait() has blocked; sent_bytes, payload bytes by receiver; meter.
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
        self.sent_bytes: dict[int, int] = defaultdict(int)
        self._addresses = list(addresses)
        self._secret = secret
        self._listener = listener
        self._peers = tuple(peers if peers is not None else range(self.size))
        self._lost_after_s = lost_after_s
        self._limit_bytes = limit_bytes
        self._arrived = threading.Condition(threading.RLock())  # never held while a link's lock is taken
        self._inbox = Inbox()
        self._lost: frozenset[int] = frozenset()
        self._returned: set[int] = set()  # of the lost: those that are there again, but have not taken part yet
        self._generations = [0] * self.size
        self._seen = [0] * self.size  # generations that the script may know of
        self._looked = True
        self._failure: BaseException | None = None
        self._closed = False
        self._strangers = threading.Semaphore(_STRANGERS)
        self._threads: set[threading.Thread] = set()
        self._sockets: set[socket.socket] = set()  # whose greeting is under way
        limits = LinkLimits(lost_after_s, backlog_bytes, backlog_messages=1 << 20)
        me = (self.size, rank, secrets.randbits(63) | 1)
        self._links = {other: self._link(other, me, limits, grace_s) for other in range(self.size) if other != rank}
        if listener is not None:
            listener.settimeout(0.5)
            self._start("listen", self._listen, listener)
        for link in self._links.values():
            self._start(f"send-{link.rank}", self._send_to, link)

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
        with self._arrived:
            while not wait.ready() and (left_s := wait.until - time.monotonic()) > 0:
                self._check()
                self._arrived.wait(min(left_s, _PAUSE_S))
            self._look()
        self.exposed_s += time.monotonic() - began

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
            greeting, threads = list(self._sockets), list(self._threads)
        for sock in greeting:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        until = time.monotonic() + (min(_FAREWELL_S, linger_s) if farewell else 0.0)
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        for link in self._links.values():
            link.hang_up()
        for thread in threads:
            thread.join()
        if self._listener is not None:
            self._listener.close()
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
            self._arrived.notify_all()

    def _on_lost(self, rank: int) -> None:
        with self._arrived:
            self._lost |= {rank}
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

    def _connected(self) -> int:
        return sum(link.connection is not None for link in self._links.values())

    def _check(self) -> None:
        self._raise_failure()
        if self._closed:
            raise RuntimeError("the gossip post is closed")

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise RuntimeError("a thread of the gossip post has failed") from self._failure

    def _start(self, name: str, work: Callable[..., None], *arguments: object) -> None:
        def body() -> None:
            try:
                work(*arguments)
            except BaseException as error:
                with self._arrived:
                    self._failure = self._failure or error
                    self._arrived.notify_all()
            finally:
                with self._arrived:
                    self._threads.discard(threading.current_thread())

        # A daemon: a script that has failed must not be kept from ending its process by what nobody closes.
        thread = threading.Thread(target=body, name=f"thinwire-post-{self.rank}-{name}", daemon=True)
        with self._arrived:
            self._threads.add(thread)
            thread.start()

    def _listen(self, listener: socket.socket) -> None:
        while not self._closed:
            try:
                sock, _ = listener.accept()
            except TimeoutError:
                continue
            except OSError:  # closed; or no descriptor is left, which may pass
                time.sleep(0.0 if self._closed else _RETRY_S[0])
                continue
            if self._strangers.acquire(blocking=False):
                self._start("greet", self._welcome, sock)
            else:
                sock.close()

    def _welcome(self, sock: socket.socket) -> None:
        """Greet whoever has connected, and if it is one of the run's machines, receive from it."""
        link = None
        try:
            with self._greeting(sock):
                theirs, first = read_greeting(sock)
                link = self._links.get(theirs.sender)
                if link is None or link.rank > self.rank:
                    raise PayloadError(f"it says that it is machine {theirs.sender}, which is not to dial this one")
                mine = link.greeting()
                answer_greeting(sock, self._secret, mine, first)
                check_run(theirs, mine)
                connection = self._connection(sock)
                link.take_up(connection, mine, theirs)
        except (OSError, PayloadError) as error:
            sock.close()
            if link is not None:
                link.complain(f"was not greeted: {error}")
            return
        finally:
            self._strangers.release()
        self._announce()
        self._receive(link, connection)

    def _send_to(self, link: Link) -> None:
        """The thread that sends to one machine, and dials it if that is this machine's part."""
        pause_s = _RETRY_S[0]
        while not link.leaving:
            connection = link.connection
            if connection is None:
                link.check()
                if link.rank > self.rank and self._dial(link):
                    pause_s = _RETRY_S[0]
                    continue
                with link.changed:
                    if link.connection is None and not link.leaving:
                        link.changed.wait(pause_s if link.rank > self.rank else self._tick_s())
                pause_s = min(2 * pause_s, _RETRY_S[1])
                continue
            frame = link.next_frame(connection)
            if frame is None:
                continue
            try:
                connection.send(*frame)
            except OSError as error:
                link.broken(connection, f"broke the connection: {error}")

    def _dial(self, link: Link) -> bool:
        try:
            sock = socket.create_connection(self._addresses[link.rank], timeout=min(_GREET_S, self._lost_after_s))
        except OSError as error:
            link.complain(f"cannot be reached: {error}")
            return False
        try:
            with self._greeting(sock):
                mine = link.greeting()
                theirs = greet_as_dialler(sock, self._secret, mine)
                connection = self._connection(sock)
                link.take_up(connection, mine, theirs)
        except (OSError, PayloadError) as error:
            sock.close()
            link.complain(f"was not greeted: {error}")
            return False
        self._announce()
        self._start(f"receive-{link.rank}", self._receive, link, connection)
        return True

    @contextlib.contextmanager
    def _greeting(self, sock: socket.socket) -> Iterator[None]:
        """A socket whose greeting close() may break off."""
        sock.settimeout(min(_GREET_S, self._lost_after_s))
        with self._arrived:
            self._sockets.add(sock)
            if self._closed:
                raise ConnectionAbortedError("the post is closed")
        try:
            yield
        finally:
            with self._arrived:
                self._sockets.discard(sock)

    def _receive(self, link: Link, connection: Connection) -> None:
        """The thread that receives on one connection."""
        try:
            more = True
            while more:
                header, payload = connection.receive(link.heard)
                more = link.take_in(connection, header, payload)
        except (OSError, PayloadError) as error:
            link.broken(connection, f"broke the connection: {error}")
        finally:
            connection.close()

    def _connection(self, sock: socket.socket) -> Connection:
        return Connection(sock, limit_bytes=self._limit_bytes, tick_s=self._tick_s(), silence_s=self._lost_after_s)

    def _tick_s(self) -> float:
        return self._lost_after_s / 8

    def _announce(self) -> None:
        """Wake wait_for_others()."""
        with self._arrived:
            self._arrived.notify_all()


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
