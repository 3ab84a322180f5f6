"""Bytes of gossip's port: whatever comes, it is the message that was sent or an error."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from gossip_posts import SECRET, run_together
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from thinwire.comm.gossip.message import Kind
from thinwire.comm.gossip.post.connection import Connection
from thinwire.comm.gossip.post.frame import GOODBYE, HEADER_BYTES, SIGN_OF_LIFE, Header, pack_header, parse_header
from thinwire.comm.gossip.post.handshake import (
    Greeting,
    answer_greeting,
    fresh_nonce,
    greet_as_dialler,
    pack_greeting,
    parse_greeting,
    read_greeting,
)
from thinwire.comm.wire import PayloadError

Mutations = Callable[[Tensor], Iterator[Tensor]]
U16, U64 = st.integers(0, 2**16 - 1), st.integers(0, 2**64 - 1)
HEADERS = st.builds(
    Header,
    kind=st.sampled_from([*map(int, Kind)]),
    flags=U16,
    stream=U16,
    round=U64,
    number=U64,
    received=U64,
    payload_bytes=st.integers(0, 1000),
    mass=st.floats(allow_nan=False, allow_infinity=False),
    checksum=st.integers(0, 2**32 - 1),
)
HEADER = Header(Kind.VALUE, 1, 2, 3, 4, 5, 1000, 0.75, 6)
ME = Greeting(3, 0, 1, 11, 22, 4, 5, fresh_nonce())
YOU = replace(ME, sender=1, receiver=0, incarnation=22, known=11, nonce=fresh_nonce())


@given(HEADERS)
def test_a_header_comes_out_as_it_went_in(header: Header) -> None:
    data = pack_header(header)
    assert len(data) == HEADER_BYTES == 60
    assert parse_header(data, 1000) == header


@given(st.integers(0, HEADER_BYTES * 8 - 1))
def test_every_flipped_bit_of_a_header_is_found(bit: int) -> None:
    data = bytearray(pack_header(HEADER))
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(PayloadError):
        parse_header(data, 1 << 40)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (replace(HEADER, payload_bytes=1001), "announces 1001 bytes; at most 1000"),
        (replace(HEADER, kind=12), "of kind 12"),
        (replace(HEADER, kind=SIGN_OF_LIFE), "sign of life"),
        (replace(HEADER, kind=GOODBYE), "sign of life"),
        (replace(HEADER, mass=float("nan")), "mass nan"),
        (replace(HEADER, mass=float("inf")), "mass inf"),
    ],
)
def test_a_header_that_nobody_may_send_is_refused_before_anything_is_allocated(header: Header, reason: str) -> None:
    with pytest.raises(PayloadError, match=reason):
        parse_header(pack_header(header), 1000)


def test_damaged_frames_are_errors(mutations: Mutations) -> None:
    payload = torch.arange(200, dtype=torch.uint8)

    class Catch:
        """A socket that keeps what is sent."""

        def __init__(self) -> None:
            self.data = b""

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_: None

        def sendmsg(self, parts: list[bytes]) -> int:
            self.data = b"".join(bytes(part) for part in parts)
            return len(self.data)

    catch = Catch()
    sender = Connection(catch, limit_bytes=200, tick_s=1.0, silence_s=9.0)  # type: ignore[arg-type]
    sender.send(replace(HEADER, payload_bytes=200), payload)
    intact = torch.frombuffer(bytearray(catch.data), dtype=torch.uint8)
    assert receive(intact, 200)[1].equal(payload)
    for damaged in mutations(intact):
        if len(damaged) >= len(intact) and torch.equal(damaged[: len(intact)], intact):
            continue  # something has only been added: it belongs to the next frame
        with pytest.raises((PayloadError, ConnectionError)):
            receive(damaged, 200)


def receive(data: Tensor, limit_bytes: int) -> tuple[Header, Tensor]:
    """What a machine reads to which this is sent and no more."""
    ours, theirs = socket.socketpair()
    try:
        ours.sendall(data.numpy().tobytes())
        ours.close()
        options = {"limit_bytes": limit_bytes, "tick_s": 1.0, "silence_s": 9.0}
        return Connection(_Local(theirs), **options).receive(lambda something: None)  # type: ignore[arg-type]
    finally:
        theirs.close()


class _Local:
    """A socket of a pair within one machine, which has no options of TCP."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.recv_into = sock.recv_into

    def settimeout(self, timeout_s: float | None) -> None:
        self._sock.settimeout(timeout_s)

    def setsockopt(self, *_: object) -> None:
        pass


def test_greetings_come_out_as_they_went_in_and_damaged_ones_let_nobody_in(mutations: Mutations) -> None:
    assert parse_greeting(pack_greeting(ME)) == ME
    intact = torch.frombuffer(bytearray(pack_greeting(ME)), dtype=torch.uint8)
    for damaged in mutations(intact):
        if torch.equal(damaged, intact):
            continue
        try:
            parse_greeting(damaged.numpy().tobytes())
        except PayloadError:
            pass
        with pytest.raises((PayloadError, OSError)):
            greet(lambda sock, damaged=damaged: _damage(sock, damaged.numpy().tobytes(), len(intact)))


def _damage(sock: socket.socket, greeting: bytes, length: int) -> None:
    """Send a damaged greeting, and the proof that would have been right for the intact one."""

    class Damaging:
        def __init__(self) -> None:
            self.recv = sock.recv
            self.first = True

        def sendall(self, data: bytes) -> None:
            sock.sendall(greeting if self.first else data)
            if self.first and len(greeting) < length:
                sock.shutdown(socket.SHUT_WR)
            self.first = False

    greet_as_dialler(Damaging(), SECRET, ME)  # type: ignore[arg-type]


def greet(dial: Callable[[socket.socket], object], you: Greeting = YOU) -> Greeting:
    """What the accepting side makes of somebody who dials like that."""
    ours, theirs = socket.socketpair()
    outcome: list[Greeting] = []

    def accept() -> None:
        with theirs:
            theirs.settimeout(10.0)
            greeting, first = read_greeting(theirs)
            answer_greeting(theirs, SECRET, you, first)
            outcome.append(greeting)

    def call() -> None:
        with ours:
            ours.settimeout(10.0)
            try:
                dial(ours)
            except (PayloadError, OSError):
                pass  # it is the other side's turn to find out

    run_together([accept, call])
    return outcome[0]


def test_both_sides_prove_that_they_know_the_secret() -> None:
    assert greet(lambda sock: greet_as_dialler(sock, SECRET, ME)) == ME
    with pytest.raises(PayloadError, match="secret"):
        greet(lambda sock: greet_as_dialler(sock, b"guess", ME))


def test_a_recorded_greeting_opens_no_second_connection() -> None:
    said: list[bytes] = []

    class Recording:
        def __init__(self, sock: socket.socket) -> None:
            self.recv, self._sock = sock.recv, sock

        def sendall(self, data: bytes) -> None:
            said.append(data)
            self._sock.sendall(data)

    greet(lambda sock: greet_as_dialler(Recording(sock), SECRET, ME))  # type: ignore[arg-type]
    assert len(said) == 2
    with pytest.raises(PayloadError, match="secret"):
        greet(lambda sock: (sock.sendall(b"".join(said)), sock.recv(1)), replace(YOU, nonce=fresh_nonce()))
