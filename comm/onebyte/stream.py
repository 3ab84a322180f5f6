"""Where each random number of a run lies in one Philox4x32-10 stream: addressed by fields, so nothing can collide.

Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3". The key is the run's; the counter is
(block, canonical tensor | domain << 28, round, slot << 16 | sample), so any shard makes exactly its own part.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from thinwire.kernels.philox import philox

DIRECTIONS, ROUNDING, PICKS, BASIS = range(4)
"""Domains: the directions themselves (made by kernels/lattice_add.py), and what is drawn on the host."""
DOMAIN_SHIFT = 28
MAX_TENSORS = 1 << DOMAIN_SHIFT
MAX_SAMPLES = 1 << 16
VARIANCE = {"rademacher": 1.0, "gaussian": 8.0}
"""Of a direction's elements."""
LARGEST_ELEMENT = {"rademacher": 1, "gaussian": 16}


def key_of(manifest: bytes) -> int:
    """The stream's key: 64 bits of the manifest's SHA-256."""
    return int.from_bytes(hashlib.sha256(manifest).digest()[:8], "little")


def place(number: int, slot: int, sample: int) -> tuple[int, int]:
    """The two counter words of a direction: those of round `number`, machine `slot` and its sample."""
    return number, slot << 16 | sample


def rounding_words(key: int, places: Tensor, tensors: int) -> Tensor:
    """One word for each direction and tensor, for rounding its coefficient: int64 (tensors, directions), below 2^32.

    Args:
        places: int64 (directions, 2).
        tensors: how many canonical tensors there are.
    """
    blocks = torch.arange(-(-tensors // 4))[:, None]
    words = philox(blocks, torch.tensor(ROUNDING << DOMAIN_SHIFT), places[:, 0], places[:, 1], key)
    return torch.stack(words, dim=1).reshape(-1, len(places))[:tensors]
