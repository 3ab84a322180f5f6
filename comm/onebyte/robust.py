"""Which of a round's slopes count, and how far: against machines that send nonsense.

Along directions of their own, machines' slopes differ in sign by nature, but their sizes are comparable: `clip` bounds
each by about `2^(steps / 8)` times the median size, `drop` leaves out those beyond. Along shared directions `median`
takes the middle slope of all machines (Yin et al. 2018, 1803.01498; on shared directions 2406.14362, 2024). Everything
is decided on the bytes themselves, so all machines decide alike.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Sequence

from thinwire.comm.onebyte.byte_code import ABSENT, LARGEST, SIGN, ByteCode
from thinwire.comm.onebyte.rounds import SHARED_SLOT, Contribution

_FP32 = struct.Struct("=f")


def combine(
    contributions: Sequence[Contribution], robust: str, steps: int, code: ByteCode, *, shared: bool
) -> list[tuple[int, int, float]]:
    """(slot, sample, slope) of each direction that the update follows; slopes are fp32 numbers.

    Args:
        robust: none, clip, drop, or median (of shared directions).
        steps: eighths of an octave above the median size that are let pass.
        shared: machines' slopes of one sample belong to one direction; they become one, their mean or median.
    """
    values = code.values
    present = [(c.slot, i, byte) for c in contributions for i, byte in enumerate(c.codes) if byte != ABSENT]
    if robust in ("clip", "drop") and present:
        limit = min(LARGEST, _middle([byte & LARGEST for _, _, byte in present]) + steps)
        if robust == "clip":
            present = [(s, i, byte & SIGN | min(byte & LARGEST, limit)) for s, i, byte in present]
        else:
            present = [(s, i, byte) for s, i, byte in present if byte & LARGEST <= limit]
    if not shared:
        return [(slot, sample, values[byte]) for slot, sample, byte in present]
    by_sample: defaultdict[int, list[float]] = defaultdict(list)
    for _, sample, byte in present:
        by_sample[sample].append(values[byte])
    return [
        (SHARED_SLOT, sample, _median(slopes) if robust == "median" else _fp32(sum(slopes) / len(slopes)))
        for sample, slopes in sorted(by_sample.items())
    ]


def _middle(numbers: list[int]) -> int:
    """The lower median."""
    return sorted(numbers)[(len(numbers) - 1) // 2]


def _median(slopes: list[float]) -> float:
    ordered, half = sorted(slopes), len(slopes) // 2
    return ordered[half] if len(ordered) % 2 else _fp32((ordered[half - 1] + ordered[half]) / 2)


def _fp32(number: float) -> float:
    return float(_FP32.unpack(_FP32.pack(number))[0])
