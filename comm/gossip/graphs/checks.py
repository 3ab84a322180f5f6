"""What every graph must be before it is used: stochastic, connected over time, and bound for consensus."""

from __future__ import annotations

import math

import numpy as np

from thinwire.comm.gossip.graphs.reach import reached
from thinwire.comm.gossip.graphs.weights import Edge
from thinwire.comm.gossip.mixing import Graph, Mixing

_TOLERANCE = 1e-9
_ROUNDS_OF_CHANCE = 10_000  # of a graph that is drawn, looked at for a way between all machines
_LARGEST_PRODUCT = 256  # machines whose period is multiplied out


def check_graph(graph: Graph, setting: str = "method.graph") -> None:
    """Raise ValueError, with the reason, if the graph cannot bring all machines to the mean.

    Of a graph that is drawn, the weights of its first rounds are looked at, until their edges connect all machines.

    Args:
        setting: what errors name.
    """
    edges: set[Edge] = set()
    for round in range(graph.period or _ROUNDS_OF_CHANCE):
        mixing = graph.mixing(round)
        if mixing.size != graph.size:
            raise ValueError(f"{setting}: round {round} is for {mixing.size} machines, and the graph for {graph.size}")
        if graph.symmetric and not mixing.symmetric:
            raise ValueError(f"{setting}: declared symmetric, but round {round} is not")
        check_stochastic(mixing, f"{setting}: round {round}: " if graph.period != 1 else f"{setting}: ")
        edges.update((j, i) for i in range(graph.size) for j in mixing.sources(i))
        if not graph.period and _cut_off(edges, graph.size) is None:
            break
    cut = _cut_off(edges, graph.size)
    if cut is not None:
        raise ValueError(f"{setting}: {cut}; add an edge, or take another graph")
    if graph.period > 0 and graph.size <= _LARGEST_PRODUCT:
        _check_converges(graph, setting)


def check_stochastic(mixing: Mixing, setting: str = "") -> None:
    """Raise ValueError unless columns sum to 1 and, if it is symmetric, rows too and weights are equal both ways."""
    columns: list[list[float]] = [[] for _ in range(mixing.size)]
    for i, row in enumerate(mixing.rows):
        for j, weight in row.items():
            if not 0 <= j < mixing.size:
                raise ValueError(
                    f"{setting}machine {i} has a weight for {j}, but the machines are 0..{mixing.size - 1}"
                )
            if not 0 < weight <= 1 + _TOLERANCE:  # NaN too
                raise ValueError(
                    f"{setting}machine {i} gives {weight:g} to what {j} sends; weights are above 0 and at most 1, and "
                    "absent where nothing is sent"
                )
            if mixing.symmetric and mixing.rows[j].get(i) != weight:
                raise ValueError(
                    f"{setting}declared symmetric, but machine {i} gives {weight:g} to {j} and gets "
                    f"{mixing.rows[j].get(i, 0.0):g}; a swap keeps the mean only with equal weights"
                )
            columns[j].append(weight)
        total = math.fsum(row.values())
        if mixing.symmetric and abs(total - 1) > _TOLERANCE:
            raise ValueError(f"{setting}the weights of machine {i} sum to {total:g}, not to 1: not doubly stochastic")
    for j, column in enumerate(columns):
        if abs(math.fsum(column) - 1) > _TOLERANCE:
            raise ValueError(
                f"{setting}the weights for what machine {j} sends sum to {math.fsum(column):g}, not to 1: the mean "
                "would drift"
            )


def _cut_off(edges: set[Edge], size: int) -> str | None:
    """Who cannot reach whom, in words; None if everybody can reach everybody."""
    everybody = set(range(size))
    unheard = everybody - reached(0, edges, size, both_ways=False)
    if unheard:
        return f"disconnected: nothing of machine 0 ever comes to {_named(unheard)}"
    silent = everybody - reached(0, {(j, i) for i, j in edges}, size, both_ways=False)
    return f"disconnected: nothing of {_named(silent)} ever comes to machine 0" if silent else None


def _named(ranks: set[int]) -> str:
    ordered = sorted(ranks)
    shown = ", ".join(map(str, ordered[:8]))
    return f"machine{'s' * (len(ordered) > 1)} {shown}" + (f" and {len(ordered) - 8} more" if len(ordered) > 8 else "")


def _check_converges(graph: Graph, setting: str) -> None:
    """Refuse what is connected but only moves models about, as a swap of two that keep nothing."""
    if all(rank in row for rank, row in enumerate(graph.mixing(0).rows)) and graph.period == 1:
        return  # connected, and everybody keeps something: every power from some on is positive
    product = np.eye(graph.size)
    for round in range(graph.period):
        product = graph.mixing(round).matrix() @ product
    if graph.symmetric and np.linalg.norm(product - 1 / graph.size) < 1:
        return  # even the sum over all directions shrinks
    slowest = sorted(abs(np.linalg.eigvals(product)))[-2:]
    if graph.size > 1 and slowest[0] > 1 - 1e-12:
        raise ValueError(
            f"{setting}: connected, but it never comes to an agreement: models only change places; let machines keep "
            "some weight of their own"
        )
