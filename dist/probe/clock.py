"""Seconds of work that all ranks begin together."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from thinwire.comm.channel import Channel
from thinwire.comm.queue import CommQueue


def now(device: torch.device) -> float:
    """Seconds of a clock that goes on evenly, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def gathered(queue: CommQueue, values: Tensor) -> Tensor:
    """Every rank's values, fp64 (ranks, *shape), on the CPU: the same on every rank, so that all decide alike."""
    rows = queue.submit("probe/gather", lambda channel: channel.all_gather_same(values)).wait()
    return rows.cpu()


class Lockstep:
    """Times work that all ranks begin together, and of which they know each other's seconds.

    Args:
        queue: joins the ranks.
        device: that they compute on.
        cores_per_rank: processors that a rank has for itself; less than one where ranks share them.
    Attributes: core_share, the part of a processor that a rank has while all compute; 1 where it has one for itself.
    """

    def __init__(self, queue: CommQueue, device: torch.device, cores_per_rank: float = 1.0) -> None:
        self.queue = queue
        self.device = device
        self.core_share = min(1.0, cores_per_rank)

    def now(self) -> float:
        """See now()."""
        return now(self.device)

    def wait(self) -> None:
        """Until every rank is here."""
        byte = torch.zeros(1, dtype=torch.uint8, device=self.device)
        self.queue.submit("probe/barrier", lambda channel: channel.all_gather_same(byte)).wait()

    def share(self, values: list[float]) -> list[list[float]]:
        """Every rank's values, rank after rank."""
        mine = torch.tensor(values, dtype=torch.float64, device=self.device)
        return [[float(value) for value in row] for row in gathered(self.queue, mine).tolist()]

    def slowest(self, seconds: float) -> float:
        """The most of any rank."""
        return max(row[0] for row in self.share([seconds]))

    def time(self, work: Callable[[], object], repeats: int) -> list[float]:
        """Seconds of the slowest rank, of each repetition."""
        return self._time(work, repeats, self.now)

    def time_computing(self, work: Callable[[], object], repeats: int) -> list[float]:
        """The same, of work that only computes.

        Where ranks share processors, the processor's time by the share that each has of one: the clock would tell who
        had the first turn.
        """
        if self.core_share == 1 or self.device.type == "cuda":
            return self.time(work, repeats)
        return self._time(work, repeats, lambda: time.process_time() / self.core_share)

    def time_exchange(self, name: str, exchange: Callable[[Channel], object], repeats: int) -> list[float]:
        """The same, of an exchange on the queue, from its submission to the return of wait()."""
        return self.time(lambda: self.queue.submit(name, exchange).wait(), repeats)

    def _time(self, work: Callable[[], object], repeats: int, clock: Callable[[], float]) -> list[float]:
        taken = []
        for _ in range(repeats):
            self.wait()
            began = clock()
            work()
            taken.append(clock() - began)
        return [max(column) for column in zip(*self.share(taken), strict=True)]


def percentile(values: list[float], share: float) -> float:
    """The smallest of the values that is no less than this share of them."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered) - 1e-9) - 1)]
