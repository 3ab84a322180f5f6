"""Who averages with whom in one round, and with which weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Mixing:
    """A mixing matrix W, by rows.

    Args:
        rows: rows[i][j] is the weight that machine i gives to what j sends; rows[i][i], to its own. No zeros.
        symmetric: rows[i][j] == rows[j][i]: neighbours swap. Otherwise columns sum to 1, and mass is pushed.
    """

    rows: Sequence[Mapping[int, float]]
    symmetric: bool = True

    @property
    def size(self) -> int:
        return len(self.rows)

    def sources(self, rank: int) -> list[int]:
        """Machines whose messages `rank` mixes in, ascending."""
        return sorted(j for j in self.rows[rank] if j != rank)

    def targets(self, rank: int) -> dict[int, float]:
        """Machines that mix in what `rank` sends, ascending, each with its weight for it."""
        return self._columns[rank]

    def matrix(self) -> NDArray[np.float64]:
        """W as a dense array."""
        dense = np.zeros((self.size, self.size))
        for i, row in enumerate(self.rows):
            for j, weight in row.items():
                dense[i, j] = weight
        return dense

    @cached_property
    def _columns(self) -> list[dict[int, float]]:
        columns: list[dict[int, float]] = [{} for _ in self.rows]
        for i, row in enumerate(self.rows):
            for j, weight in row.items():
                if i != j:
                    columns[j][i] = weight
        return columns


class Graph(Protocol):
    """A sequence of mixings, one per round: a pure function of the round's number.

    Attributes: name, for people; size; period, the rounds after which it repeats, 0 if it never does; symmetric,
    whether every mixing is.
    """

    name: str
    size: int
    period: int
    symmetric: bool

    def mixing(self, round: int) -> Mixing:
        """W of a round, 0, 1, 2, ..."""
        ...
