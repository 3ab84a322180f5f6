"""The pieces that the index code is made of: packed digits, unary numbers, and a reader that stays within bounds."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from thinwire.comm.wire import PayloadError

Bytes: TypeAlias = npt.NDArray[np.uint8]
Ints: TypeAlias = npt.NDArray[np.int64]


class Reader:
    """Takes bytes from the front of a buffer, never more than there are."""

    def __init__(self, buffer: Bytes) -> None:
        self.buffer = buffer
        self.used = 0

    def take(self, size: int) -> Bytes:
        end = self.used + size
        if end > self.buffer.size:
            raise PayloadError(f"a payload of {self.buffer.size} bytes that should have {end} or more")
        taken = self.buffer[self.used : end]
        self.used = end
        return taken

    def take_size(self) -> int:
        """A length that write_size() wrote."""
        size = 0
        for shift in range(0, 49, 7):
            digit = int(self.take(1)[0])
            size |= (digit & 0x7F) << shift
            if digit < 0x80:
                return size
        raise PayloadError("a length of more than 49 bits")


def write_size(size: int) -> Bytes:
    """7 bits per byte, lowest first; the last byte has its high bit clear."""
    digits = [size & 0x7F]
    while size := size >> 7:
        digits[-1] |= 0x80
        digits.append(size & 0x7F)
    return np.array(digits, dtype=np.uint8)


def bytes_of_bits(bits: int) -> int:
    return -(-bits // 8)


def block_count(count: int, block: int) -> int:
    return -(-count // block)


def in_blocks(
    values: npt.NDArray[np.signedinteger], block: int, dtype: npt.DTypeLike = np.int64
) -> npt.NDArray[np.signedinteger]:
    """(count,) -> (blocks, block), the end padded with zeros."""
    padded = np.zeros(block_count(values.size, block) * block, dtype=dtype)
    padded[: values.size] = values
    return padded.reshape(-1, block)


def pack_low_bits(blocks: npt.NDArray[np.signedinteger], widths: Ints, count: int) -> list[Bytes]:
    """The low widths[i] bits of each value of block i: first bits 0..7 of all blocks, then 8..15, and so on.

    A plane holds the blocks in order, each at a whole byte, its values LSB first; it ends with value count - 1.

    Args: blocks, (blocks, block), as in_blocks() gives; block is a multiple of 8.
    """
    block = blocks.shape[1]
    return [_pack(blocks >> shift, digits)[: _plane_bytes(digits, count, block)] for shift, digits in _planes(widths)]


def unpack_low_bits(reader: Reader, widths: Ints, count: int, block: int) -> npt.NDArray[np.int64]:
    """What pack_low_bits() packed: (count,)."""
    values = np.zeros(count, dtype=np.int64)
    for shift, digits in _planes(widths):
        plane = _unpack(reader.take(_plane_bytes(digits, count, block)), digits, block)
        values |= plane[:count].astype(np.int64) << shift
    return values


def low_bits_bytes(widths: Ints, count: int, block: int) -> int:
    return sum(_plane_bytes(digits, count, block) for _, digits in _planes(widths))


def pack_unary(values: npt.NDArray[np.signedinteger]) -> Bytes:
    """Each number as that many zeros and a one."""
    ends = np.cumsum(values, dtype=np.int64)
    ends += np.arange(values.size)
    bits = np.zeros(int(ends[-1]) + 1, dtype=np.uint8)
    bits[ends] = 1
    return np.packbits(bits, bitorder="little")


def unpack_unary(stream: Bytes, count: int) -> Ints:
    """The numbers in a stream of exactly `count` of them."""
    ends = np.flatnonzero(np.unpackbits(stream, bitorder="little"))
    if ends.size != count:
        raise PayloadError(f"{ends.size} indices where {count} were announced")
    values = np.diff(ends, prepend=-1)
    values -= 1
    return values


def _planes(widths: Ints) -> list[tuple[int, Ints]]:
    """For each plane: the position of its lowest bit, and how many bits of it each block has."""
    return [(shift, np.clip(widths - shift, 0, 8)) for shift in range(0, int(widths.max()), 8)]


def _plane_bytes(digits: Ints, count: int, block: int) -> int:
    last = count - (digits.size - 1) * block
    return int(digits[:-1].sum()) * (block // 8) + bytes_of_bits(last * int(digits[-1]))


def _pack(blocks: npt.NDArray[np.signedinteger], digits: Ints) -> Bytes:
    """The low digits[i] <= 8 bits of each value of block i."""
    owner = _owner(digits, blocks.shape[1])
    packed = np.empty(owner.size, dtype=np.uint8)
    for width in _distinct(digits):
        # Eight values fill `width` bytes, and fit into one word.
        chosen = blocks[digits == width].reshape(-1, 8) & ((1 << width) - 1)
        words = np.zeros(len(chosen), dtype="<u8")
        for place in range(8):
            words |= chosen[:, place].astype(np.uint64) << np.uint64(width * place)
        packed[owner == width] = words.view(np.uint8).reshape(-1, 8)[:, :width].reshape(-1)
    return packed


def _unpack(packed: Bytes, digits: Ints, block: int) -> Bytes:
    """What _pack() packed, maybe without its end, which is then zeros: (blocks * block,)."""
    values = np.zeros((digits.size, block), dtype=np.uint8)
    owner = _owner(digits, block)
    whole = np.zeros(owner.size, dtype=np.uint8)
    whole[: packed.size] = packed
    for width in _distinct(digits):
        chosen = whole[owner == width].reshape(-1, width)
        padded = np.zeros((len(chosen), 8), dtype=np.uint8)
        padded[:, :width] = chosen
        words = padded.view("<u8").reshape(-1)
        unpacked = np.empty((len(chosen), 8), dtype=np.uint8)
        for place in range(8):
            unpacked[:, place] = (words >> np.uint64(width * place)) & np.uint64((1 << width) - 1)
        values[digits == width] = unpacked.reshape(-1, block)
    return values.reshape(-1)


def _owner(digits: Ints, block: int) -> Bytes:
    """For each packed byte, how many bits each value of its block has."""
    return np.repeat(digits.astype(np.uint8), digits * (block // 8))


def _distinct(digits: Ints) -> list[int]:
    return [int(width) for width in np.flatnonzero(np.bincount(digits)) if width]
