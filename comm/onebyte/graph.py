"""Who may talk to whom: undirected graphs over the ranks of a job, and how far apart ranks are on them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias

GraphName: TypeAlias = Literal["ring", "mesh", "torus", "hypercube", "exponential"]
Edges: TypeAlias = Sequence[tuple[int, int]]
_PATH = "method.exchange.graph"


def neighbours(graph: GraphName | Edges, size: int) -> list[list[int]]:
    """Each rank's neighbours, ascending.

    Args:
        graph: ring; mesh, a grid as square as `size` allows, and torus, one whose rows and columns are rings;
            hypercube, of 2^k ranks; exponential, with edges between ranks 2^k apart on a ring; or the edges.
    Raises:
        ValueError: not a graph of `size` ranks, or one that is not connected.
    """
    found: list[set[int]] = [set() for _ in range(size)]
    for a, b in _edges(graph, size):
        if not (0 <= a < size and 0 <= b < size) or a == b:
            raise ValueError(f"{_PATH}: edge [{a}, {b}] must join two different ranks below {size}")
        found[a].add(b)
        found[b].add(a)
    sides = [sorted(ranks) for ranks in found]
    lost = [rank for rank, distance in enumerate(distances(sides, 0)) if distance < 0]
    if lost:
        raise ValueError(f"{_PATH}: no path leads from rank 0 to rank {lost[0]}; add edges until all are connected")
    return sides


def distances(sides: Sequence[Sequence[int]], source: int) -> list[int]:
    """Edges between `source` and each rank along a shortest path; -1 where there is none.

    Args:
        sides: each rank's neighbours.
    """
    found = [-1] * len(sides)
    found[source] = 0
    waiting = deque([source])
    while waiting:
        rank = waiting.popleft()
        for side in sides[rank]:
            if found[side] < 0:
                found[side] = found[rank] + 1
                waiting.append(side)
    return found


def _edges(graph: GraphName | Edges, size: int) -> Iterable[tuple[int, int]]:
    if not isinstance(graph, str):
        return graph
    if graph == "hypercube":
        if size & size - 1:
            raise ValueError(f"{_PATH}: hypercube needs 2^k ranks, not {size}; take exponential or torus")
        return [(rank, rank ^ 1 << k) for rank in range(size) for k in range(size.bit_length() - 1)]
    if graph in ("mesh", "torus"):
        return _grid(size, wrapped=graph == "torus")
    steps = [1] if graph == "ring" else [1 << k for k in range((size - 1).bit_length())]
    return [(rank, (rank + step) % size) for rank in range(size) for step in steps if step % size]


def _grid(size: int, *, wrapped: bool) -> Iterable[tuple[int, int]]:
    rows = next(n for n in range(math.isqrt(size), 0, -1) if size % n == 0)
    columns = size // rows
    for rank in range(size):
        row, column = divmod(rank, columns)
        for other_row, other_column in ((row + 1, column), (row, column + 1)):
            other = other_row % rows * columns + other_column % columns
            if other != rank and (wrapped or (other_row < rows and other_column < columns)):
                yield rank, other
