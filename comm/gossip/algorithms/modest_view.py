"""What a machine knows of the others: who belongs to the run, and when each was last active."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from thinwire.comm.wire import PayloadError

_ROUNDS = 1 << 48  # no run has so many
_NEVER = -1


class View:
    """Two numbers for each machine, of which the larger is the newer one, so that two views merge by their maxima.

    Attributes: active, the last round in which each was seen to take part, -1 = never; changes, how often each has left
    and joined again: odd means that it has left.
    """

    def __init__(self, size: int) -> None:
        self.active = np.zeros(size, np.int64)
        self.changes = np.zeros(size, np.uint32)

    def saw(self, rank: int, round: int) -> None:
        """It takes part in a round."""
        self.active[rank] = max(int(self.active[rank]), round)

    def join(self, rank: int) -> None:
        """It belongs to the run, again."""
        self.changes[rank] += self.changes[rank] % 2

    def leave(self, rank: int) -> None:
        """It takes its leave."""
        self.changes[rank] += 1 - self.changes[rank] % 2

    def merge(self, other: View) -> None:
        """Learn what another knows."""
        np.maximum(self.active, other.active, out=self.active)
        np.maximum(self.changes, other.changes, out=self.changes)

    def members(self, round: int, inactive_rounds: int) -> list[int]:
        """Machines that have not left, and that took part in one of the last so many rounds."""
        here = (self.changes % 2 == 0) & (self.active >= round - inactive_rounds)
        return [int(rank) for rank in np.flatnonzero(here)]

    def encode(self) -> Tensor:
        """i64 active of each machine, then u32 changes, little-endian: 12 bytes for each."""
        planes = [self.active.astype("<i8").view(np.uint8), self.changes.astype("<u4").view(np.uint8)]
        return torch.from_numpy(np.concatenate(planes))


def view_bytes(size: int) -> int:
    """Bytes of a view of so many machines."""
    return 12 * size


def decode_view(payload: Tensor, size: int) -> View:
    """What View.encode() was given.

    Raises:
        PayloadError: it is no view of `size` machines.
    """
    if len(payload) != view_bytes(size):
        raise PayloadError(f"a view of {size} machines takes {view_bytes(size)} bytes, not {len(payload)}")
    raw = payload.numpy().tobytes()
    view = View(size)
    view.active = np.frombuffer(raw, "<i8", size).astype(np.int64)
    view.changes = np.frombuffer(raw, "<u4", size, 8 * size).astype(np.uint32)
    if view.active.min() < _NEVER or view.active.max() >= _ROUNDS:
        raise PayloadError(f"a view with rounds from {view.active.min()} to {view.active.max()}")
    return view


def order_of(seed: int, round: int, members: Iterable[int]) -> list[int]:
    """The members by the hash of (seed, machine, round): as likely in any order, and the same wherever it is asked."""
    return sorted(members, key=lambda rank: hashlib.sha256(f"{seed}-{rank}-{round}".encode()).digest())
