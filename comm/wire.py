"""Byte layout of messages that leave a process, with bounds checks."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FLAG_NOT_FINITE = 1
"""The sender's input was not finite; there is no body."""
FLAG_ABSENT = 2
"""The sender takes no part in this step; there is no body."""

HEADER_BYTES = 24
_BODY_UNCHECKED = 128  # set by pack_message() alone
_MAGIC = 0x5754
_VERSION = 1
# magic, version, codec, flags, three zeros, bytes of the whole message, sections; the checksum follows.
_FIELDS = struct.Struct("<HBBB3xQI")
_CHECKSUM = struct.Struct("<I")
_ALIGNMENT = 4


class PayloadError(ValueError):
    """Received bytes are not what they should be: truncated, corrupted, or written for something else."""


@dataclass(frozen=True)
class Message:
    """What unpack_message() found: the sender's flags, and views of its sections, uint8."""

    flags: int
    sections: list[Tensor]


def message_bytes(section_bytes: Sequence[int]) -> int:
    """Length of the message that pack_message() makes of sections of these lengths."""
    return _layout(section_bytes)[1]


def pack_message(sections: Sequence[Tensor], *, codec: int, flags: int = 0) -> Tensor:
    """Join sections into one message: 24 bytes of header, u32 lengths of all sections but the last, the sections.

    Everything is little-endian, and each section begins at a multiple of 4 bytes. The CRC-32 covers the header and
    what follows it; of a message on a GPU only the header, since the rest would have to visit the host for it.

    Args:
        sections: uint8, one-dimensional, on one device, each shorter than 4 GiB; may be empty.
        codec: 0..255, what the sections are; the receiver must expect the same.
        flags: FLAG_NOT_FINITE, FLAG_ABSENT or 0.
    Returns: uint8 (message_bytes,), on the sections' device.
    Raises:
        ValueError: a section is 4 GiB or longer.
    """
    assert 0 <= flags < _BODY_UNCHECKED, f"flags {flags}"
    lengths = [section.numel() for section in sections]
    if any(length >> 32 for length in lengths):
        raise ValueError(f"a section of {max(lengths)} bytes; a message holds sections of less than 4 GiB: split it")
    starts, total = _layout(lengths)
    device = sections[0].device if sections else torch.device("cpu")
    message = torch.empty(total, dtype=torch.uint8, device=device)
    table = np.array(lengths[:-1], dtype="<u4").view(np.uint8)
    end = HEADER_BYTES + table.size
    message[HEADER_BYTES:end] = torch.from_numpy(table)
    for section, start in zip(sections, starts, strict=True):
        message[end:start] = 0
        end = start + section.numel()
        message[start:end] = section
    on_host = device.type == "cpu"
    fields = _FIELDS.pack(_MAGIC, _VERSION, codec, flags if on_host else flags | _BODY_UNCHECKED, total, len(sections))
    checksum = zlib.crc32(fields)
    if on_host:
        checksum = zlib.crc32(message[HEADER_BYTES:].numpy().data, checksum)
    header = bytearray(fields + _CHECKSUM.pack(checksum))
    message[:HEADER_BYTES] = torch.frombuffer(header, dtype=torch.uint8)
    return message


def unpack_message(data: Tensor, *, codec: int) -> Message:
    """The sections of a message that pack_message() made; they share memory with `data`.

    Args:
        data: uint8 (message_bytes,), exactly the message.
        codec: what the sections should be.
    Raises:
        PayloadError: `data` is truncated, corrupted, of another version, or written for another codec.
    """
    if data.numel() < HEADER_BYTES:
        raise PayloadError(f"a message of {data.numel()} bytes, shorter than its header of {HEADER_BYTES}")
    header = data[:HEADER_BYTES].cpu().numpy().tobytes()
    magic, version, found_codec, flags, total, count = _FIELDS.unpack_from(header)
    if magic != _MAGIC:
        raise PayloadError(f"not a message of thinwire: it begins with {magic:#06x}, not {_MAGIC:#06x}")
    if version != _VERSION:
        raise PayloadError(
            f"a message of version {version}; this is version {_VERSION}: run the same thinwire everywhere"
        )
    if total != data.numel():
        raise PayloadError(f"a message of {total} bytes of which {data.numel()} arrived")
    checksum = zlib.crc32(header[: _FIELDS.size])
    if not flags & _BODY_UNCHECKED:
        checksum = zlib.crc32(data[HEADER_BYTES:].cpu().contiguous().numpy().data, checksum)
    if checksum != _CHECKSUM.unpack_from(header, _FIELDS.size)[0]:
        raise PayloadError(f"a message of {total} bytes whose checksum is wrong")
    if found_codec != codec:
        raise PayloadError(f"a message of codec {found_codec} where one of codec {codec} was expected")
    return Message(flags & ~_BODY_UNCHECKED, _sections(data, count))


def _sections(data: Tensor, count: int) -> list[Tensor]:
    table_end = HEADER_BYTES + 4 * max(count - 1, 0)
    if table_end > data.numel():
        raise PayloadError(f"a message of {data.numel()} bytes with {count} sections")
    lengths = data[HEADER_BYTES:table_end].cpu().numpy().view("<u4").tolist()
    if count:
        last_start, _ = _layout([*lengths, 0])
        lengths.append(data.numel() - last_start[-1])
    starts, end = _layout(lengths)
    if end != data.numel() or (count and lengths[-1] < 0):
        raise PayloadError(f"a message of {data.numel()} bytes whose sections end at {end}")
    return [data[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def _layout(lengths: Sequence[int]) -> tuple[list[int], int]:
    """Where each section starts, and where the last one ends."""
    end = HEADER_BYTES + 4 * max(len(lengths) - 1, 0)
    starts = []
    for length in lengths:
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        starts.append(start)
        end = start + length
    return starts, end
