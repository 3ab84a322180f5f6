"""What MoDeST sends on average: models to those who average them, and means to those who train next."""

from __future__ import annotations

from dataclasses import dataclass

from thinwire.comm.gossip.algorithms.modest import ModestSettings
from thinwire.comm.gossip.algorithms.modest_view import view_bytes


@dataclass(frozen=True)
class ModestTraffic:
    """Of a round that follows another and is followed by one; pings and their answers have no payload.

    Each of `sample` that have trained gives its model to each of `aggregators`, drawn apart from them; each of these,
    which are among the next sample, gives the mean to the others of it, with what it knows of the members.

    size: machines. model_bytes: of a model.
    """

    settings: ModestSettings
    size: int
    model_bytes: int

    @property
    def models(self) -> float:
        """That a machine sends in a round, on average."""
        return (self._to_average + self._to_train) / self.size

    @property
    def mean_bytes(self) -> float:
        """Payload that a machine sends in a round, on average."""
        return (self._to_average * self.model_bytes + self._to_train * self._mean_bytes) / self.size

    @property
    def busiest_bytes(self) -> int:
        """Payload of a machine that trains and then averages, for which the next round waits."""
        return self.settings.aggregators * self.model_bytes + (self.settings.sample - 1) * self._mean_bytes

    @property
    def _mean_bytes(self) -> int:
        return self.model_bytes + view_bytes(self.size)

    @property
    def _to_average(self) -> float:
        return self.settings.sample * self.settings.aggregators * (1 - 1 / self.size)

    @property
    def _to_train(self) -> float:
        return float(self.settings.aggregators * (self.settings.sample - 1))
