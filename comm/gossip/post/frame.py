"""Byte layout of a message between two machines: a header of 60 bytes, and the payload."""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass

from thinwire.comm.gossip.message import Kind
from thinwire.comm.wire import PayloadError

SIGN_OF_LIFE = 0
"""Instead of a Kind: no message; says that the sender lives, and what it has received."""
GOODBYE = 0xFFFF
"""Instead of a Kind: no message; the sender leaves, and has sent everything."""

_MAGIC = 0x50477754  # "TwGP"
# magic, kind, flags, stream, zero, round, number, received, payload bytes, mass, checksum of the payload
_FIELDS = struct.Struct("<IHHHHQQQQdI")
_CHECKSUM = struct.Struct("<I")
HEADER_BYTES = _FIELDS.size + _CHECKSUM.size
_KINDS = {int(kind) for kind in Kind}


@dataclass(frozen=True, slots=True)
class Header:
    """What comes before a payload.

    Args:
        kind: a Kind, SIGN_OF_LIFE or GOODBYE.
        flags, stream, round, mass: as Message has them.
        number: of messages that the sender has sent to this receiver before this one.
        received: of messages that the sender has received from this receiver.
        checksum: CRC-32 of the payload.
    """

    kind: int
    flags: int
    stream: int
    round: int
    number: int
    received: int
    payload_bytes: int
    mass: float
    checksum: int


def pack_header(header: Header) -> bytes:
    """60 bytes, little-endian; the last four are the CRC-32 of the others."""
    fields = _FIELDS.pack(
        _MAGIC,
        header.kind,
        header.flags,
        header.stream,
        0,
        header.round,
        header.number,
        header.received,
        header.payload_bytes,
        header.mass,
        header.checksum,
    )
    return fields + _CHECKSUM.pack(zlib.crc32(fields))


def parse_header(data: bytes | bytearray, limit_bytes: int) -> Header:
    """The inverse of pack_header().

    Args:
        data: 60 bytes.
        limit_bytes: of the longest payload that is taken; nothing is allocated for a longer one.
    Raises:
        PayloadError: the bytes are damaged, not of this protocol, or announce what cannot be.
    """
    if len(data) != HEADER_BYTES:
        raise PayloadError(f"a header of {len(data)} bytes; it has {HEADER_BYTES}")
    magic, kind, flags, stream, zero, round, number, received, payload_bytes, mass, checksum = _FIELDS.unpack_from(data)
    if magic != _MAGIC:
        raise PayloadError(f"no header of a gossip message: it begins with {magic:#010x}, not {_MAGIC:#010x}")
    if zlib.crc32(memoryview(data)[: _FIELDS.size]) != _CHECKSUM.unpack_from(data, _FIELDS.size)[0]:
        raise PayloadError("a header whose checksum is wrong")
    if kind in (SIGN_OF_LIFE, GOODBYE):
        if payload_bytes:
            raise PayloadError(f"a sign of life that announces a payload of {payload_bytes} bytes")
    elif kind not in _KINDS:
        raise PayloadError(f"a message of kind {kind}, which there is not")
    if payload_bytes > limit_bytes:
        raise PayloadError(f"a message that announces {payload_bytes} bytes; at most {limit_bytes} are taken")
    if zero or not math.isfinite(mass):
        raise PayloadError(f"a header with mass {mass} and {zero} where 0 must be")
    return Header(kind, flags, stream, round, number, received, payload_bytes, mass, checksum)
