"""The ranks of a simulation: who waits for whom at each level, and which of them may stand for others like them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from thinwire.dist.plan.cluster import Cluster

Times: TypeAlias = NDArray[np.float64]
"""Seconds, one for each simulated rank."""


@dataclass(frozen=True)
class Ranks:
    """Some ranks of a cluster, ascending, of which each stands for itself or also for others that do the same.

    numbers: their ranks. stands_for: how many. starts: for each level where in `numbers` each of its groups begins.
    """

    numbers: NDArray[np.int64]
    stands_for: NDArray[np.int64]
    starts: Mapping[str, NDArray[np.int64]]

    def __len__(self) -> int:
        return len(self.numbers)

    def latest(self, times: Times, level: str) -> Times:
        """For each rank the latest time in its group of a level."""
        starts = self.starts[level]
        if len(starts) == 1:
            return np.full_like(times, times.max())
        if len(starts) == len(times):
            return times
        of_groups: Times = np.maximum.reduceat(times, starts)
        return np.repeat(of_groups, np.diff(starts, append=len(times)))


def every_rank(cluster: Cluster) -> Ranks:
    """All of them."""
    return _grouped(cluster, range(cluster.size), [1] * cluster.size)


def distinct_ranks(cluster: Cluster, special: Collection[int]) -> Ranks:
    """As few as tell the same, where all ranks but the special ones do the same.

    Of the groups of one level that lie in one group of the next and hold no special rank, one stands for all: the
    latest of equal times is any of them.
    """
    kept: list[tuple[int, int]] = []
    sizes = [1, *(level.size for level in cluster.levels)]

    def visit(first: int, depth: int, stands_for: int, special: Sequence[int]) -> None:
        if depth == 0:
            kept.append((first, stands_for))
            return
        inner = sizes[depth - 1]
        groups = range(first, first + sizes[depth], inner)
        holding = sorted({rank // inner * inner for rank in special})
        plain = next((group for group in groups if group not in holding), None)
        for group in sorted({*holding, *([] if plain is None else [plain])}):
            alike = len(groups) - len(holding) if group == plain else 1
            visit(group, depth - 1, stands_for * alike, [r for r in special if group <= r < group + inner])

    visit(0, len(cluster.levels), 1, sorted(special))
    return _grouped(cluster, [rank for rank, _ in kept], [count for _, count in kept])


def _grouped(cluster: Cluster, ranks: Sequence[int], stands_for: Sequence[int]) -> Ranks:
    numbers = np.asarray(ranks, dtype=np.int64)
    starts = {level.name: np.flatnonzero(np.diff(numbers // level.size, prepend=-1)) for level in cluster.levels}
    return Ranks(numbers, np.asarray(stands_for, dtype=np.int64), starts)
