"""What a newcomer asks before it has a log: the run's manifest."""

from __future__ import annotations

import secrets
import socket
import struct
import time

from thinwire.comm.address import split_address
from thinwire.comm.errors import PeerLostError
from thinwire.comm.onebyte.membership import handshake
from thinwire.comm.onebyte.membership.errors import MessageError
from thinwire.comm.onebyte.membership.frame import RUN_BYTES
from thinwire.comm.onebyte.membership.handshake import TAG_BYTES, Greeting

_LENGTH = struct.Struct("<I")
_LIMIT_BYTES = 1 << 26


def fetch_manifest(contact: str, *, secret: str = "", timeout_s: float = 10.0) -> bytes:
    """The manifest of the run that the machine at `contact`, host:port, takes part in.

    Raises:
        PeerLostError: it does not answer.
        MessageError: it is not a machine of a one-byte run, or its secret differs.
    """
    key = secret.encode()
    mine = Greeting(handshake.FOR_MANIFEST, bytes(RUN_BYTES), secrets.token_bytes(handshake.NONCE_BYTES), "")
    try:
        with socket.create_connection(split_address(contact), timeout_s) as sock:
            deadline = time.monotonic() + timeout_s
            sock.sendall(handshake.pack_greeting(mine, key))
            head = _receive(sock, handshake.HEAD.size, deadline)
            theirs = handshake.parse_greeting(head + _receive(sock, handshake.rest_bytes(head), deadline), key)
            key_in = handshake.session_key(key, theirs, mine)
            sock.sendall(handshake.tag(handshake.session_key(key, mine, theirs), b"confirm"))
            if _receive(sock, TAG_BYTES, deadline) != handshake.tag(key_in, b"confirm"):
                raise MessageError(f"{contact}: a greeting of another connection, repeated")
            head = _receive(sock, _LENGTH.size, deadline)
            (length,) = _LENGTH.unpack(head)
            if length > _LIMIT_BYTES:
                raise MessageError(f"{contact}: a manifest of {length} bytes; at most {_LIMIT_BYTES}")
            body = _receive(sock, length + TAG_BYTES, deadline)
    except OSError as error:
        raise PeerLostError(
            f"{contact} does not answer as a machine of a one-byte run would: {error or 'time is up'}. Is it running, "
            "is the address right, and do both have the same secret?",
            operation="onebyte/manifest",
        ) from error
    if body[length:] != handshake.tag(key_in, head, body[:length]):
        raise MessageError(f"{contact}: a manifest whose check bytes are wrong")
    return body[:length]


def _receive(sock: socket.socket, count: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < count:
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        piece = sock.recv(min(count - len(data), 1 << 16))
        if not piece:
            raise ConnectionError(f"it closed the connection after {len(data)} of {count} bytes")
        data += piece
    return bytes(data)
