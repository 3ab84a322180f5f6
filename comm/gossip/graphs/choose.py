"""`graph: auto`: the graph with the fewest predicted seconds to consensus over the links as they are, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from thinwire.comm.gossip.graphs import EachGraph, build_graph
from thinwire.comm.gossip.graphs.base_k import BaseKSettings
from thinwire.comm.gossip.graphs.consensus import round_s, rounds_to_consensus, seconds_to_consensus
from thinwire.comm.gossip.graphs.exponential import ExponentialSettings, OnePeerExponentialSettings
from thinwire.comm.gossip.graphs.links import ASSUMED, Links
from thinwire.comm.gossip.graphs.random_graphs import ErdosRenyiSettings
from thinwire.comm.gossip.graphs.regular import CompleteSettings, HypercubeSettings, RingSettings, TorusSettings
from thinwire.comm.gossip.graphs.spectrum import Resistance, meeting_rates
from thinwire.comm.gossip.mixing import Graph
from thinwire.comm.units import format_bytes, format_rate

_FACTOR = 1e-3
_MOST_MESSAGES = 64  # to and from one machine in a round of a graph that is considered


@dataclass(frozen=True)
class Candidate:
    """A graph that could be taken.

    name: as it is written in YAML. rounds: to consensus, or, where machines keep their own pace, exchanges of each
    machine. round_s: of the longest of them, seconds. total_s: of all, seconds.
    """

    settings: EachGraph
    name: str
    rounds: int
    round_s: float
    total_s: float


@dataclass(frozen=True)
class Choice:
    """The graph that was chosen, and why.

    candidates: by their seconds, the chosen one first. given: payload and links that they were compared for. unit: of
    their rounds.
    """

    candidates: tuple[Candidate, ...]
    given: str
    unit: str

    @property
    def settings(self) -> EachGraph:
        return self.candidates[0].settings

    @property
    def reason(self) -> str:
        """One line."""
        best, *others = self.candidates
        compared = ", ".join(f"{other.name} {_seconds(other.total_s)}" for other in others[:3])
        return (
            f"auto: {best.name}, {_seconds(best.total_s)} to {_FACTOR:g} of the distance from consensus in "
            f"{best.rounds} {self.unit}{'s' * (best.rounds != 1)} {self.given}" + (f"; {compared}" if compared else "")
        )

    def table(self) -> str:
        """All candidates, the chosen one first."""
        lines = [f"{'graph':24}{self.unit + 's':>12}{'the longest':>14}{'in all':>12}"]
        for one in self.candidates:
            lines.append(f"{one.name:24}{one.rounds:>12}{_seconds(one.round_s):>14}{_seconds(one.total_s):>12}")
        return "\n".join([f"{self.given}:", *lines])


def choose_graph(
    size: int,
    payload_bytes: int,
    links: Links | None = None,
    *,
    seed: int = 0,
    directed: bool = False,
    static: bool = False,
    own_pace: bool = False,
) -> Choice:
    """The graph of so many machines that brings them to 1e-3 of their distance from consensus in the fewest seconds.

    Seconds are those of consensus.py: the rounds that the spectrum predicts, each as long as its slowest machine takes.
    Where machines keep their own pace, each exchanges with one at a time, the pairs that average need 2 ln(1000) chi_1
    exchanges of each machine, and an exchange takes as long as it does on the edges that are used, on average.
    Of equals, the one that comes first here: with fewer neighbours.

    Every machine that calls this with the same arguments gets the same answer; measurements must be shared first.

    Args:
        payload_bytes: one machine's vector.
        links: as measured; None: 1 Gbit/s and 1 ms everywhere, and the reason says so.
        seed: of graphs that are drawn, as build_graph() will be given it.
        directed: whether mass may be pushed, so that exponential graphs are possible.
        static: whether every round must have the same neighbours.
        own_pace: whether machines exchange in pairs, each at its own pace.
    """
    known = links or Links(ASSUMED)
    given = f"for {format_bytes(payload_bytes)} each over {_describe(known)}" + ("" if links else " (assumed)")
    candidates = []
    for settings in _possible(size, directed=directed, static=static, own_pace=own_pace):
        graph = build_graph(settings, size, seed)
        measured = _at_own_pace(graph, known, payload_bytes) if own_pace else _in_rounds(graph, known, payload_bytes)
        if measured is not None:
            candidates.append(Candidate(settings, _name(settings), *measured))
    # To three digits: what the last bits of this machine's arithmetic say is no reason.
    candidates.sort(key=lambda one: float(f"{one.total_s:.3g}"))
    return Choice(tuple(candidates), given, "exchange" if own_pace else "round")


def _possible(size: int, *, directed: bool, static: bool, own_pace: bool) -> Iterator[EachGraph]:
    if size > 3:
        yield RingSettings()
    if not (static or own_pace):
        for k in range(1, min(5, max(2, size - 1))):
            yield BaseKSettings(k=k)
        if directed:
            yield OnePeerExponentialSettings()
    if size > 5 and any(size % rows == 0 for rows in range(2, math.isqrt(size) + 1)):
        yield TorusSettings()
    if size > 4 and size & (size - 1) == 0:
        yield HypercubeSettings()
    if directed:
        yield ExponentialSettings()
    if size > 16:
        yield ErdosRenyiSettings()
    if own_pace or size <= _MOST_MESSAGES + 1:
        yield CompleteSettings()


def _in_rounds(graph: Graph, links: Links, payload_bytes: int) -> tuple[int, float, float] | None:
    rounds = rounds_to_consensus(graph, _FACTOR)
    if rounds is None:
        return None
    longest_s = max(round_s(graph.mixing(round), links, payload_bytes) for round in range(graph.period))
    return rounds, longest_s, seconds_to_consensus(graph, links, payload_bytes, _FACTOR)


def _at_own_pace(graph: Graph, links: Links, payload_bytes: int) -> tuple[int, float, float] | None:
    if graph.size == 1:
        return 0, 0.0, 0.0
    rates = meeting_rates(graph)
    exchanges = math.ceil(2 * math.log(1 / _FACTOR) * Resistance(rates, graph.size).chi_1)
    took_s = [(rate, links.between(*edge).transfer_s(payload_bytes)) for edge, rate in rates.items()]
    mean_s = math.fsum(rate * s for rate, s in took_s) / math.fsum(rate for rate, _ in took_s)
    return exchanges, max(s for _, s in took_s), exchanges * mean_s


def _name(settings: EachGraph) -> str:
    more = settings.model_dump(exclude={"kind"}, exclude_defaults=True)
    if isinstance(settings, BaseKSettings):
        more = {"k": settings.k}
    return " ".join([settings.kind, *(f"{key}={value}" for key, value in more.items())])


def _describe(links: Links) -> str:
    every = [links.usual, *links.pairs.values()]
    bps, latency_s = {link.bps for link in every}, {link.latency_s for link in every}
    rates = " to ".join(f"{format_rate(bound)}/s" for bound in sorted({min(bps), max(bps)}))
    latencies = " to ".join(_seconds(bound) for bound in sorted({min(latency_s), max(latency_s)}))
    return f"{rates} and {latencies}"


def _seconds(value: float) -> str:
    if value >= 1 or value == 0:
        return f"{value:.3g} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"
