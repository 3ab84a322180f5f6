"""Bytes that travel from neighbour to neighbour over a graph until every rank has those of every rank.

Flooding of directions' slopes between machines is the idea of SeedFlood (2602.18181, 2026). Here the ranks move in
lockstep, so each knows from the graph alone which bytes come when: messages carry no header, and no rank asks. In hop
a of a round, whoever learned a rank's bytes in hop a - 1 passes them on, and after D hops, the graph's diameter, all
ranks have all bytes. Applied are complete rounds alone, by all ranks in the same step, so the replicas are equal at
all times and N is that of the round.

    trees       each rank takes another's bytes from one neighbour, on a shortest path: n - 1 transmissions for each of
                n ranks, as few as there can be; on average a rank sends what it would in an all-gather
    redundant   to every neighbour that may not have them: one transmission for each edge between ranks whose distances
                to the origin differ, two where they are equal; the first to arrive counts, the others cost their bytes

`hops` of a round's D hops may be made in one step. All of them (the default): each step ends with its own round, with
the weights of an all-gather, after D latencies. Fewer: a step takes so many latencies, and a round is complete
ceil(D / hops) - 1 steps after its own, so slopes are measured at weights that lack as many rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from thinwire.comm.channel import Channel
from thinwire.comm.onebyte.graph import GraphName, distances, neighbours
from thinwire.comm.settings import Settings


class AllGatherSettings(Settings):
    """Slopes go straight from every rank to every other."""

    kind: Literal["all_gather"] = "all_gather"


class FloodSettings(Settings):
    """Slopes travel from neighbour to neighbour instead of straight from all to all.

    graph: ring, mesh, torus, hypercube, exponential, or a list of edges such as [[0, 1], [1, 2]].
    hops: of a round's bytes in each step; null: as many as it takes, so that each step ends with its own round.
    redundant: pass bytes on to every neighbour that may lack them, not along one path to each rank.
    """

    kind: Literal["flood"] = "flood"
    graph: GraphName | tuple[tuple[int, int], ...]
    hops: int | None = Field(None, gt=0)
    redundant: bool = False


def _by_name(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


ExchangeSettings: TypeAlias = Annotated[
    Annotated[AllGatherSettings | FloodSettings, Field(discriminator="kind")], BeforeValidator(_by_name)
]
"""Settings with a `kind`, or the name "all_gather"."""


class Flood:
    """One rank's part in flooding a graph: what it sends and receives in each hop, and what it knows.

    Args:
        sides: each rank's neighbours.
        samples: bytes of each rank in a round.
        hops: in each step; None: all.
    Attributes: diameter; hops; lag, the steps that a round takes to become complete beyond its own.
    """

    def __init__(
        self, rank: int, sides: Sequence[Sequence[int]], samples: int, hops: int | None, *, redundant: bool = False
    ) -> None:
        routes = _Routes(sides, redundant=redundant)
        self.rank, self.size = rank, len(sides)
        self.diameter = routes.diameter
        self.hops = max(1, min(hops or self.diameter, self.diameter))
        self.lag = max(0, -(-self.diameter // self.hops) - 1)
        self._known = torch.zeros(self.lag + 1, self.size, samples, dtype=torch.uint8)  # newest round first
        self._out = [self._rows(routes, hop, sending=True) for hop in range(self.hops)]
        self._in = [self._rows(routes, hop, sending=False) for hop in range(self.hops)]

    def begin(self, codes: Tensor) -> None:
        """A step begins, with this rank's codes, uint8 (samples,)."""
        self._known = self._known.roll(1, dims=0)
        self._known[0] = 0
        self._known[0, self.rank] = codes

    def splits(self, hop: int) -> tuple[list[int], list[int]]:
        """Rows that this rank sends to each rank in a hop of every step, and those that it receives of each."""
        return self._out[hop][1], self._in[hop][1]

    def send(self, hop: int) -> Tensor:
        """What this rank sends, uint8 (rows, samples), by receiving rank."""
        ages, origins = self._out[hop][0]
        return self._known[ages, origins]

    def receive(self, hop: int, rows: Tensor) -> None:
        """Take what has come, by sending rank. Bytes that come twice are the same."""
        ages, origins = self._in[hop][0]
        self._known[ages, origins] = rows

    def complete(self) -> Tensor:
        """All ranks' codes of the round that began `lag` steps ago, uint8 (ranks, samples)."""
        return self._known[-1]

    def reset(self) -> None:
        """Forget all rounds."""
        self._known.zero_()

    @property
    def known(self) -> Tensor:
        """All that this rank knows of the rounds under way."""
        return self._known

    def _rows(self, routes: _Routes, hop: int, *, sending: bool) -> tuple[tuple[Tensor, Tensor], list[int]]:
        """Index of the rows of a hop, by peer, then newest round first, then origin; and their number by peer.

        In hop h of a step, the round that began a steps ago makes its hop number a * hops + h + 1.
        """
        index: list[tuple[int, int]] = []
        splits = [0] * self.size
        for peer in routes.sides[self.rank]:
            pair = (self.rank, peer) if sending else (peer, self.rank)
            rows = [
                (age, origin) for age in range(self.lag + 1) for origin in routes.origins(*pair, age * self.hops + hop)
            ]
            splits[peer] = len(rows)
            index += rows
        table = torch.tensor(index, dtype=torch.int64).reshape(-1, 2)
        return (table[:, 0], table[:, 1]), splits


class _Routes:
    """Which bytes go over which edge when, for all ranks: a function of the graph alone."""

    def __init__(self, sides: Sequence[Sequence[int]], *, redundant: bool) -> None:
        self.sides = sides
        self._redundant = redundant
        self._distance = [distances(sides, origin) for origin in range(len(sides))]
        self.diameter = max(map(max, self._distance))

    def origins(self, sender: int, receiver: int, distance: int) -> list[int]:
        """Ranks at this distance from the sender whose bytes it passes on to this neighbour, in hop distance + 1."""
        if distance >= self.diameter:
            return []  # all have them
        return [
            origin
            for origin, away in enumerate(self._distance)
            if away[sender] == distance and self._passes_on(origin, sender, receiver)
        ]

    def _passes_on(self, origin: int, sender: int, receiver: int) -> bool:
        away = self._distance[origin]
        if self._redundant:
            return away[receiver] >= away[sender]  # a nearer one has passed them on to the sender
        if away[receiver] != away[sender] + 1:
            return False
        nearer = [side for side in self.sides[receiver] if away[side] == away[sender]]
        return sender == nearer[(origin + receiver) % len(nearer)]


class Flooding:
    """A Spread by flooding."""

    def __init__(self, settings: FloodSettings, rank: int, size: int, samples: int) -> None:
        self._sides = neighbours(settings.graph, size)
        self._redundant = settings.redundant
        self._flood = Flood(rank, self._sides, samples, settings.hops, redundant=settings.redundant)
        self.lag = self._flood.lag
        self.hops = self._flood.hops
        self.gather_hops = self._flood.diameter

    def exchange(self, channel: Channel, codes: Tensor) -> Tensor:
        """As Spread says."""
        return _run(self._flood, channel, codes)

    def gather(self, channel: Channel, row: Tensor) -> Tensor:
        """As Spread says."""
        return _run(self._once(len(row)), channel, row)

    def sent_bytes(self) -> list[int]:
        """As Spread says."""
        return _sent_bytes(self._flood)

    def gather_bytes(self, row_bytes: int) -> list[int]:
        """As Spread says."""
        return _sent_bytes(self._once(row_bytes))

    def messages(self, hops: int) -> int:
        """As Spread says."""
        flood = self._flood if hops == self.hops else self._once(1)
        return sum(bool(rows) for hop in range(flood.hops) for rows in flood.splits(hop)[0])

    def reset(self) -> None:
        """As Spread says."""
        self._flood.reset()

    def state(self) -> dict[str, Any]:
        """As Spread says."""
        return {"known": self._flood.known.clone()} if self.lag else {}

    def load(self, state: dict[str, Any]) -> None:
        """As Spread says."""
        if self.lag:
            self._flood.known.copy_(state["known"])

    def _once(self, row_bytes: int) -> Flood:
        return Flood(self._flood.rank, self._sides, row_bytes, None, redundant=self._redundant)


def _run(flood: Flood, channel: Channel, row: Tensor) -> Tensor:
    flood.begin(row)
    for hop in range(flood.hops):
        sends, receives = flood.splits(hop)
        rows = row.new_empty(sum(receives), len(row))
        channel.all_to_all(rows, flood.send(hop), receives, sends, in_rounds=True)  # talks to neighbours alone
        flood.receive(hop, rows)
    return flood.complete().clone()


def _sent_bytes(flood: Flood) -> list[int]:
    row_bytes = flood.known.shape[-1]
    counts = [0] * flood.size
    for hop in range(flood.hops):
        for peer, rows in enumerate(flood.splits(hop)[0]):
            counts[peer] += rows * row_bytes
    return counts
