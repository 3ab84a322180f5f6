"""Small worlds for tests of gossip: graphs by hand, links that are late as told, machines that add numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from thinwire.comm.gossip.mixing import Mixing
from thinwire.comm.gossip.port import Port, Script, Wait
from thinwire.comm.gossip.simulation import Simulation

Edges = Iterable[tuple[int, int]]


def mixing_of(size: int, edges: Edges, weight: float) -> Mixing:
    """A symmetric mixing with one weight for every edge."""
    rows: list[dict[int, float]] = [{} for _ in range(size)]
    for a, b in edges:
        rows[a][b] = rows[b][a] = weight
    for rank, row in enumerate(rows):
        row[rank] = 1.0 - sum(row.values())
    return Mixing(rows)


def ring(size: int) -> Mixing:
    """1/3 to each side."""
    return mixing_of(size, [(i, (i + 1) % size) for i in range(size)], 1 / 3)


class Always:
    """Graph with one mixing."""

    name = "always the same"
    period = 1

    def __init__(self, mixing: Mixing) -> None:
        self._mixing = mixing
        self.size = mixing.size
        self.symmetric = mixing.symmetric

    def mixing(self, round: int) -> Mixing:
        return self._mixing


class Late:
    """Links whose every message takes what a function says.

    Args: latency_s, of (source, to, number of the message between the two); None loses it.
    """

    def __init__(self, latency_s: Callable[[int, int, int], float | None]) -> None:
        self._latency_s = latency_s
        self._counts: dict[tuple[int, int], int] = {}

    def arrival_s(self, source: int, to: int, payload_bytes: int, now_s: float) -> float | None:
        count = self._counts.get((source, to), 0)
        self._counts[source, to] = count + 1
        latency_s = self._latency_s(source, to, count)
        return None if latency_s is None else now_s + latency_s


def quiet(port: Port, until_s: float) -> Script[None]:
    """Do nothing until a time: everything that is on the wire arrives."""
    yield Wait(lambda: False, until_s)


def run_each(simulation: Simulation, script: Callable[[int], Script[None]]) -> None:
    """Run one script on every machine."""
    simulation.run([script(rank) for rank in range(len(simulation.ports))])


def vectors(values: Sequence[float], size: int = 1) -> list[torch.Tensor]:
    """fp64 vectors of one number each."""
    return [torch.full((size,), float(value), dtype=torch.float64) for value in values]
