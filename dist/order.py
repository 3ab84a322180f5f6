"""The order of the samples as a stateless function: a keyed permutation of each epoch's windows."""

from __future__ import annotations

import hashlib

_ROUNDS = 4
_WORD = (1 << 64) - 1


class Permutation:
    """A bijection of 0 .. size-1 that a key chooses, evaluated one index at a time without a table.

    A Feistel network permutes the smallest even number of bits that holds `size`; results beyond `size` are put in
    again until one falls inside (cycle walking: Black and Rogaway 2002), which keeps it a bijection; that takes at most
    4 tries on average.

    Args:
        size: at least 1.
        key: integers that choose the permutation, such as (seed, epoch).
    """

    def __init__(self, size: int, key: tuple[int, ...]) -> None:
        assert size >= 1
        self._size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        text = ",".join(str(part) for part in key).encode()
        digest = hashlib.blake2b(text, digest_size=8 * _ROUNDS, person=b"thinwire-order").digest()
        self._keys = [int.from_bytes(digest[8 * r : 8 * r + 8], "little") for r in range(_ROUNDS)]

    def __call__(self, index: int) -> int:
        """Where `index` goes."""
        assert 0 <= index < self._size
        index = self._mix(index)
        while index >= self._size:
            index = self._mix(index)
        return index

    def _mix(self, index: int) -> int:
        mask = (1 << self._half_bits) - 1
        left, right = index >> self._half_bits, index & mask
        for key in self._keys:
            left, right = right, left ^ (_hash(right, key) & mask)
        return left << self._half_bits | right


def _hash(value: int, key: int) -> int:
    """The finaliser of splitmix64 on value + key."""
    value = (value + key) & _WORD
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _WORD
    return value ^ value >> 31


def window_of_sample(sample: int, windows: int, seed: int) -> int:
    """Which window the sample with this number (counted over the whole run) is: each epoch shows every window once."""
    epoch, position = divmod(sample, windows)
    return Permutation(windows, (seed, epoch))(position)
