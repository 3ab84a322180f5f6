"""What a probe found of links and collectives, as it stands in its JSON file. Imports no torch."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import Field, model_validator

from thinwire.comm.settings import Settings

Operation: TypeAlias = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
# How often a tensor crosses each rank's link, but for the rank's own part, where no collective can do with less.
_CROSSINGS: dict[Operation, int] = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}


class PairTimes(Settings):
    """Between each two ranks, while no other pair uses their hosts' links.

    bps[a][b]: bits per second of payload from a to b. latency_s[a][b]: one way, of a message of a byte. null: a rank
    with itself, or a pair that was left out because there are too many.
    """

    bps: tuple[tuple[float | None, ...], ...]
    latency_s: tuple[tuple[float | None, ...], ...]

    @model_validator(mode="after")
    def _square(self) -> PairTimes:
        size = len(self.bps)
        for name, matrix in (("bps", self.bps), ("latency_s", self.latency_s)):
            if len(matrix) != size or any(len(row) != size for row in matrix):
                raise ValueError(f"{name}: must have {size} rows of {size} numbers, one for each rank")
            negative = [value for row in matrix for value in row if value is not None and value < 0]
            if negative:
                raise ValueError(f"{name}: {negative[0]} is below 0")
        return self


class CollectiveTime(Settings):
    """One collective at one size, by as many ranks as are in each group of a level, all groups at once.

    size_bytes: of the whole tensor, as nccl-tests count. median_s, p90_s: of the slowest rank, from a common start.
    """

    operation: Operation
    level: str
    ranks: int = Field(gt=1)
    size_bytes: int = Field(gt=0)
    median_s: float = Field(gt=0)
    p90_s: float = Field(gt=0)

    @property
    def algorithm_bps(self) -> float:
        """8 bytes / seconds."""
        return 8 * self.size_bytes / self.median_s

    @property
    def bus_bps(self) -> float:
        """What each rank's link carried at least: algorithm_bps * 2 (n-1)/n of an all-reduce, (n-1)/n of the others."""
        return self.algorithm_bps * _CROSSINGS[self.operation] * (self.ranks - 1) / self.ranks
