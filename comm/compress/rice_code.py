"""Gaps between indices, in Golomb's code with a divisor for each block of gaps."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from thinwire.comm.compress.bit_stream import (
    Bytes,
    Ints,
    Reader,
    block_count,
    bytes_of_bits,
    in_blocks,
    low_bits_bytes,
    pack_low_bits,
    pack_unary,
    unpack_low_bits,
    unpack_unary,
    write_size,
)
from thinwire.comm.wire import PayloadError

# log2 of how many gaps share a divisor: few where sets cluster, many where they do not.
_BLOCKS = (6, 8, 10, 12)
_THIRDS = 0x80
_MAX_WIDTH = 62


class RiceCode:
    """The divisors that give the gaps the fewest bits, and what the whole comes to.

    Golomb (1966), with the divisors 2^b of Rice (1979) and 3 * 2^b between them, which nearly halve what powers of two
    alone lose. A gap is g_j = i_j - i_{j-1} - 1 with i_{-1} = -1, and q = g >> b.

        block       u8, log2 of how many gaps share a divisor
        size        of the unary part in bytes
        table       u8 per block: b, and in bit 7 whether the divisor is 3 * 2^b
        low bits    the low b bits of each gap
        digits      of blocks with divisor 3 * 2^b, where q = 3 t + s: a bit per gap, whether s > 0
                    a bit per gap with s > 0, whether s = 2
        unary       q (or t) zeros and a one for each gap

    No block stores where its unary part begins. A decoder finds gap j's at the j-th one: on a vector machine by a
    running sum over the bits, which spares each block two bytes.

    Args: places, int64 (k,), strictly ascending, k > 0.
    Attributes: size, in bytes.
    """

    def __init__(self, places: Ints) -> None:
        gaps = np.diff(places, prepend=-1)
        gaps -= 1
        self._count = gaps.size
        # No sum of gaps is above the last index, and numbers of half the width take half the time.
        narrow = int(places[-1]) >> 31 == 0
        self._gaps: npt.NDArray[np.signedinteger] = gaps.astype(np.int32) if narrow else gaps
        self._block, self._table, self.size = self._choose()

    def _choose(self) -> tuple[int, Bytes, int]:
        """log2 of the block, the table, and the bytes of the code."""
        bits, unary, digits, entries = self._costs()
        totals = {}
        for block in _BLOCKS:
            starts = np.arange(0, bits.shape[1], 1 << block - _BLOCKS[0])
            totals[block] = np.add.reduceat(bits, starts, axis=1)
        block = min(_BLOCKS, key=lambda block: int(totals[block].min(axis=0).sum()) + 8 * totals[block].shape[1])
        chosen = totals[block].argmin(axis=0)
        table = entries[chosen]
        finest = np.repeat(chosen, 1 << block - _BLOCKS[0])[: bits.shape[1]], np.arange(bits.shape[1])
        unary_bytes = bytes_of_bits(int(unary[finest].sum()))
        first_digits = int(_lengths(self._count, 1 << block)[table >= _THIRDS].sum())
        digit_bytes = bytes_of_bits(first_digits) + bytes_of_bits(int(digits[finest].sum()))
        low_bytes = low_bits_bytes(_widths(table), self._count, 1 << block)
        head_bytes = 1 + write_size(unary_bytes).size + table.size
        return block, table, head_bytes + low_bytes + digit_bytes + unary_bytes

    def _costs(self) -> tuple[Ints, Ints, Ints, Bytes]:
        """For each divisor and each of the smallest blocks: all bits, those of the unary part and of second digits.

        Then the divisors, as table entries. The bits of a block fall and then rise with the divisor, so that the
        search ends when no block gains.
        """
        blocks = in_blocks(self._gaps, 1 << _BLOCKS[0], self._gaps.dtype)
        lengths = _lengths(self._count, 1 << _BLOCKS[0])
        width = max(int((blocks.sum(axis=1, dtype=blocks.dtype) // lengths).min()).bit_length() - 4, 0)
        quotients = blocks >> width
        costs, entries = [], []
        least = np.full(lengths.size, np.iinfo(np.int64).max)
        gains = True
        while gains:
            thirds = quotients // 3
            ends = lengths + quotients.sum(axis=1, dtype=quotients.dtype)
            ends_of_thirds = lengths + thirds.sum(axis=1, dtype=thirds.dtype)
            digits = np.count_nonzero(quotients != 3 * thirds, axis=1)
            costs.append((ends + lengths * width, ends, np.zeros_like(lengths)))
            costs.append((ends_of_thirds + digits + lengths * (width + 1), ends_of_thirds, digits))
            entries += [width, width | _THIRDS]
            now = np.minimum(costs[-1][0], costs[-2][0])
            gains = bool((now < least).any())
            np.minimum(least, now, out=least)
            quotients >>= 1
            width += 1
        bits, unary, second_digits = (np.stack(column) for column in zip(*costs, strict=True))
        return bits, unary, second_digits, np.array(entries, dtype=np.uint8)

    def write(self) -> list[Bytes]:
        """The parts of the code, in order."""
        blocks = in_blocks(self._gaps, 1 << self._block, self._gaps.dtype)
        widths = _widths(self._table)
        quotients = blocks >> widths[:, None].astype(blocks.dtype)
        in_thirds = self._table >= _THIRDS
        chosen = quotients[in_thirds]
        thirds = chosen // 3
        lengths = _lengths(self._count, 1 << self._block)
        digits = (chosen - 3 * thirds).reshape(-1)[: int(lengths[in_thirds].sum())]
        quotients[in_thirds] = thirds
        above = digits > 0
        unary = pack_unary(quotients.reshape(-1)[: self._count])
        return [
            np.array([self._block], dtype=np.uint8),
            write_size(unary.size),
            self._table,
            *pack_low_bits(blocks, widths, self._count),
            np.packbits(above, bitorder="little"),
            np.packbits(digits[above] == 2, bitorder="little"),
            unary,
        ]


def read_rice(reader: Reader, numel: int, count: int) -> Ints:
    """The indices that RiceCode wrote; whether they ascend is the caller's to check.

    Raises:
        PayloadError: the lengths contradict each other, or a gap is larger than the tensor.
    """
    log_block = int(reader.take(1)[0])
    if log_block not in _BLOCKS:
        raise PayloadError(f"blocks of 2^{log_block} gaps; they have 2^{_BLOCKS}")
    block = 1 << log_block
    size = reader.take_size()
    if count > 8 * size:
        raise PayloadError(f"{size} bytes of quotients for {count} indices, which need a bit each or more")
    table = reader.take(block_count(count, block))
    widths = _widths(table)
    if widths.max() > _MAX_WIDTH:
        raise PayloadError(f"a table with the parameter {widths.max()}; {_MAX_WIDTH} is the largest")
    low = unpack_low_bits(reader, widths, count, block)
    in_thirds = np.repeat(table >= _THIRDS, block)[:count]
    above = np.flatnonzero(in_thirds)
    digits = _take_bits(reader, above.size)
    above = above[digits > 0]
    twos = _take_bits(reader, above.size)
    quotients = unpack_unary(reader.take(size), count)
    quotients[in_thirds] *= 3
    quotients[above] += twos + np.int64(1)
    shifts = np.repeat(widths, block)[:count]
    if (quotients > (numel - 1) >> shifts).any():
        raise PayloadError(f"a gap of more than {numel} places")
    quotients <<= shifts
    quotients |= low
    quotients += 1
    places = np.cumsum(quotients)
    places -= 1
    return places


def _widths(table: Bytes) -> Ints:
    return (table & (_THIRDS - 1)).astype(np.int64)


def _lengths(count: int, block: int) -> Ints:
    """Gaps in each block."""
    lengths = np.full(block_count(count, block), block, dtype=np.int64)
    lengths[-1] = count - (lengths.size - 1) * block
    return lengths


def _take_bits(reader: Reader, count: int) -> npt.NDArray[np.uint8]:
    return np.unpackbits(reader.take(bytes_of_bits(count)), count=count, bitorder="little")
