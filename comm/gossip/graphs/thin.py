"""A graph of whose edges each round uses only some."""

from __future__ import annotations

from thinwire.comm.gossip.graphs.sequence import Drawn
from thinwire.comm.gossip.graphs.shared_draw import Purpose, unit
from thinwire.comm.gossip.mixing import Graph, Mixing


def thinned(graph: Graph, probability: float, seed: int) -> Graph:
    """Each edge takes part in a round with this probability, both directions alike; what it had stays with its sender.

    Chance is shared: every machine draws the same, so none waits for a message that nobody sends. Rows and columns
    that summed to 1 still do.

    Args:
        graph: whose rounds are thinned.
        probability: 0..1; 1 gives the graph itself.
        seed: 0..2^64-1, of the draws.
    Raises:
        ValueError: the probability is none.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability: {probability:g}; allowed is 0 to 1")
    if probability == 1:
        return graph

    def draw(round: int) -> Mixing:
        whole = graph.mixing(round)
        edges = sorted({(min(i, j), max(i, j)) for i, row in enumerate(whole.rows) for j in row if i != j})
        chances = unit(Purpose.THINNING, seed, round, len(edges)).tolist()
        dropped = {edge for edge, chance in zip(edges, chances, strict=True) if chance >= probability}
        return _without(whole, dropped) if dropped else whole

    return Drawn(f"{graph.name}, each edge with {probability:g}", graph.size, draw, symmetric=graph.symmetric)


def _without(whole: Mixing, dropped: set[tuple[int, int]]) -> Mixing:
    rows = [dict(row) for row in whole.rows]
    returned = [0.0] * whole.size
    for edge in dropped:
        for receiver, sender in (edge, edge[::-1]):
            returned[sender] += rows[receiver].pop(sender, 0.0)
    for rank, row in enumerate(rows):
        if returned[rank]:
            alone = len(row) == (rank in row)
            # A machine that hears nobody and sends to nobody keeps exactly what it has.
            row[rank] = 1.0 if whole.symmetric and alone else row.get(rank, 0.0) + returned[rank]
    return Mixing([dict(sorted(row.items())) for row in rows], whole.symmetric)
