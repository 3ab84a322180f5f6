"""How two machines greet each other on a new connection, and what makes the bytes between them theirs."""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import NamedTuple

from thinwire.comm.onebyte.membership.errors import MessageError
from thinwire.comm.onebyte.membership.frame import RUN_BYTES

MAGIC = b"tw1b\x00\x01\x00\x00"  # the last four bytes are the version of the protocol
NONCE_BYTES = 16
TAG_BYTES = 8
TO_TAKE_PART = 0
FOR_MANIFEST = 1
HEAD = struct.Struct(f"<{len(MAGIC)}sB{RUN_BYTES}s{NONCE_BYTES}sB")  # magic, purpose, run, nonce, address length


class Greeting(NamedTuple):
    """The first bytes on a connection, from either side. address: where the sender listens."""

    purpose: int
    run: bytes
    nonce: bytes
    address: str


def tag(key: bytes, *parts: bytes) -> bytes:
    """Check bytes under a key."""
    return hmac.digest(key, b"".join(parts), hashlib.sha256)[:TAG_BYTES]


def pack_greeting(greeting: Greeting, secret: bytes) -> bytes:
    """Bytes of a greeting."""
    address = greeting.address.encode()
    if len(address) > 255:
        raise ValueError(f"advertise: {greeting.address!r} has {len(address)} bytes; at most 255")
    body = HEAD.pack(MAGIC, greeting.purpose, greeting.run, greeting.nonce, len(address)) + address
    return body + tag(secret, b"greeting", body)


def rest_bytes(head: bytes) -> int:
    """How many bytes follow the HEAD.size first ones. Raises MessageError for what is no greeting."""
    magic, purpose, _, _, length = HEAD.unpack(head)
    if magic != MAGIC or purpose not in (TO_TAKE_PART, FOR_MANIFEST):
        raise MessageError(
            f"no greeting of this version of thinwire's one-byte machines, but {head[: len(MAGIC)]!r}: run the same "
            "thinwire everywhere"
        )
    return int(length) + TAG_BYTES


def parse_greeting(data: bytes, secret: bytes) -> Greeting:
    """The inverse of pack_greeting(). Raises MessageError."""
    if len(data) < HEAD.size or len(data) != HEAD.size + rest_bytes(data[: HEAD.size]):
        raise MessageError(f"a greeting of {len(data)} bytes")
    if not hmac.compare_digest(tag(secret, b"greeting", data[:-TAG_BYTES]), data[-TAG_BYTES:]):
        raise MessageError("a greeting with wrong check bytes: the `secret` must be the same on all machines")
    _, purpose, run, nonce, _ = HEAD.unpack_from(data)
    try:
        address = data[HEAD.size : -TAG_BYTES].decode()
    except UnicodeDecodeError as error:
        raise MessageError(f"a greeting with an address that is not UTF-8: {error}") from None
    return Greeting(purpose, run, nonce, address)


def session_key(secret: bytes, sender: Greeting, receiver: Greeting) -> bytes:
    """The key of what `sender` says to `receiver` on this connection, and on no other."""
    parts = (sender.nonce, receiver.nonce, sender.run, sender.address.encode())
    return hmac.digest(secret, b"session" + b"".join(parts), hashlib.sha256)
