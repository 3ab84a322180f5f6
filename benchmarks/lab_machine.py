"""The emulated hosts that ways to train are compared on: each with links, and with processors of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from thinwire.dist.processors import usable_processors
from thinwire.launch.lab import Lab, why_not_cores

_FOR_HOSTS = 0.8  # of this machine's processors


@dataclass(frozen=True)
class Machine:
    """The emulated hosts. delay_s: of each path, one way. places: ranks that could be, each with processors of its own.

    0: those that are.
    """

    hosts: int = 4
    ranks_per_host: int = 1
    delay_s: float = 0.0
    places: int = 0

    @property
    def cores_per_rank(self) -> float | None:
        """Processors of each rank: see own_cores()."""
        return own_cores(self.places or self.hosts * self.ranks_per_host)

    def lab(self, rate_bps: float) -> Lab:
        """The hosts, with links of this rate."""
        return Lab(self.hosts, rate_bps, self.delay_s, 0.0, self.ranks_per_host, self.cores_per_rank)


@cache
def own_cores(ranks: int) -> float | None:
    """Processors for each of so many ranks; None, and a word about it, where this machine cannot set them apart.

    Hosts that shared them would use those of hosts that wait, so what one way to train is measured to take would depend
    on what hosts of one's own would never notice. A part is left for the network between the hosts.
    """
    if reason := why_not_cores():
        print(f"the hosts share this machine's processors, and waiting for others costs them less: {reason}")
        return None
    return math.floor(100 * _FOR_HOSTS * usable_processors() / ranks) / 100
