"""Control messages as bytes: a kind, and the fields in their order; at most the last one varies in length."""

from __future__ import annotations

import struct
from dataclasses import fields
from typing import NamedTuple

from thinwire.comm.onebyte.membership import messages as m
from thinwire.comm.onebyte.membership.errors import MessageError

PROPOSAL_LIMIT_BYTES = 1 << 24
_TEXT_LIMIT_BYTES = 1024


class _Layout(NamedTuple):
    message: type[m.Control]
    fixed: struct.Struct
    tail: type[bytes] | type[str] | None


_LAYOUTS: dict[int, _Layout] = {
    16: _Layout(m.Propose, struct.Struct("<II8sII??I"), bytes),
    17: _Layout(m.Ack, struct.Struct("<IH?I8sI"), None),
    18: _Layout(m.VoteRequest, struct.Struct("<IH?II"), None),
    19: _Layout(m.Vote, struct.Struct("<IH??"), str),
    20: _Layout(m.Join, struct.Struct("<HHI32s"), str),
    21: _Layout(m.Assign, struct.Struct("<H"), None),
    22: _Layout(m.Hint, struct.Struct("<I"), str),
    23: _Layout(m.Refuse, struct.Struct("<"), str),
    24: _Layout(m.Leave, struct.Struct("<H"), None),
    25: _Layout(m.Samples, struct.Struct("<HH"), None),
    26: _Layout(m.HashReport, struct.Struct("<HI32s"), None),
    27: _Layout(m.Rebuild, struct.Struct("<I"), None),
    28: _Layout(m.Resign, struct.Struct("<I"), None),
}
_KINDS = {layout.message: kind for kind, layout in _LAYOUTS.items()}


def limit_bytes(kind: int) -> int:
    """The longest body that a message of this kind may have. Raises MessageError for a kind that there is not."""
    layout = _LAYOUTS.get(kind)
    if layout is None:
        raise MessageError(f"a message of kind {kind}, which there is not")
    if layout.tail is None:
        return layout.fixed.size
    return layout.fixed.size + (PROPOSAL_LIMIT_BYTES if layout.tail is bytes else _TEXT_LIMIT_BYTES)


def encode(message: m.Control) -> tuple[int, bytes]:
    """Kind and body."""
    kind = _KINDS[type(message)]
    layout = _LAYOUTS[kind]
    values = [getattr(message, field.name) for field in fields(message)]
    if layout.tail is None:
        return kind, layout.fixed.pack(*values)
    last = values.pop()
    return kind, layout.fixed.pack(*values) + (last if layout.tail is bytes else last.encode()[:_TEXT_LIMIT_BYTES])


def decode(kind: int, body: bytes) -> m.Control:
    """The inverse. Raises MessageError."""
    if len(body) > limit_bytes(kind):
        raise MessageError(f"a message of kind {kind} with {len(body)} bytes; at most {limit_bytes(kind)}")
    layout = _LAYOUTS[kind]
    size = layout.fixed.size
    if len(body) < size or (layout.tail is None and len(body) > size):
        raise MessageError(f"a message of kind {kind} with {len(body)} bytes; its fields take {size}")
    values = list(layout.fixed.unpack_from(body))
    if layout.tail is bytes:
        values.append(bytes(body[size:]))
    elif layout.tail is str:
        try:
            values.append(bytes(body[size:]).decode())
        except UnicodeDecodeError as error:
            raise MessageError(f"a message of kind {kind} whose text is not UTF-8: {error}") from None
    return layout.message(*values)
