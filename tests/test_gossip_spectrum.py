"""comm/gossip/graphs/spectrum.py and consensus.py: published values, and predictions that simulated rounds keep."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from thinwire.comm.gossip.codec import Plain
from thinwire.comm.gossip.graphs import GraphSettings, build_graph, thinned
from thinwire.comm.gossip.graphs.consensus import round_s, rounds_to_consensus, seconds_to_consensus
from thinwire.comm.gossip.graphs.links import Link, Links
from thinwire.comm.gossip.graphs.spectrum import Resistance, chi_1, chi_2, meeting_rates, period_product, rho
from thinwire.comm.gossip.mixer import SymmetricMixer
from thinwire.comm.gossip.mixing import Graph
from thinwire.comm.gossip.port import Script
from thinwire.comm.gossip.simulated_network import HEADER_BYTES, Network, Trunk
from thinwire.comm.gossip.simulation import Simulation

READ: TypeAdapter[Any] = TypeAdapter(GraphSettings)
GIGABIT = Links(Link(bps=1e9, latency_s=1e-3))


def build(given: Any, size: int, seed: int = 0) -> Graph:
    return build_graph(READ.validate_python(given), size, seed)


@pytest.mark.parametrize("size", [4, 16, 64])
def test_resistance_of_ring_and_complete_graph(size: int) -> None:
    ring, complete = meeting_rates(build("ring", size)), meeting_rates(build("complete", size))
    assert chi_1(ring, size) == pytest.approx(1 / (1 - math.cos(2 * math.pi / size)))
    for value in (chi_2(ring, size), chi_1(complete, size), chi_2(complete, size)):
        assert value == pytest.approx((size - 1) / size)


@pytest.mark.parametrize(
    ("kind", "size", "exchanges"),
    [("ring", 10, 15.3500), ("ring", 8, 9.7774), ("star", 9, 8.0), ("complete", 9, 8 / 2**0.5), ("path", 8, 17.9404)],
)
def test_exchanges_of_dadao(kind: str, size: int, exchanges: float) -> None:
    """Nabli & Oyallon 2022: its lambda, the same whatever the rates' scale."""
    rates = dict.fromkeys(meeting_rates(build(kind, size)), 3.7)
    assert Resistance(rates, size).exchanges == pytest.approx(exchanges, abs=6e-5)


def test_a_network_that_does_not_conduct_is_refused() -> None:
    with pytest.raises(ValueError, match=r"do not connect"):
        Resistance({(0, 1): 1.0, (1, 2): 0.0}, 3)
    alone = Resistance({}, 1)
    assert (alone.chi_1, alone.chi_2) == (0, 0)


def test_meeting_rates_are_what_machines_that_ask_evenly_do() -> None:
    path = meeting_rates(build("path", 3))  # 0 and 2 always ask 1; 1 asks one of them
    assert path == pytest.approx({(0, 1): 0.75, (1, 2): 0.75})
    star = meeting_rates(build("star", 4))
    assert sum(star.values()) == pytest.approx(2)
    resting = meeting_rates(build({"kind": "base_k", "k": 1}, 3))  # in each of three rounds one has nobody to ask
    assert sum(resting.values()) == pytest.approx(1)
    changing = meeting_rates(build({"kind": "base_k", "k": 1}, 4))
    assert changing == pytest.approx({(0, 1): 0.5, (2, 3): 0.5, (0, 2): 0.5, (1, 3): 0.5})


KINDS: list[tuple[Any, int]] = [
    ("ring", 9),
    ("path", 5),
    ("complete", 6),
    ("exponential", 7),
    ("one_peer_exponential", 12),
    ("one_peer_exponential", 16),
    ({"kind": "base_k", "k": 2}, 10),
    ("base_k", 25),
    ("matching", 10),
    ({"kind": "equi", "directed": True}, 11),
]


@pytest.mark.parametrize(("kind", "size"), KINDS)
def test_the_predicted_rounds_suffice_and_one_less_does_not(kind: Any, size: int) -> None:
    graph = build(kind, size)
    predicted = rounds_to_consensus(graph)
    assert predicted is not None
    left, product = [], np.eye(size)
    for round in range(predicted):
        product = graph.mixing(round).matrix() @ product
        left.append(float(np.linalg.norm(product - 1 / size, 2)))
    assert left[-1] <= 1e-3 * (1 + 1e-9)
    assert len(left) == 1 or left[-2] > 1e-3


def test_push_sum_agrees_on_the_mean_over_a_directed_graph() -> None:
    pairs = [[0, 1], [1, 2], [2, 3], [3, 4], [4, 0], [0, 2], [3, 1]]
    graph = build({"kind": "edges", "directed": True, "edges": pairs}, 5)
    predicted = rounds_to_consensus(graph)
    assert predicted is not None
    x, mass = np.random.default_rng(0).normal(size=(5, 40)), np.ones((5, 1))
    mean, start = x.mean(0), np.linalg.norm(x - x.mean(0), axis=0)
    for round in range(predicted):
        dense = graph.mixing(round).matrix()
        x, mass = dense @ x, dense @ mass
    assert (np.linalg.norm(x / mass - mean, axis=0) <= 1.01e-3 * start).all()
    assert not np.allclose(x, mean, atol=0.01)  # without the mass it would be wrong


def test_what_never_agrees_has_no_rounds() -> None:
    graph = thinned(build("ring", 2), 0.0, 0)
    assert rounds_to_consensus(graph) is None
    assert seconds_to_consensus(graph, GIGABIT, 1e6) == math.inf
    assert rounds_to_consensus(build("ring", 1)) == 0
    with pytest.raises(ValueError, match=r"factor: 1;"):
        rounds_to_consensus(graph, 1.0)
    with pytest.raises(ValueError, match=r"never repeats"):
        period_product(graph)


def test_seconds_are_those_of_the_slowest_machine() -> None:
    megabyte = 8e6 / 8
    assert round_s(build("ring", 8).mixing(0), GIGABIT, megabyte) == pytest.approx(2 * 0.008 + 0.001)
    assert round_s(build("star", 8).mixing(0), GIGABIT, megabyte) == pytest.approx(7 * 0.008 + 0.001)
    assert round_s(build("base_k", 8).mixing(0), GIGABIT, megabyte) == pytest.approx(0.008 + 0.001)
    assert seconds_to_consensus(build("base_k", 8), GIGABIT, megabyte) == pytest.approx(3 * 0.009)
    # One slow link is a limit for itself; the fast ones do not wait behind it.
    slow = Links(Link(1e9, 1e-3), {(0, 1): Link(1e8, 0.02)})
    assert round_s(build("ring", 8).mixing(0), slow, megabyte) == pytest.approx(0.08 + 0.02)
    one_way = Links(Link(1e9, 0.0), {(1, 0): Link(1e8, 0.0)})
    assert one_way.between(1, 0).bps == 1e8
    assert one_way.between(0, 1).bps == 1e9
    thin = thinned(build("complete", 4), 0.5, 0)
    rounds = rounds_to_consensus(thin)
    assert rounds is not None
    each_s = [round_s(thin.mixing(t), GIGABIT, megabyte) for t in range(rounds)]
    assert seconds_to_consensus(thin, GIGABIT, megabyte) == pytest.approx(sum(each_s))
    assert len({round(s, 9) for s in each_s}) > 1


SLOW_LINK = {"kind": "edges", "edges": [[i, (i + 1) % 8] for i in range(8)]}


@pytest.mark.parametrize(
    ("kind", "size", "within"), [("matching", 10, 1e-9), ("base_k", 8, 1e-9), ("path", 5, 0.05), (SLOW_LINK, 8, 0.02)]
)
def test_machines_in_a_simulated_network_take_the_predicted_seconds(kind: Any, size: int, within: float) -> None:
    """And then are as near to each other as predicted, with the mean that they began with."""
    graph = build(kind, size)
    slow = {(3, 4): Trunk(1e6, 0.05)} if kind is SLOW_LINK else {}
    links = Links(Link(1e8, 5e-3), {pair: Link(trunk.rate_bps, trunk.delay_s) for pair, trunk in slow.items()})
    rounds = rounds_to_consensus(graph)
    assert rounds is not None
    start = torch.randn(size, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    simulation = Simulation(size, Network(rate_bps=1e8, delay_s=5e-3, paths=slow))

    def machine(rank: int) -> Script[Tensor]:
        mixer, x = SymmetricMixer(simulation.ports[rank], Plain(), deadline_s=1e6), start[rank]
        for round in range(rounds):
            mixer.begin(round, graph.mixing(round), x)
            x = (yield from mixer.finish()).average
        return x

    x = torch.stack(simulation.run([machine(rank) for rank in range(size)]))
    predicted_s = seconds_to_consensus(graph, links, 8 * 500 + HEADER_BYTES)
    assert simulation.now_s == pytest.approx(predicted_s, rel=within)
    torch.testing.assert_close(x.mean(0), start.mean(0), rtol=0, atol=1e-12)
    assert (x - x.mean(0)).norm() <= 1e-3 * (start - start.mean(0)).norm()


@pytest.mark.parametrize(("bps", "latency_s"), [(0.0, 0.0), (math.nan, 0.0), (1e9, -1.0), (1e9, math.inf)])
def test_links_that_cannot_be_are_refused(bps: float, latency_s: float) -> None:
    with pytest.raises(ValueError, match=r"link_bps|latency_s"):
        Link(bps, latency_s)


def test_rho_is_the_largest_contraction_of_a_round() -> None:
    mixing = build("ring", 8).mixing(0)
    wave = np.cos(2 * np.pi * np.arange(8) / 8)  # the slowest mode of a ring
    assert np.linalg.norm(mixing.matrix() @ wave) / np.linalg.norm(wave) == pytest.approx(rho(mixing))
