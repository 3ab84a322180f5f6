"""Random numbers that depend on nothing but the seed, the step, the tensor's name and, where wanted, the rank."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch

_MASK = (1 << 63) - 1


@dataclass(frozen=True)
class Draw:
    """The randomness of one tensor in one step.

    Attributes: seed, of the run; step, of the method; name, of the tensor (or a fixed word for a flat bucket); rank,
    within the group.
    """

    seed: int
    step: int
    name: str
    rank: int

    def shared_key(self) -> int:
        """63 bits that are the same on every rank."""
        return _mix(self.seed, self.step, zlib.crc32(self.name.encode()))

    def own_key(self) -> int:
        """63 bits that differ from rank to rank."""
        return _mix(self.shared_key(), self.rank + 1, 0)

    def shared(self) -> torch.Generator:
        """A CPU generator in the same state on every rank."""
        return torch.Generator().manual_seed(self.shared_key())


def _mix(a: int, b: int, c: int) -> int:
    """Stafford's variant 13 of the MurmurHash3 finaliser, over the three words in turn."""
    state = 0x9E3779B97F4A7C15
    for word in (a, b, c):
        state = (state + word * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state & _MASK
