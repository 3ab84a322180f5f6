"""What keeps a cluster from being regular: slow ranks, jitter and failures, drawn from a seed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from thinwire.dist.cluster_simulation.ranks import Ranks, Times
from thinwire.dist.plan.cluster import Cluster

_JITTER, _FAILURES = 0, 1  # streams of random numbers


@dataclass(frozen=True)
class Disturbances:
    """Of one run.

    slow: by what factor a rank computes more slowly, in every step.
    jitter: relative standard deviation of what a rank computes in a step: log-normal with mean 1, drawn for each rank
        and step.
    failures_per_device_hour: exponential times between the failures of a device.
    seed: of all that is drawn.
    """

    slow: Mapping[int, float] = field(default_factory=dict)
    jitter: float = 0.0
    failures_per_device_hour: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("jitter", self.jitter), ("failures", self.failures_per_device_hour)):
            if not 0 <= value < math.inf:
                raise ValueError(f"--{name}: {value:g}; give a finite number, 0 or more")
        for rank, factor in self.slow.items():
            if not 0 < factor < math.inf:
                raise ValueError(f"--slow: {rank}={factor:g}; a rank takes some positive multiple of the usual time")

    def check(self, cluster: Cluster) -> None:
        """Raises ValueError for a rank that the cluster has not."""
        for rank, factor in self.slow.items():
            if not 0 <= rank < cluster.size:
                raise ValueError(f"--slow: {rank}={factor:g}, but the ranks are 0..{cluster.size - 1}")

    def factors(self, ranks: Ranks, step: int) -> Times:
        """What each rank's computing of a step is multiplied with."""
        factors = np.array([self.slow.get(int(rank), 1.0) for rank in ranks.numbers])
        if self.jitter:
            spread = math.sqrt(math.log1p(self.jitter**2))
            drawn = np.random.default_rng((self.seed, _JITTER, step)).standard_normal(int(ranks.numbers[-1]) + 1)
            factors *= np.exp(spread * drawn[ranks.numbers] - spread**2 / 2)
        return factors

    def failing_s(self, ranks: Ranks) -> Times:
        """When each rank fails for the first time; infinity = never."""
        if not self.failures_per_device_hour:
            return np.full(len(ranks), math.inf)
        drawn = np.random.default_rng((self.seed, _FAILURES)).exponential(size=int(ranks.numbers[-1]) + 1)
        return drawn[ranks.numbers] * 3600 / self.failures_per_device_hour
