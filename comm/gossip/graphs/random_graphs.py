"""Graphs that are drawn: a matching or a shift in every round, or an Erdos-Renyi graph once."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from thinwire.comm.gossip.graphs.exponential import shifted
from thinwire.comm.gossip.graphs.reach import reached
from thinwire.comm.gossip.graphs.sequence import Drawn, Repeating
from thinwire.comm.gossip.graphs.shared_draw import Purpose, permutation, raw, unit
from thinwire.comm.gossip.graphs.weights import groups, max_degree, metropolis
from thinwire.comm.gossip.mixing import Mixing
from thinwire.comm.settings import Settings

_ATTEMPTS = 1000


class MatchingSettings(Settings):
    """`graph: matching`: new random pairs in every round, one half each; of an odd number one machine stays alone.

    A round multiplies the expected squared distance from consensus by (n/2 - 1) / (n - 1).
    seed: of the draws; null: the run's.
    """

    kind: Literal["matching"] = "matching"
    seed: int | None = Field(None, ge=0, lt=2**64)

    def build(self, size: int, seed: int) -> Drawn:
        """The graph of so many machines."""
        own = seed if self.seed is None else self.seed

        def draw(round: int) -> Mixing:
            order = permutation(Purpose.MATCHING, own, round, size)
            return groups(zip(order[::2], order[1::2], strict=False), size)

        return Drawn(f"random matchings of {size}", size, draw, symmetric=True)


class EquiSettings(Settings):
    """`graph: equi`: EquiDyn: in every round, a random shift p for all machines.

    Song et al. 2022, 2210.07881. Undirected (OU-EquiDyn), machines i and i + p become pairs, as far as they are free
    when one goes round from a random start. Directed (OD-EquiDyn), i sends to i + p. The weights are one half: the
    paper's eta is n / (2 (n - 1)), without which a round would almost only swap models.

    directed: i sends to i + p, and receives from i - p.
    seed: of the draws; null: the run's.
    """

    kind: Literal["equi"] = "equi"
    directed: bool = False
    seed: int | None = Field(None, ge=0, lt=2**64)

    def build(self, size: int, seed: int) -> Drawn:
        """The graph of so many machines."""
        own = seed if self.seed is None else self.seed

        def draw(round: int) -> Mixing:
            if size == 1:
                return groups([], size)
            first, second = raw(Purpose.EQUI, own, round, 2).tolist()
            shift, start = 1 + first % (size - 1), second % size
            return shifted([shift], size) if self.directed else groups(_pairs(shift, start, size), size)

        way = "directed" if self.directed else "undirected"
        return Drawn(f"{way} EquiDyn of {size}", size, draw, symmetric=not self.directed or size <= 2)


class ErdosRenyiSettings(Settings):
    """`graph: {kind: erdos_renyi, p: 0.3}`: each pair is an edge with probability p; drawn once, until it is connected.

    p: null: 2 ln(n) / n, with which a draw is connected almost surely.
    weights: metropolis, or max_degree: the same weight 1 / (1 + d_max) on every edge.
    seed: of the draw; null: the run's.
    """

    kind: Literal["erdos_renyi"] = "erdos_renyi"
    p: float | None = Field(None, gt=0, le=1)
    weights: Literal["metropolis", "max_degree"] = "metropolis"
    seed: int | None = Field(None, ge=0, lt=2**64)

    def build(self, size: int, seed: int) -> Repeating:
        """The graph of so many machines. Raises ValueError if p is too small for one that is connected."""
        own = seed if self.seed is None else self.seed
        enough = min(1.0, 2 * math.log(size) / size) if size > 2 else 1.0
        p = enough if self.p is None else self.p
        pairs = [(i, j) for j in range(size) for i in range(j)]
        for attempt in range(_ATTEMPTS):
            drawn = unit(Purpose.ERDOS_RENYI, own, attempt, len(pairs)) < p
            edges = sorted(pair for pair, present in zip(pairs, drawn.tolist(), strict=True) if present)
            if len(reached(0, edges, size, both_ways=True)) == size:
                weigh = metropolis if self.weights == "metropolis" else max_degree
                return Repeating(f"Erdos-Renyi graph of {size}, p = {p:.3g}", [weigh(edges, size)])
        raise ValueError(
            f"method.graph.p: with {p:g} none of {_ATTEMPTS} graphs of {size} machines was connected; 2 ln(n) / n, "
            f"which is {enough:.2g} here, is enough"
        )


def _pairs(shift: int, start: int, size: int) -> list[tuple[int, int]]:
    free, pairs = [True] * size, []
    for place in range(start, start + size):
        i, j = place % size, (place + shift) % size
        if free[i] and free[j]:
            free[i] = free[j] = False
            pairs.append((i, j))
    return pairs
