"""The threads of a post: one listens, and for every other machine one sends and one receives."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch.profiler import record_function

from thinwire.comm.gossip.post.connection import Connection
from thinwire.comm.gossip.post.handshake import answer_greeting, check_run, greet_as_dialler, read_greeting
from thinwire.comm.gossip.post.link import Link
from thinwire.comm.wire import PayloadError

_STRANGERS = 64  # connections at once whose greeting is awaited
_GREET_S = 10.0
_RETRY_S = (0.02, 1.0)  # between attempts to connect: the first, and the longest


class Connector:
    """Makes connections, and carries what the links have to send and to receive. Of two machines the lower rank dials.

    Args:
        links: to the others, by rank.
        secret, listener, lost_after_s, limit_bytes: as Post has them.
        on_connected: called when a link has a new connection. on_failure: called with what a thread should never raise.
    """

    def __init__(
        self,
        rank: int,
        addresses: Sequence[tuple[str, int]],
        links: Mapping[int, Link],
        *,
        secret: bytes,
        listener: socket.socket | None,
        lost_after_s: float,
        limit_bytes: int,
        on_connected: Callable[[], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self.rank = rank
        self._addresses = addresses
        self._links = links
        self._secret = secret
        self._listener = listener
        self._lost_after_s = lost_after_s
        self._limit_bytes = limit_bytes
        self._on_connected, self._on_failure = on_connected, on_failure
        self._lock = threading.Lock()
        self._closed = False
        self._strangers = threading.Semaphore(_STRANGERS)
        self._threads: set[threading.Thread] = set()
        self._sockets: set[socket.socket] = set()  # whose greeting is under way

    def begin(self) -> None:
        """Listen, and dial."""
        if self._listener is not None:
            self._listener.settimeout(0.5)
            self._start("listen", self._listen, self._listener)
        for link in self._links.values():
            self._start(f"send-{link.rank}", self._send_to, link)

    def close(self, farewell_s: float) -> None:
        """End all threads, after Link.say_goodbye(); wait so long for the others to take leave, too."""
        with self._lock:
            self._closed = True
            greeting, threads = list(self._sockets), list(self._threads)
        for sock in greeting:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        until = time.monotonic() + farewell_s
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        for link in self._links.values():
            link.hang_up()
        for thread in threads:
            thread.join()
        while late := list(self._threads):  # started in the meantime
            for thread in late:
                thread.join()
        if self._listener is not None:
            self._listener.close()

    def _start(self, name: str, work: Callable[..., None], *arguments: object) -> None:
        def body() -> None:
            try:
                work(*arguments)
            except BaseException as error:
                self._on_failure(error)
            finally:
                with self._lock:
                    self._threads.discard(threading.current_thread())

        # A daemon: a script that has failed must not be kept from ending its process by what nobody closes.
        thread = threading.Thread(target=body, name=f"thinwire-post-{self.rank}-{name}", daemon=True)
        with self._lock:
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
        self._on_connected()
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
            header, payload = frame
            try:
                # Named in traces; not so what only says that this machine lives.
                with record_function(f"thinwire::gossip/send{link.rank}") if len(payload) else contextlib.nullcontext():
                    connection.send(header, payload)
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
        self._on_connected()
        self._start(f"receive-{link.rank}", self._receive, link, connection)
        return True

    @contextlib.contextmanager
    def _greeting(self, sock: socket.socket) -> Iterator[None]:
        """A socket whose greeting close() may break off."""
        sock.settimeout(min(_GREET_S, self._lost_after_s))
        with self._lock:
            self._sockets.add(sock)
            if self._closed:
                raise ConnectionAbortedError("the post is closed")
        try:
            yield
        finally:
            with self._lock:
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
