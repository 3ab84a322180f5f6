"""Mixing weights of an undirected graph's edges, in exact fractions until they are rounded once at the end.

So weights that are equal on paper are equal to the last bit, also a machine's own, and a group that averages fully
agrees to the last bit afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import TypeAlias

from thinwire.comm.gossip.mixing import Mixing

Edge: TypeAlias = tuple[int, int]
"""Two machines, the lower first where the graph is undirected, sender and receiver where it is directed."""


def undirected(pairs: Iterable[Edge]) -> list[Edge]:
    """The pairs as edges: the lower machine first, each once, ascending, without loops."""
    return sorted({(min(pair), max(pair)) for pair in pairs if pair[0] != pair[1]})


def degrees(edges: Iterable[Edge], size: int) -> list[int]:
    """Of every machine, its number of neighbours."""
    count = [0] * size
    for edge in edges:
        for end in edge:
            count[end] += 1
    return count


def metropolis(edges: Sequence[Edge], size: int) -> Mixing:
    """w_ij = 1 / (1 + max(d_i, d_j)): Metropolis et al. 1953 and Hastings 1970, with one added to each degree.

    Every machine needs only the degrees of its neighbours.
    """
    degree = degrees(edges, size)
    return symmetric({(i, j): Fraction(1, 1 + max(degree[i], degree[j])) for i, j in edges}, size)


def max_degree(edges: Sequence[Edge], size: int) -> Mixing:
    """w_ij = 1 / (1 + d_max), the same on every edge."""
    weight = Fraction(1, 1 + max(degrees(edges, size), default=0))
    return symmetric(dict.fromkeys(edges, weight), size)


def groups(members: Iterable[Sequence[int]], size: int) -> Mixing:
    """Each group averages fully; machines in none keep what they have."""
    return symmetric(group_weights(members), size)


def group_weights(members: Iterable[Sequence[int]]) -> dict[Edge, Fraction]:
    """1 / len(group) on every edge within a group."""
    return {
        (min(i, j), max(i, j)): Fraction(1, len(group))
        for group in members
        for place, i in enumerate(group)
        for j in group[:place]
    }


def complete_mixing(size: int) -> Mixing:
    """Everybody averages with everybody: 1 / n."""
    return groups([range(size)], size)


def symmetric(weights: Mapping[Edge, Fraction], size: int) -> Mixing:
    """Mixing of weights on undirected edges; what a machine's edges leave of 1 is its own weight."""
    own = [Fraction(1)] * size
    rows: list[dict[int, float]] = [{} for _ in range(size)]
    for (i, j), weight in weights.items():
        rows[i][j] = rows[j][i] = float(weight)
        own[i] -= weight
        own[j] -= weight
    for i, row in enumerate(rows):
        if own[i]:
            row[i] = float(own[i])
    return Mixing([dict(sorted(row.items())) for row in rows])


def pushed(weights: Mapping[Edge, Fraction], size: int) -> Mixing:
    """Mixing of weights on directed edges (sender, receiver); what a sender keeps of 1 is its own weight."""
    own = [Fraction(1)] * size
    rows: list[dict[int, float]] = [{} for _ in range(size)]
    for (sender, receiver), weight in weights.items():
        rows[receiver][sender] = float(weight)
        own[sender] -= weight
    for i, row in enumerate(rows):
        if own[i]:
            row[i] = float(own[i])
    both_ways = all(rows[sender].get(receiver) == row[sender] for receiver, row in enumerate(rows) for sender in row)
    return Mixing([dict(sorted(row.items())) for row in rows], symmetric=both_ways)
