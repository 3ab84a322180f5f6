"""How two machines greet each other on a new connection: who they are, that they know the secret, where they stand.

    dialling -> accepting   greeting
    accepting -> dialling   greeting, proof over both greetings
    dialling -> accepting   proof over both greetings

Each proof is a keyed hash (HMAC-SHA256) over both greetings, and each greeting has a fresh random number in it: neither
can be repeated by somebody who has only listened. What follows on the connection has checksums against damage; it is
neither secret nor protected against somebody who can change packets on the way.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
import struct
from dataclasses import dataclass

from thinwire.comm.wire import PayloadError

_MAGIC = b"twgossip"
_VERSION = 1
_NONCE_BYTES = 16
_PROOF_BYTES = 32
_FIELDS = struct.Struct(f"<{len(_MAGIC)}sIIIIQQQQ{_NONCE_BYTES}s")


@dataclass(frozen=True, slots=True)
class Greeting:
    """What a machine says first.

    Args:
        size: machines of the run.
        sender, receiver: their ranks.
        incarnation: the sender's, random, new with each start of its process.
        known: the incarnation of the receiver that the sender has met last; 0: none.
        epoch: how often one of these two has counted the other as lost, as far as the sender knows.
        received: messages that the sender has from this incarnation of the receiver in this epoch.
        nonce: random.
    """

    size: int
    sender: int
    receiver: int
    incarnation: int
    known: int
    epoch: int
    received: int
    nonce: bytes


def fresh_nonce() -> bytes:
    return secrets.token_bytes(_NONCE_BYTES)


def pack_greeting(greeting: Greeting) -> bytes:
    """Bytes of a greeting, always as many."""
    return _FIELDS.pack(
        _MAGIC,
        _VERSION,
        greeting.size,
        greeting.sender,
        greeting.receiver,
        greeting.incarnation,
        greeting.known,
        greeting.epoch,
        greeting.received,
        greeting.nonce,
    )


def parse_greeting(data: bytes) -> Greeting:
    """The inverse of pack_greeting().

    Raises:
        PayloadError: it is none, or one of another version.
    """
    if len(data) != _FIELDS.size:
        raise PayloadError(f"a greeting of {len(data)} bytes; it has {_FIELDS.size}")
    magic, version, size, sender, receiver, incarnation, known, epoch, received, nonce = _FIELDS.unpack(data)
    if magic != _MAGIC or version != _VERSION:
        raise PayloadError(
            f"no greeting of this version of thinwire's gossip, but {data[:12]!r}: run the same thinwire everywhere"
        )
    if not incarnation:
        raise PayloadError("a greeting without an incarnation")
    return Greeting(size, sender, receiver, incarnation, known, epoch, received, nonce)


def greet_as_dialler(sock: socket.socket, secret: bytes, mine: Greeting) -> Greeting:
    """Greet the machine that was dialled; returns its greeting.

    Raises:
        PayloadError: it is not that machine, of another run, or does not know the secret.
        OSError: it closed the connection, or did not answer in time.
    """
    first = pack_greeting(mine)
    sock.sendall(first)
    second = _read(sock, _FIELDS.size)
    theirs = parse_greeting(second)
    proof = _read(sock, _PROOF_BYTES)
    if not hmac.compare_digest(proof, _proof(secret, b"accept", first, second)):
        raise PayloadError("it does not know this machine's secret: `secret` must be the same on all machines")
    if theirs.sender != mine.receiver:
        raise PayloadError(f"it is machine {theirs.sender}, not {mine.receiver}: the addresses are not in its order")
    check_run(theirs, mine)
    sock.sendall(_proof(secret, b"dial", first, second))
    return theirs


def read_greeting(sock: socket.socket) -> tuple[Greeting, bytes]:
    """What a machine that has just connected says first: as it is meant, and as it came."""
    first = _read(sock, _FIELDS.size)
    return parse_greeting(first), first


def answer_greeting(sock: socket.socket, secret: bytes, mine: Greeting, first: bytes) -> None:
    """Greet a machine that has connected, after read_greeting(), and have it prove itself.

    Raises:
        PayloadError, OSError: as greet_as_dialler() says.
    """
    second = pack_greeting(mine)
    sock.sendall(second + _proof(secret, b"accept", first, second))
    try:
        proof = _read(sock, _PROOF_BYTES)
    except ConnectionError as error:
        raise PayloadError(f"it left in the middle of the greeting ({error}): has it another secret?") from None
    if not hmac.compare_digest(proof, _proof(secret, b"dial", first, second)):
        raise PayloadError("it does not know this machine's secret: `secret` must be the same on all machines")


def check_run(theirs: Greeting, mine: Greeting) -> None:
    """Raises PayloadError for a greeting that is not meant for this machine of this run."""
    if theirs.size != mine.size or theirs.receiver != mine.sender:
        raise PayloadError(
            f"it takes this machine for number {theirs.receiver} of {theirs.size}; it is number {mine.sender} of "
            f"{mine.size}: the list of machines must be the same everywhere"
        )


def _proof(secret: bytes, role: bytes, first: bytes, second: bytes) -> bytes:
    return hmac.digest(secret, role + first + second, hashlib.sha256)


def _read(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = sock.recv(count - len(data))
        if not part:
            raise ConnectionResetError("the connection was closed")
        data += part
    return data
