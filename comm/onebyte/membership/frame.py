"""The frame of a contribution: 24 bytes and the codes."""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import NamedTuple

from thinwire.comm.onebyte.membership.errors import MessageError

FRAME = 1
"""The version, and on a connection the kind of the message."""
RUN_BYTES = 8
HEADER = struct.Struct(f"<H{RUN_BYTES}sIHHH")  # version, run, round, roster epoch, slot, count
CHECK_BYTES = 4
FRAME_BYTES = HEADER.size + CHECK_BYTES
"""What a frame has beside its codes."""


class Frame(NamedTuple):
    """A contribution as it arrived. epoch: the low 16 bits of its roster's. Not yet checked: `check`."""

    round: int
    epoch: int
    slot: int
    codes: bytes
    body: bytes
    check: bytes

    def is_from(self, secret: bytes, term: int, chain: bytes) -> bool:
        """Whether its sender knew the secret, follows the leader of `term`, and has the log with this chain hash."""
        return hmac.compare_digest(_check(self.body, secret, term, chain), self.check)


def pack_frame(
    run: bytes, round: int, epoch: int, slot: int, codes: bytes, *, secret: bytes, term: int, chain: bytes
) -> bytes:
    """The frame of one machine's codes.

    Its check bytes are keyed with the chain hash of the sender's log: the frame also says "I hold all of that", which
    acknowledges the records before it, and cannot be mistaken for one of another history.
    """
    body = HEADER.pack(FRAME, run, round, epoch & 0xFFFF, slot, len(codes)) + codes
    return body + _check(body, secret, term, chain)


def parse_frame(data: bytes, run: bytes) -> Frame:
    """Raises MessageError for what is no frame of this run."""
    if len(data) < FRAME_BYTES:
        raise MessageError(f"a frame of {len(data)} bytes; it has {FRAME_BYTES} and its codes")
    version, of_run, round_, epoch, slot, count = HEADER.unpack_from(data)
    if version != FRAME or of_run != run:
        raise MessageError(f"a frame of version {version} and run {of_run.hex()}; expected {FRAME} and {run.hex()}")
    if len(data) != FRAME_BYTES + count:
        raise MessageError(f"a frame of {len(data)} bytes that announces {count} codes")
    body = bytes(data[: HEADER.size + count])
    return Frame(round_, epoch, slot, body[HEADER.size :], body, bytes(data[HEADER.size + count :]))


def _check(body: bytes, secret: bytes, term: int, chain: bytes) -> bytes:
    return hmac.digest(secret, chain + term.to_bytes(4, "little") + body, hashlib.sha256)[:CHECK_BYTES]
