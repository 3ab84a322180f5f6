"""Records as bytes: what a log holds between two checks of its chain.

Type byte, then
  a round: the codes of every member of the roster in force, in its order; absent ones are all 0x80. Its number is
    implied. Two flags in the type: an fp32 rate precedes the codes, if it differs from the last round's; a bitmap of
    who contributed precedes them, if the codes do not tell (somebody's were all 0x80).
  a listed round, whose slots or numbers of codes are not the roster's: length, fp32 rate, then slot, count and codes.
  a roster: length, epoch, then slot, samples, name and address of each member.
  a snapshot: SHA-256 of the weights. The number of rounds is implied.
A length comes with a CRC-32 of type and length, and two types differ in four bits or more: damage is not taken for a
record that the end of the file cuts off.
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

from thinwire.comm.onebyte.rounds import SHARED_SLOT, Contribution, Member, Record, Roster, Round, Snapshot

ABSENT = 0x80
MODEL_HASH_BYTES = 32

# Words of the extended Hamming code of length 8.
_PLAIN, _RATE, _BITMAP, _RATE_BITMAP, _LISTED, _ROSTER, _SNAPSHOT = 0x0F, 0x33, 0x55, 0x66, 0x3C, 0x5A, 0x96
_TYPES = frozenset((_PLAIN, _RATE, _BITMAP, _RATE_BITMAP, _LISTED, _ROSTER, _SNAPSHOT))
_FLOAT = struct.Struct("<f")
_LENGTH = struct.Struct("<II")  # and the checksum
_EPOCH = struct.Struct("<I")
_SLOT = struct.Struct("<HH")  # slot; number of codes or samples
_TEXT = struct.Struct("<H")
_U16, _U32 = 0xFFFF, 0xFFFFFFFF


class RecordError(ValueError):
    """Bytes that are no record, or a record that cannot follow those before it."""


class Context(NamedTuple):
    """What the records before tell of the next one. places: slot, first code and number of codes of each member."""

    rounds: int = 0
    rate: bytes = b""
    roster: Roster | None = None
    places: tuple[tuple[int, int, int], ...] = ()
    codes: int = 0

    def after(self, record: Record) -> Context:
        """The context of the record that follows `record`."""
        if isinstance(record, Round):
            return Context(self.rounds + 1, _rate(record), self.roster, self.places, self.codes)
        if isinstance(record, Roster):
            places, codes = [], 0
            for member in record.members:
                places.append((member.slot, codes, member.samples))
                codes += member.samples
            return Context(self.rounds, self.rate, record, tuple(places), codes)
        return self


def encode(record: Record, context: Context) -> bytes:
    """The bytes of a record that follows what `context` knows. Raises RecordError if it cannot."""
    if isinstance(record, Round):
        return _encode_round(record, context)
    if isinstance(record, Roster):
        _check_roster(record, context)
        body = bytearray(_EPOCH.pack(record.epoch))
        for member in record.members:
            body += _SLOT.pack(member.slot, member.samples)
            for text in (member.name, member.address):
                encoded = text.encode()
                body += _TEXT.pack(len(encoded)) + encoded
        return _head(_ROSTER, len(body)) + body
    if record.rounds != context.rounds:
        raise RecordError(f"a snapshot of {record.rounds} rounds after {context.rounds} rounds")
    if len(record.model_hash) != MODEL_HASH_BYTES:
        raise RecordError(f"a model hash of {len(record.model_hash)} bytes; SHA-256 has {MODEL_HASH_BYTES}")
    return bytes([_SNAPSHOT]) + record.model_hash


def decode(data: bytes, start: int, context: Context) -> tuple[Record, int] | None:
    """The record at data[start:] and where it ends; None if the data end before it does.

    Raises RecordError for what no encode() has written.
    """
    if start >= len(data):
        return None
    kind = data[start]
    if kind not in _TYPES:
        raise RecordError(f"type {kind:#04x}, which there is not")
    if kind in (_LISTED, _ROSTER):
        begin = start + 1 + _LENGTH.size
        if len(data) < begin:
            return None
        length, _ = _LENGTH.unpack_from(data, start + 1)
        if data[start:begin] != _head(kind, length):
            raise RecordError(f"a length of {length} bytes whose checksum is wrong")
        if len(data) < begin + length:
            return None
        body = _Body(data, begin, begin + length)
        return (_listed(body, context) if kind == _LISTED else _roster(body, context)), begin + length
    if kind == _SNAPSHOT:
        end = start + 1 + MODEL_HASH_BYTES
        return None if len(data) < end else (Snapshot(context.rounds, data[start + 1 : end]), end)
    return _decode_round(data, start, context)


def _encode_round(record: Round, context: Context) -> bytes:
    if record.number != context.rounds or record.number > _U32:
        raise RecordError(f"round {record.number} after {context.rounds} rounds")
    rate = _rate(record)
    _check_slots(record)
    by_slot = {c.slot: c.codes for c in record.contributions}
    codes = bytearray(b"\x80" * context.codes)
    bitmap = bytearray(-(-len(context.places) // 8))
    found, unclear = 0, False
    for number, (slot, first, count) in enumerate(context.places):
        mine = by_slot.get(slot)
        if mine is None or len(mine) != count:
            continue
        codes[first : first + count] = mine
        bitmap[number >> 3] |= 1 << (number & 7)
        unclear |= mine.count(ABSENT) == count
        found += 1
    if found < len(record.contributions):
        body = bytearray(rate)
        for contribution in record.contributions:
            if len(contribution.codes) > _U16:
                raise RecordError(f"slot {contribution.slot} with {len(contribution.codes)} codes; at most {_U16}")
            body += _SLOT.pack(contribution.slot, len(contribution.codes)) + contribution.codes
        return _head(_LISTED, len(body)) + body
    new_rate = rate != context.rate
    kind = (_RATE_BITMAP if new_rate else _BITMAP) if unclear else (_RATE if new_rate else _PLAIN)
    return bytes([kind]) + (rate if new_rate else b"") + (bitmap if unclear else b"") + codes


def _decode_round(data: bytes, start: int, context: Context) -> tuple[Round, int] | None:
    kind = data[start]
    start += 1
    rate = context.rate
    if kind in (_RATE, _RATE_BITMAP):
        rate = data[start : start + _FLOAT.size]
        start += _FLOAT.size
    elif not rate:
        raise RecordError("a first round without a rate")
    bitmap = None
    if kind in (_BITMAP, _RATE_BITMAP):
        size = -(-len(context.places) // 8)
        bitmap = data[start : start + size]
        start += size
    end = start + context.codes
    if len(data) < end:
        return None
    contributions = []
    for number, (slot, first, count) in enumerate(context.places):
        codes = data[start + first : start + first + count]
        if (codes.count(ABSENT) < count) if bitmap is None else (bitmap[number >> 3] >> (number & 7) & 1):
            contributions.append(Contribution(slot, codes))
    record = Round(context.rounds, _FLOAT.unpack(rate)[0], tuple(contributions))
    _rate(record)
    return record, end


class _Body:
    """Fields of a body, one after the other, with bounds checks."""

    def __init__(self, data: bytes, at: int, end: int) -> None:
        self.data, self.at, self.end = data, at, end

    def take(self, count: int) -> bytes:
        if self.at + count > self.end:
            raise RecordError(f"a field of {count} bytes where {self.end - self.at} are left of its record")
        self.at += count
        return self.data[self.at - count : self.at]

    def text(self) -> str:
        try:
            return self.take(_TEXT.unpack(self.take(_TEXT.size))[0]).decode()
        except UnicodeDecodeError as error:
            raise RecordError(f"a name or address that is not UTF-8: {error}") from None


def _listed(body: _Body, context: Context) -> Round:
    rate = _FLOAT.unpack(body.take(_FLOAT.size))[0]
    contributions = []
    while body.at < body.end:
        slot, count = _SLOT.unpack(body.take(_SLOT.size))
        contributions.append(Contribution(slot, body.take(count)))
    record = Round(context.rounds, rate, tuple(contributions))
    _check_slots(record)
    _rate(record)
    return record


def _roster(body: _Body, context: Context) -> Roster:
    (epoch,) = _EPOCH.unpack(body.take(_EPOCH.size))
    members = []
    while body.at < body.end:
        slot, samples = _SLOT.unpack(body.take(_SLOT.size))
        members.append(Member(slot, body.text(), body.text(), samples))
    roster = Roster(epoch, tuple(members))
    _check_roster(roster, context)
    return roster


def _check_roster(roster: Roster, context: Context) -> None:
    oldest = -1 if context.roster is None else context.roster.epoch
    if not oldest < roster.epoch <= _U32:
        raise RecordError(f"a roster of epoch {roster.epoch} after epoch {oldest}; epochs count up")
    last = -1
    for member in roster.members:
        if not last < member.slot < SHARED_SLOT:
            raise RecordError(f"slot {member.slot} after slot {last} in a roster; slots ascend below {SHARED_SLOT}")
        if not 0 <= member.samples <= _U16:
            raise RecordError(f"{member.name} with {member.samples} samples per round; 0 to {_U16}")
        if max(len(member.name.encode()), len(member.address.encode())) > _U16:
            raise RecordError(f"slot {member.slot}: a name or address of more than {_U16} bytes")
        last = member.slot


def _check_slots(record: Round) -> None:
    last = -1
    for contribution in record.contributions:
        if not last < contribution.slot <= SHARED_SLOT:
            raise RecordError(f"slot {contribution.slot} after slot {last}; slots ascend from 0 to {SHARED_SLOT}")
        last = contribution.slot


def _rate(record: Round) -> bytes:
    try:
        rate = _FLOAT.pack(record.rate)
    except OverflowError:
        rate = b""
    if not rate or _FLOAT.unpack(rate)[0] != record.rate or record.rate - record.rate != 0:
        raise RecordError(f"round {record.number}: rate {record.rate!r} is not a finite fp32 number")
    return rate


def _head(kind: int, length: int) -> bytes:
    return bytes([kind]) + _LENGTH.pack(length, zlib.crc32(length.to_bytes(4, "little"), kind))
