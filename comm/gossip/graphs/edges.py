"""A graph that is given edge by edge, with measured links and weights where the user has them."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from thinwire.comm.gossip.graphs.edge_rates import optimal_rates
from thinwire.comm.gossip.graphs.edge_use import used_at_rates
from thinwire.comm.gossip.graphs.links import Link, Links
from thinwire.comm.gossip.graphs.reach import reached
from thinwire.comm.gossip.graphs.sequence import Drawn, Repeating
from thinwire.comm.gossip.graphs.weights import Edge, max_degree, metropolis, pushed, symmetric
from thinwire.comm.gossip.mixing import Mixing
from thinwire.comm.settings import Settings
from thinwire.comm.units import parse_delay, parse_rate


def _as_tuple(given: Any) -> Any:
    """A list as YAML has it: pydantic's strict mode, in which configurations are read, tells them apart."""
    return tuple(given) if isinstance(given, list) else given


class EdgeSettings(Settings):
    """`{ends: [1, 2], link: 100mbit, latency: 20ms, weight: 0.25}`, or `[1, 2]` alone.

    ends: two machines; sender and receiver if the graph is directed.
    link, latency: as measured; null: those of the graph.
    weight: what each end gives to what comes from the other; directed, the share of its mass that the sender sends.
    """

    ends: Annotated[tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]], BeforeValidator(_as_tuple)]
    link: str | None = None
    latency: str | None = None
    weight: float | None = Field(None, gt=0, le=1)

    @field_validator("ends")
    @classmethod
    def _two_machines(cls, ends: tuple[int, int]) -> tuple[int, int]:
        if ends[0] == ends[1]:
            raise ValueError(f"{list(ends)} joins machine {ends[0]} to itself; what it keeps follows from its edges")
        return ends

    @field_validator("link")
    @classmethod
    def _rate(cls, link: str | None) -> str | None:
        if link is not None:
            parse_rate(link, "link")
        return link

    @field_validator("latency")
    @classmethod
    def _delay(cls, latency: str | None) -> str | None:
        if latency is not None:
            parse_delay(latency, "latency")
        return latency


def _from_pair(given: Any) -> Any:
    return {"ends": given} if isinstance(given, list | tuple) else given


class EdgesSettings(Settings):
    """`graph: {kind: edges, edges: [[0, 1], {ends: [1, 2], link: 100mbit, latency: 20ms}]}`.

    edges: each once; directed, one for each direction.
    directed: edges lead from their first machine to their second, and mass is pushed along them (columns sum to 1).
    weights: metropolis, 1 / (1 + max of the two degrees); max_degree, 1 / (1 + the highest degree) everywhere; uniform,
        a sender divides what it has evenly among its receivers and itself (directed, or where all degrees are equal);
        given, the edges say; auto: given if they do, else metropolis, or uniform if directed.
    stochastic: doubly: rows must sum to 1 as well; only a directed graph may be column.
    rates: every_round, all edges take part in every round; otherwise each takes part with a probability of its own, so
        that the busiest machine has one partner a round on average: uniform, all the same; plain, those with which
        pairs that average agree at the least cost; accelerated, the same for A2CiD2 and DADAO: edge_rates.py.
    cost: what rates are to save: messages, or the seconds that links are busy, of vectors of payload_bytes.
    seed: of the rounds' draws; null: the run's.
    link, latency: of edges that do not say.
    """

    kind: Literal["edges"] = "edges"
    edges: Annotated[tuple[Annotated[EdgeSettings, BeforeValidator(_from_pair)], ...], BeforeValidator(_as_tuple)]
    directed: bool = False
    weights: Literal["auto", "metropolis", "max_degree", "uniform", "given"] = "auto"
    stochastic: Literal["auto", "doubly", "column"] = "auto"
    rates: Literal["every_round", "uniform", "plain", "accelerated"] = "every_round"
    cost: Literal["messages", "seconds"] = "messages"
    payload_bytes: int = Field(1 << 20, gt=0)
    seed: int | None = Field(None, ge=0, lt=2**64)
    link: str = "1gbit"
    latency: str = "1ms"

    @field_validator("link")
    @classmethod
    def _rate(cls, link: str) -> str:
        parse_rate(link, "link")
        return link

    @field_validator("latency")
    @classmethod
    def _delay(cls, latency: str) -> str:
        parse_delay(latency, "latency")
        return latency

    def build(self, size: int, seed: int) -> Repeating | Drawn:
        """The graph of so many machines. Raises ValueError if the edges are not ones of such a graph."""
        edges = self._edges(size)
        if self.rates != "every_round":
            return self._sometimes(list(edges), size, seed if self.seed is None else self.seed)
        mixing = self._mixing(edges, size)
        doubly = self.stochastic == "doubly" or (self.stochastic == "auto" and not self.directed)
        if self.stochastic == "column" and not self.directed:
            raise ValueError("method.graph.stochastic: column, but undirected edges are doubly stochastic; say doubly")
        if doubly:
            for rank, row in enumerate(mixing.rows):
                if abs(sum(row.values()) - 1) > 1e-9:
                    raise ValueError(
                        f"method.graph.weights: what machine {rank} receives has weights that sum to "
                        f"{sum(row.values()):g}, so they are not doubly stochastic as declared; balance them, or say "
                        "stochastic: column"
                    )
        return Repeating(f"{len(edges)} {'directed ' * self.directed}edges of {size}", [mixing])

    def links(self) -> Links:
        """The links as they were measured."""
        usual = Link(parse_rate(self.link, "link"), parse_delay(self.latency, "latency"))
        pairs = {}
        for edge in self.edges:
            bps = usual.bps if edge.link is None else parse_rate(edge.link, "link")
            latency_s = usual.latency_s if edge.latency is None else parse_delay(edge.latency, "latency")
            pairs[self._key(edge)] = Link(bps, latency_s)
        return Links(usual, pairs)

    def _sometimes(self, edges: list[Edge], size: int, seed: int) -> Drawn:
        if self.directed or self.weights not in ("auto", "metropolis") or any(edge.weight for edge in self.edges):
            raise ValueError(
                f"method.graph.rates: {self.rates} is for undirected edges with metropolis weights, since each round "
                "has other neighbours; drop directed and weights, or say every_round"
            )
        if len(reached(0, edges, size, both_ways=True)) < size:
            raise ValueError("method.graph.edges: disconnected: no rates bring all machines together; add an edge")
        rates = dict.fromkeys(edges, 1.0)
        if self.rates != "uniform":
            links = self.links()
            cost_s = {edge: links.between(*edge).transfer_s(self.payload_bytes) for edge in edges}
            found = optimal_rates(
                edges,
                size,
                accelerated=self.rates == "accelerated",
                cost_s=cost_s if self.cost == "seconds" else None,
            )
            rates = found.rates
        return used_at_rates(f"{len(edges)} edges of {size} at {self.rates} rates", rates, size, seed)

    def _key(self, edge: EdgeSettings) -> Edge:
        return edge.ends if self.directed else (min(edge.ends), max(edge.ends))

    def _edges(self, size: int) -> dict[Edge, float | None]:
        edges: dict[Edge, float | None] = {}
        for number, edge in enumerate(self.edges):
            path = f"method.graph.edges[{number}]"
            if max(edge.ends) >= size:
                raise ValueError(f"{path}: {list(edge.ends)}, but the machines are 0..{size - 1}")
            if self._key(edge) in edges:
                raise ValueError(f"{path}: {list(edge.ends)} has been given before; give each edge once")
            edges[self._key(edge)] = edge.weight
        return edges

    def _mixing(self, edges: dict[Edge, float | None], size: int) -> Mixing:
        silent = [edge for edge, weight in edges.items() if weight is None]
        given = len(silent) < len(edges)
        chosen = self.weights
        if chosen == "auto":
            chosen = "given" if given else "uniform" if self.directed else "metropolis"
        if chosen != "given" and given:
            raise ValueError(
                f"method.graph.weights: {chosen}, but edges give weights of their own; say given, or drop these"
            )
        if chosen == "given":
            if silent:
                raise ValueError(
                    f"method.graph.edges: {list(silent[0])} gives no weight, and others do; give all or none"
                )
            return self._given({edge: weight for edge, weight in edges.items() if weight is not None}, size)
        if self.directed:
            if chosen != "uniform":
                raise ValueError(
                    f"method.graph.weights: {chosen} is for undirected edges; take uniform, or give weights"
                )
            out = [0] * size
            for sender, _ in edges:
                out[sender] += 1
            return pushed({edge: Fraction(1, 1 + out[edge[0]]) for edge in edges}, size)
        mixing = (max_degree if chosen == "max_degree" else metropolis)(list(edges), size)
        if chosen == "uniform" and len({len(mixing.sources(rank)) for rank in range(size)}) > 1:
            raise ValueError(
                "method.graph.weights: uniform, but the machines' degrees differ, so columns would not sum to 1; take "
                "metropolis or max_degree"
            )
        return mixing

    def _given(self, weights: dict[Edge, float], size: int) -> Mixing:
        # Decimal digits as they were written: 0.2 + 0.4 + 0.4 is 1.
        exact = {edge: Fraction(repr(weight)) for edge, weight in weights.items()}
        given = [Fraction(0)] * size
        for edge, weight in exact.items():
            for end in edge[:1] if self.directed else edge:
                given[end] += weight
        for rank, total in enumerate(given):
            if total > 1:
                raise ValueError(
                    f"method.graph.edges: the weights at machine {rank} sum to {float(total):g}, which leaves it less "
                    "than nothing of its own; they may sum to 1 at most"
                )
        return pushed(exact, size) if self.directed else symmetric(exact, size)
