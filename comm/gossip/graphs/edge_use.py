"""A graph whose edges are used at rates of their own."""

from __future__ import annotations

from collections.abc import Mapping

from thinwire.comm.gossip.graphs.sequence import Drawn
from thinwire.comm.gossip.graphs.shared_draw import Purpose, unit
from thinwire.comm.gossip.graphs.weights import Edge, metropolis
from thinwire.comm.gossip.mixing import Mixing


def used_at_rates(name: str, rates: Mapping[Edge, float], size: int, seed: int) -> Drawn:
    """Each round uses an edge with a probability in proportion to its rate, and weighs what is used by Metropolis.

    The probabilities are such that the busiest machine has one partner a round on average. Where two meet alone, each
    gives one half; where one meets several, all stay below.

    Args:
        rates: by undirected edge, 0 or more; one that is 0 is never used.
        seed: 0..2^64-1, of the draws, which are the same on every machine.
    """
    busy = [0.0] * size
    for edge, rate in rates.items():
        for end in edge:
            busy[end] += rate
    busiest = max(busy, default=0.0) or 1.0
    chances = {edge: min(1.0, rate / busiest) for edge, rate in sorted(rates.items())}

    def draw(round: int) -> Mixing:
        drawn = unit(Purpose.EDGE_USE, seed, round, len(chances)).tolist()
        used = [edge for (edge, chance), u in zip(chances.items(), drawn, strict=True) if u < chance]
        return metropolis(used, size)

    return Drawn(name, size, draw, symmetric=True)
