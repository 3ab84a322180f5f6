"""Gaps between indices, in Golomb's code with a divisor for each block of 256."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from thinwire.comm.compress.bit_stream import (
    BLOCK,
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

_THIRDS = 0x80
_MAX_WIDTH = 62


class RiceCode:
    """The divisors that give each block of gaps the fewest bits, and what the whole comes to.

    Golomb (1966), with the divisors 2^b of Rice (1979) and 3 * 2^b between them, which nearly halve what powers of two
    alone lose. A gap is g_j = i_j - i_{j-1} - 1 with i_{-1} = -1, and q = g >> b.

        size        of the unary part in bytes
        table       u8 per block: b, and in bit 7 whether the divisor is 3 * 2^b
        low bits    the low b bits of each gap
        digits      of blocks with divisor 3 * 2^b, where q = 3 t + s: a bit per gap, whether s > 0
                    a bit per gap with s > 0, whether s = 2
        unary       q (or t) zeros and a one for each gap

    No block stores where its unary part begins. A decoder finds gap j's at the j-th one: on a vector machine by a
    running sum over the bits, which costs less than the table's two bytes per block would.

    Args: places, int64 (k,), strictly ascending, k > 0.
    Attributes: size, in bytes.
    """

    def __init__(self, places: Ints) -> None:
        gaps = np.diff(places, prepend=-1)
        gaps -= 1
        self._count = gaps.size
        # Most gaps are far below 2^31 however large the tensor, and numbers of half the width take half the time.
        self._blocks = in_blocks(gaps, np.int32 if int(gaps.max()) >> 31 == 0 else np.int64)
        self._lengths = _lengths(self._count)
        self._table, self._unary_bits, self._digit_bits = self._choose()
        unary_bytes = bytes_of_bits(self._unary_bits)
        low_bytes = low_bits_bytes(_widths(self._table), self._count)
        self.size = write_size(unary_bytes).size + self._table.size + low_bytes + self._digit_bits + unary_bytes

    def _choose(self) -> tuple[Bytes, int, int]:
        """The table, bits of the unary part, and bytes of the digits.

        The bits of a block fall and then rise with the divisor, so that the search ends when no block gains.
        """
        lengths = self._lengths
        means = self._blocks.sum(axis=1, dtype=np.int64) // lengths
        width = max(int(means.min()).bit_length() - 4, 0)
        table = np.zeros(lengths.size, dtype=np.uint8)
        least = np.full(lengths.size, np.iinfo(np.int64).max)
        unary = np.zeros_like(least)
        second_digits = np.zeros_like(least)
        quotients = self._blocks >> width
        gained = True
        while gained:
            gained = False
            thirds = quotients // 3
            no_digits = np.zeros_like(lengths)
            digits = np.count_nonzero(quotients != 3 * thirds, axis=1)
            for numbers, seconds, extra, entry in (
                (quotients, no_digits, 0, width),
                (thirds, digits, 1, width | _THIRDS),
            ):
                ends = numbers.sum(axis=1, dtype=np.int64) + lengths
                bits = ends + seconds + lengths * (width + extra)
                better = bits < least
                if better.any():
                    gained = True
                    least[better], unary[better] = bits[better], ends[better]
                    second_digits[better], table[better] = seconds[better], entry
            quotients >>= 1
            width += 1
        first_bits = int(lengths[table >= _THIRDS].sum())
        digit_bytes = bytes_of_bits(first_bits) + bytes_of_bits(int(second_digits.sum()))
        return table, int(unary.sum()), digit_bytes

    def write(self) -> list[Bytes]:
        widths = _widths(self._table)
        quotients = self._blocks >> widths[:, None].astype(self._blocks.dtype)
        in_thirds = self._table >= _THIRDS
        chosen = quotients[in_thirds]
        thirds = chosen // 3
        digits = (chosen - 3 * thirds).reshape(-1)[: int(self._lengths[in_thirds].sum())]
        quotients[in_thirds] = thirds
        above = digits > 0
        unary = pack_unary(quotients.reshape(-1)[: self._count])
        return [
            write_size(unary.size),
            self._table,
            *pack_low_bits(self._blocks, widths, self._count),
            np.packbits(above, bitorder="little"),
            np.packbits(digits[above] == 2, bitorder="little"),
            unary,
        ]


def read_rice(reader: Reader, numel: int, count: int) -> Ints:
    """The indices that RiceCode wrote; whether they ascend is the caller's to check.

    Raises:
        PayloadError: the lengths contradict each other, or a gap is larger than the tensor.
    """
    size = reader.take_size()
    if count > 8 * size:
        raise PayloadError(f"{size} bytes of quotients for {count} indices, which need a bit each or more")
    table = reader.take(block_count(count))
    widths = _widths(table)
    if widths.max() > _MAX_WIDTH:
        raise PayloadError(f"a table with the parameter {widths.max()}; {_MAX_WIDTH} is the largest")
    low = unpack_low_bits(reader, widths, count)
    in_thirds = np.repeat(table >= _THIRDS, BLOCK)[:count]
    above = np.flatnonzero(in_thirds)
    digits = _take_bits(reader, above.size)
    above = above[digits > 0]
    twos = _take_bits(reader, above.size)
    quotients = unpack_unary(reader.take(size), count)
    if above.size or in_thirds.any():
        quotients[in_thirds] *= 3
        quotients[above] += twos + np.int64(1)
    shifts = np.repeat(widths, BLOCK)[:count]
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


def _lengths(count: int) -> Ints:
    """Gaps in each block."""
    lengths = np.full(block_count(count), BLOCK, dtype=np.int64)
    lengths[-1] = count - (lengths.size - 1) * BLOCK
    return lengths


def _take_bits(reader: Reader, count: int) -> npt.NDArray[np.uint8]:
    return np.unpackbits(reader.take(bytes_of_bits(count)), count=count, bitorder="little")
