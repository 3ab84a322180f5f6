"""One byte for a slope: its sign and a 7-bit logarithm, by an integer table, so that all machines read the same number.

Zelikman et al. 2023, "Just One Byte (per gradient)" (2306.10015) describe a logarithmic byte; theirs has 510 symbols.
Here bit 7 is the sign and the low bits e give

    |g| = table[(e - 1) mod 8] * 2^((e - 1) div 8) * 2^(floor_log2 - 16),    e = 1 .. 127,

eight steps to the octave over a range of 55,000 : 1 from 2^floor_log2 on. Two codes are special: zero, and absent.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from itertools import pairwise

ZERO = 0x00
ABSENT = 0x80
"""No slope: the loss was not finite, or the sample was not evaluated."""
SIGN = 0x80
LARGEST = 0x7F
STEPS_PER_OCTAVE = 8
FRACTION_BITS = 16
# round(2^(16 + i/8))
_TABLE = (65536, 71468, 77936, 84990, 92682, 101070, 110218, 120194)
MAGNITUDES = (0, *(_TABLE[i % STEPS_PER_OCTAVE] << i // STEPS_PER_OCTAVE for i in range(LARGEST)))
"""Magnitude by the low seven bits, in units of 2^(floor_log2 - 16)."""
# Halfway between neighbours on a logarithmic scale; between zero and the smallest, halfway on a linear one.
_LIMITS = (MAGNITUDES[1] / 2, *(math.sqrt(a * b) for a, b in pairwise(MAGNITUDES[1:])))


class ByteCode:
    """The code whose smallest slope other than zero is 2^floor_log2, and its largest 2^(floor_log2 + 15.75).

    Relative error within that range: 4.5 % at most, 2.5 % root mean square. Smaller slopes become the smallest one or
    zero, larger ones the largest.

    Attributes: values, the slope that each of the 256 codes stands for, fp32 numbers; NaN for ABSENT.
    """

    def __init__(self, floor_log2: int) -> None:
        self.floor_log2 = floor_log2
        self._unit = math.ldexp(1.0, floor_log2 - FRACTION_BITS)
        sizes = [magnitude * self._unit for magnitude in MAGNITUDES]
        self.values = (*sizes, math.nan, *(-size for size in sizes[1:]))

    def encode(self, slope: float) -> int:
        """The nearest code; ABSENT for a slope that is NaN or infinite."""
        if not math.isfinite(slope):
            return ABSENT
        code = bisect_right(_LIMITS, abs(slope) / self._unit)
        return code | SIGN if slope < 0 and code else code
