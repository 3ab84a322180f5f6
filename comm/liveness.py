"""Who is alive, what has each rank reached, and how far is it: asked over UDP, never while an operation goes well.

Gloo tells a rank that a neighbour's connection closed, or nothing at all until a timeout; it never says which rank of
the job is at fault, and a survivor that leaves looks like one that died. So every rank answers questions on a
datagram socket from a thread of its own. A rank whose operation fails asks all others, draws a verdict from the answers
and their absence, and spreads it, so that all survivors raise the same thing. Nothing is sent while all goes well.

A datagram is a JSON object behind a 16-byte HMAC-SHA256 tag under a key that the ranks share through the rendezvous
store; anything else that arrives at the socket is dropped.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, Store

from thinwire.comm.verdict import Progress, Survey, Verdict

_TAG_BYTES = 16
_MAX_DATAGRAM_BYTES = 8192
_PINGS, _PINGED, _PING_S = 3, 16, 1.0
_ASK_AGAIN_S = 0.2  # a question or a verdict is repeated: the network that failed an operation may lose datagrams too


class PeerMonitor:
    """Answers for this rank, asks the others, and keeps the first verdict that was drawn or received.

    Args:
        rank: this rank.
        addresses: UDP address of every rank, this one's included.
        key: secret that the ranks share, any length.
        sock: bound UDP socket of this rank; the monitor owns it.
    """

    def __init__(self, rank: int, addresses: list[tuple[str, int]], key: bytes, sock: socket.socket | None) -> None:
        self._rank = rank
        self._addresses = addresses
        self._key = key
        self._socket = sock
        self._progress: dict[str, Progress] = {}
        self._answers: dict[str, dict[int, Progress]] = {}
        self._asked_at: dict[str, float] = {}
        self._round_trip_s: dict[int, float] = {}
        self._answered = threading.Condition()
        self._verdict: Verdict | None = None
        self._listeners: list[weakref.WeakMethod[Callable[[Verdict], None]]] = []
        self._closed = False
        if sock is not None:
            self._thread = threading.Thread(target=self._serve, name="thinwire-monitor", daemon=True)
            self._thread.start()

    @classmethod
    def meet(cls, store: Store, rank: int, size: int, host: str, timeout_s: float) -> PeerMonitor:
        """Open this rank's socket on address `host` and learn the others' through the store. Collective.

        Raises:
            OSError: the address is not one of this machine's.
            torch.distributed.DistStoreError: a rank did not appear within timeout_s seconds.
        """
        if size == 1:
            return cls(0, [(host, 0)], b"", None)
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((host, 0))
        if rank == 0:
            store.set("monitor/key", secrets.token_hex(32))
        store.set(f"monitor/{rank}", json.dumps(sock.getsockname()[:2]))
        keys = ["monitor/key", *(f"monitor/{peer}" for peer in range(size))]
        store.wait(keys, timedelta(seconds=timeout_s))
        addresses = [(str(a), int(p)) for a, p in (json.loads(store.get(key)) for key in keys[1:])]
        monitor = cls(rank, addresses, bytes.fromhex(store.get("monitor/key").decode()), sock)
        monitor._ping()
        return monitor

    @property
    def host(self) -> str:
        """Address at which the others reach this rank."""
        return self._addresses[self._rank][0]

    @property
    def verdict(self) -> Verdict | None:
        """The first verdict that this rank drew or received, if any."""
        return self._verdict

    def report(self, queue: str, progress: Progress) -> None:
        """Note what this rank has reached on the named queue, for when somebody asks."""
        self._progress[queue] = progress

    def survey(self, queue: str, timeout_s: float) -> Survey:
        """Ask every other rank what it has reached on the named queue; return after all answers or timeout_s."""
        return self._ask([peer for peer in range(len(self._addresses)) if peer != self._rank], queue, timeout_s)

    def latency_s(self, ranks: Sequence[int]) -> float:
        """Seconds of a round trip to the farthest of these ranks that has answered; infinity where none has."""
        known = [self._round_trip_s[rank] for rank in ranks if rank in self._round_trip_s]
        return max(known, default=math.inf)

    def _ping(self) -> None:
        """Learn the round trips, each the least of a few, to the others or to some of many."""
        size = len(self._addresses)
        distances = sorted({round(1 + k * (size - 2) / (_PINGED - 1)) for k in range(_PINGED)})
        others = [(self._rank + distance) % size for distance in distances]
        for _ in range(_PINGS):
            if self._ask(others, "", _PING_S).silent:
                return  # the network does not let datagrams through, or hardly; do not wait for that again

    def _ask(self, others: Sequence[int], queue: str, timeout_s: float) -> Survey:
        answers: dict[int, Progress] = {}
        deadline = time.monotonic() + timeout_s

        def ended() -> bool:
            return len(answers) == len(others) or self._verdict is not None

        with self._answered:
            nonces: list[str] = []
            while not ended() and time.monotonic() < deadline:
                nonce = secrets.token_hex(8)  # of its own for each time: an answer tells which question it is to
                nonces.append(nonce)
                self._answers[nonce] = answers
                self._asked_at[nonce] = time.monotonic()
                for peer in others:
                    if peer not in answers:
                        self._send(peer, {"kind": "ask", "nonce": nonce, "queue": queue})
                self._answered.wait_for(ended, min(_ASK_AGAIN_S, max(0.0, deadline - time.monotonic())))
            for nonce in nonces:
                del self._answers[nonce], self._asked_at[nonce]
            return Survey(dict(answers), tuple(peer for peer in others if peer not in answers))

    def announce(self, verdict: Verdict) -> Verdict:
        """Spread a verdict to every rank, and return the one that holds here: the first drawn or received."""
        holds = self._keep(verdict)
        message = {"kind": "verdict", "verdict": asdict(holds)}
        for _ in range(3):
            for peer in range(len(self._addresses)):
                if peer != self._rank:
                    self._send(peer, message)
        return holds

    def listen(self, listener: Callable[[Verdict], None]) -> None:
        """Call `listener`, a bound method, with the first verdict, from whichever thread it arrives on.

        Holds no reference to the method's object.
        """
        with self._answered:
            self._listeners.append(weakref.WeakMethod(listener))
            verdict = self._verdict
        if verdict is not None:
            listener(verdict)

    def close(self) -> None:
        """Stop answering."""
        self._closed = True
        if self._socket is not None:
            self._send(self._rank, {"kind": "close"})
            self._thread.join(timeout=5.0)
            self._socket.close()

    def _keep(self, verdict: Verdict) -> Verdict:
        with self._answered:
            if self._verdict is not None:
                return self._verdict
            self._verdict = verdict
            self._answered.notify_all()
            listeners = list(self._listeners)
        for reference in listeners:
            if (listener := reference()) is not None:
                listener(verdict)
        return verdict

    def _send(self, peer: int, message: Mapping[str, Any]) -> None:
        body = json.dumps({"from": self._rank, **message}).encode()[: _MAX_DATAGRAM_BYTES - _TAG_BYTES]
        try:
            if self._socket is not None:
                self._socket.sendto(self._tag(body) + body, self._addresses[peer])
        except OSError:
            pass  # no route or no buffer: the peer counts as silent, and that is what is being found out

    def _tag(self, body: bytes) -> bytes:
        return hmac.digest(self._key, body, hashlib.sha256)[:_TAG_BYTES]

    def _serve(self) -> None:
        assert self._socket is not None
        while not self._closed:
            try:
                datagram = self._socket.recv(_MAX_DATAGRAM_BYTES)
            except ConnectionError:
                continue  # an earlier datagram found a closed port: the peer is gone, which its silence will tell
            except OSError:
                return
            body = datagram[_TAG_BYTES:]
            if hmac.compare_digest(self._tag(body), datagram[:_TAG_BYTES]):
                self._handle(json.loads(body))

    def _handle(self, message: dict[str, Any]) -> None:
        sender = int(message["from"])
        if message["kind"] == "ask":
            progress = self._progress.get(message["queue"], Progress())
            self._send(sender, {"kind": "answer", "nonce": message["nonce"], "progress": asdict(progress)})
            if self._verdict is not None:
                self._send(sender, {"kind": "verdict", "verdict": asdict(self._verdict)})
        elif message["kind"] == "answer":
            arrived = time.monotonic()
            with self._answered:
                nonce = message["nonce"]
                if nonce in self._answers:
                    trip_s = arrived - self._asked_at[nonce]
                    self._round_trip_s[sender] = min(trip_s, self._round_trip_s.get(sender, math.inf))
                    self._answers[nonce][sender] = Progress(**message["progress"])
                    self._answered.notify_all()
        elif message["kind"] == "verdict":
            told = message["verdict"]
            self._keep(Verdict(told["kind"], told["operation"], tuple(told["ranks"]), told["message"]))


def own_address(store: Store) -> str:
    """The address of this machine on the network that leads to the rendezvous store's host."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    host = getattr(store, "host", None) or socket.gethostname()
    family, _, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # sends nothing: asks the routing table
        return str(probe.getsockname()[0])
