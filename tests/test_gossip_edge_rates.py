"""comm/gossip/graphs/edge_rates.py: optimal where the optimum is known, and used at these rates."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from thinwire.comm.gossip.graphs import GraphSettings, build_graph
from thinwire.comm.gossip.graphs.edge_rates import optimal_rates
from thinwire.comm.gossip.graphs.edge_use import used_at_rates
from thinwire.comm.gossip.graphs.edges import EdgesSettings
from thinwire.comm.gossip.graphs.spectrum import Resistance
from thinwire.comm.gossip.graphs.weights import Edge


def two_sites(machines: int) -> list[Edge]:
    """Two complete graphs joined by one link."""
    half = machines // 2
    cliques = [(start + i, start + j) for start in (0, half) for j in range(half) for i in range(j)]
    return [*cliques, (half - 1, half)]


RING = [(0, 9), *((i, i + 1) for i in range(9))]
STAR = [(0, i) for i in range(1, 9)]


@pytest.mark.parametrize(("edges", "size"), [(RING, 10), (STAR, 9)])
@pytest.mark.parametrize("accelerated", [True, False])
def test_equal_edges_have_equal_rates(edges: list[Edge], size: int, accelerated: bool) -> None:
    found = optimal_rates(edges, size, accelerated=accelerated)
    assert list(found.rates.values()) == pytest.approx([size / 2 / len(edges)] * len(edges), rel=1e-4)
    assert found.cost == pytest.approx(found.uniform_cost, rel=1e-8)


@pytest.mark.parametrize(
    ("machines", "uniform", "two_rates"), [(8, 21.8418, 13.25), (16, 126.148, 38.52), (32, 720.75, 106.9)]
)
def test_two_sites_joined_by_one_link(machines: int, uniform: float, two_rates: float) -> None:
    """Below the published optimum with one rate for the link and one for all else, with all edges and with fewer."""
    edges = two_sites(machines)
    every = optimal_rates(edges, machines, drop=False)
    fewer = optimal_rates(edges, machines)
    assert every.uniform_cost == pytest.approx(uniform, rel=1e-5)
    assert fewer.cost < every.cost < two_rates
    assert min(every.rates.values()) > 0
    assert sum(rate > 0 for rate in fewer.rates.values()) == machines - 1  # two stars, whose hubs are joined
    for found in (every, fewer):
        assert found.cost == pytest.approx(Resistance(found.rates, machines).exchanges, rel=1e-9)
        assert sum(found.rates.values()) == pytest.approx(machines / 2)


def test_the_rates_of_two_sites_are_the_optimum_of_their_three_classes() -> None:
    """By symmetry there are only three: the link, edges at its ends, all others. No mixture of these is better."""
    edges = two_sites(8)
    best = optimal_rates(edges, 8, drop=False).cost
    of = {edge: len({3, 4} & set(edge)) for edge in edges}
    scanned = [
        Resistance({edge: (other, near, 1.0)[of[edge]] for edge in edges}, 8).exchanges
        for other in np.geomspace(0.01, 1, 20)
        for near in np.geomspace(0.1, 1, 20)
    ]
    assert best <= min(scanned)
    assert best == pytest.approx(min(scanned), rel=1e-2)


def test_pairs_that_average_are_held_up_by_the_slowest_mode_alone() -> None:
    """Two stars of m with joined hubs cost 4.5 m - 4 exactly; what is left of the cliques does not help."""
    for machines in (8, 16):
        found = optimal_rates(two_sites(machines), machines, accelerated=False)
        assert found.cost == pytest.approx({8: 14.0, 16: 32.0}[machines], rel=1e-6)


def test_seconds_spare_the_slow_link() -> None:
    edges = two_sites(16)
    link = (7, 8)
    cost_s = {edge: 50.0 if edge == link else 1.0 for edge in edges}
    messages, seconds = optimal_rates(edges, 16), optimal_rates(edges, 16, cost_s=cost_s)
    assert seconds.rates[link] / sum(seconds.rates.values()) < 0.5 * messages.rates[link] / sum(messages.rates.values())

    def busy_s(rates: dict[Edge, float]) -> float:
        network = Resistance(rates, 16)
        return sum(cost_s[e] * rate for e, rate in rates.items()) * (2 * network.chi_1 * network.chi_2) ** 0.5

    assert seconds.cost == pytest.approx(busy_s(seconds.rates), rel=1e-9)
    assert seconds.uniform_cost == pytest.approx(busy_s(dict.fromkeys(edges, 1.0)), rel=1e-9)
    assert seconds.cost < 0.99 * busy_s(messages.rates)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**32), st.integers(3, 8), st.booleans())
def test_no_other_rates_found_by_chance_are_better(seed: int, size: int, accelerated: bool) -> None:
    chance = np.random.default_rng(seed)
    edges = [(i, j) for j in range(size) for i in range(j) if j == i + 1 or chance.random() < 0.3]
    found = optimal_rates(edges, size, accelerated=accelerated, drop=False)
    assert found.cost <= found.uniform_cost * (1 + 1e-12)
    best = np.log(list(found.rates.values()))
    for spread in (1e-3, 0.03, 0.5):
        for _ in range(5):
            rates = dict(zip(edges, np.exp(best + spread * chance.normal(size=len(edges))), strict=True))
            network = Resistance(rates, size)
            cost = network.exchanges if accelerated else sum(rates.values()) * network.chi_1
            assert cost >= found.cost * (1 - 1e-3)


def test_rates_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"do not connect"):
        optimal_rates([(0, 1)], 3)
    with pytest.raises(ValueError, match=r"cost_s"):
        optimal_rates([(0, 1)], 2, cost_s={(0, 1): 0.0})
    assert optimal_rates([], 1).rates == {}


def test_a_graph_uses_its_edges_at_their_rates() -> None:
    rates = {(0, 1): 2.0, (1, 2): 1.0, (2, 3): 0.0, (0, 3): 0.5}
    graph = used_at_rates("some", rates, 4, 7)
    rounds = [graph.mixing(round) for round in range(2500)]
    for (i, j), rate in rates.items():
        share = np.mean([j in mixing.rows[i] for mixing in rounds])
        assert share == pytest.approx(rate / 3, abs=0.04)  # machine 1 is the busiest, with 3
    alone = [mixing for mixing in rounds if mixing.sources(0) == [1] and mixing.sources(1) == [0]]
    assert alone[0].rows[0] == {0: 0.5, 1: 0.5}


def test_rates_by_setting() -> None:
    edges = [list(edge) for edge in two_sites(8)]
    read: EdgesSettings = TypeAdapter(GraphSettings).validate_python(
        {"kind": "edges", "edges": edges, "rates": "accelerated"}
    )
    graph = build_graph(read, 8, 0)
    assert graph.symmetric
    used = {(i, j) for t in range(300) for i in range(8) for j in graph.mixing(t).sources(i)}
    assert len(used) == 2 * 7  # the other edges are not worth a message
    assert build_graph(read, 8, 0).mixing(77).rows == graph.mixing(77).rows != build_graph(read, 8, 1).mixing(77).rows
    with pytest.raises(ValueError, match=r"method\.graph\.rates: accelerated is for undirected"):
        build_graph(read.model_copy(update={"directed": True}), 8, 0)
    with pytest.raises(ValueError, match=r"disconnected"):
        build_graph(read, 9, 0)
