"""Random numbers that are a function of a key and of the element's place: the same on every device, in any order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from thinwire.kernels.triton_kernel import triton_part

if TYPE_CHECKING:
    import triton.language as tl

_WORD = 0xFFFFFFFF
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B  # Wellons' "lowbias32", which the second half of the key enters midway
_TILE = 1 << 15  # words; what is made of them stays in the cache


def random_words(key: int, count: int, *, offset: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Words offset, offset + 1, ... of the sequence that belongs to `key`: whole numbers from 0 to 2^32 - 1.

    With the key stirred into two words k and l: word i = mix(i mod 2^32), a bijection of 32 bits made of
    x <- i ^ k, x <- (x ^ x >> 16) 0x7feb352d, x <- (x ^ x >> 15) + l, x <- x 0x846ca68b, x <- x ^ x >> 16. Not for
    secrets: it serves rounding and sampling.

    Args:
        key: 0 <= key < 2^64.
        count: how many.
        offset: place of the first, 0 or more.

    Returns: int64 (count,).
    """
    check_place(key, offset)
    if torch.device(device).type != "cpu":
        return _words_reference(key, offset, count, device)
    words = torch.empty(count, dtype=torch.int64)
    made = WordMaker(key, min(count, _TILE))
    for start in range(0, count, _TILE):
        size = min(_TILE, count - start)
        words.numpy()[start : start + size] = made.words(offset + start, size)
    return words


def dither_reference(key: int, count: int, *, offset: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Noise to add before rounding to nearest, so that it rounds up with the probability of the fraction.

    d_i = (h_i + 1/2) / 2^16, where h_i is a half of word i >> 1 as a signed number: the low one for an even i. So
    -1/2 < d < 1/2, the mean is 0, and d is never a tie.

    Returns: fp32 (count,).
    """
    check_place(key, offset)
    places = torch.arange(offset, offset + count, device=device)
    words = _words_reference(key, offset >> 1, ((offset + count + 1) >> 1) - (offset >> 1), device)
    halves = words[(places >> 1) - (offset >> 1)] >> 16 * (places & 1) & 0xFFFF
    signed = halves - ((halves & 0x8000) << 1)
    return (signed.to(torch.float32) + 0.5) * 2.0**-16


class WordMaker:
    """The words of one key, up to `most` at a time, in memory that is allocated once."""

    def __init__(self, key: int, most: int) -> None:
        stirred = stir(key)
        self._low, self._high = np.uint32(stirred & _WORD), np.uint32(stirred >> 32)
        self._counter = np.arange(most, dtype=np.uint32)
        self._made, self._shifted = np.empty_like(self._counter), np.empty_like(self._counter)

    def words(self, offset: int, count: int) -> npt.NDArray[np.uint32]:
        """Words offset to offset + count; valid until the next call."""
        x, shifted = self._made[:count], self._shifted[:count]
        np.add(self._counter[:count], np.uint32(offset & _WORD), out=x)
        x ^= self._low
        np.right_shift(x, np.uint32(16), out=shifted)
        x ^= shifted
        x *= np.uint32(_FIRST)
        np.right_shift(x, np.uint32(15), out=shifted)
        x ^= shifted
        x += self._high
        x *= np.uint32(_SECOND)
        np.right_shift(x, np.uint32(16), out=shifted)
        x ^= shifted
        return x

    def halves(self, offset: int, count: int) -> Tensor:
        """What dither_reference calls h, int16; `count` is at most twice `most`, less one if offset is odd."""
        first = offset >> 1
        words = self.words(first, ((offset + count + 1) >> 1) - first)
        return torch.from_numpy(words.view(np.int16))[offset & 1 :][:count]


@triton_part
def triton_dither(stirred: tl.tensor, offset: tl.tensor, lane: tl.tensor) -> tl.tensor:
    """The dither of elements offset + lane, of the key that `stir` made `stirred` of, as a signed int64."""
    place = lane + (offset & 1).to(tl.int32)
    x = (offset >> 1).to(tl.uint32) + (place >> 1).to(tl.uint32)
    x ^= stirred.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) + (stirred >> 32).to(tl.uint32)
    x *= 0x846CA68B
    x ^= x >> 16
    half = (x << (16 - 16 * (place & 1)).to(tl.uint32)).to(tl.int32, bitcast=True) >> 16
    return (half.to(tl.float32) + 0.5) * 0.0000152587890625  # 2^-16


def stir(key: int) -> int:
    """The two words that a key stands for, as one number of 64 bits: keys that differ in one bit share nothing."""
    x = (key + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


def signed(word: int) -> int:
    """A number of 64 bits as the signed one with the same bits, which is how a kernel takes it."""
    return word - (1 << 64) if word >> 63 else word


def _words_reference(key: int, offset: int, count: int, device: torch.device | str) -> Tensor:
    stirred = stir(key)
    x = torch.arange(offset, offset + count, device=device) & _WORD
    x = x ^ (stirred & _WORD)
    x = (x ^ x >> 16) * _FIRST & _WORD
    x = (x ^ x >> 15) + (stirred >> 32) & _WORD
    x = x * _SECOND & _WORD
    return x ^ x >> 16


def check_place(key: int, offset: int) -> None:
    """Raises ValueError unless 0 <= key < 2^64 and 0 <= offset."""
    if not 0 <= key < 1 << 64:
        raise ValueError(f"counter_random: key is {key}; it must be from 0 to 2^64 - 1")
    if offset < 0:
        raise ValueError(f"counter_random: offset is {offset}; it must be 0 or more")
