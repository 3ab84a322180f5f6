"""comm/gossip/graphs/choose.py: `graph: auto` takes the fastest, and says why."""

from __future__ import annotations

import pytest
import torch
from ranks import Rank, run_ranks

from thinwire.comm.gossip.graphs.auto import AutoSettings
from thinwire.comm.gossip.graphs.base_k import BaseKSettings
from thinwire.comm.gossip.graphs.choose import choose_graph
from thinwire.comm.gossip.graphs.links import Link, Links
from thinwire.comm.gossip.graphs.probe import probe_links
from thinwire.comm.gossip.graphs.random_graphs import ErdosRenyiSettings
from thinwire.comm.gossip.graphs.regular import CompleteSettings

WIDE = Links(Link(bps=1e8, latency_s=0.02))


def test_many_bytes_go_to_one_neighbour_at_a_time_and_few_to_all() -> None:
    large = choose_graph(16, 100_000_000, WIDE)
    assert large.settings == BaseKSettings(k=1)
    assert [one.total_s for one in large.candidates] == sorted(one.total_s for one in large.candidates)
    assert large.candidates[0].total_s == pytest.approx(4 * (8.0 + 0.02))
    assert choose_graph(16, 100, WIDE).settings == CompleteSettings()
    between = choose_graph(12, 40_000_000, WIDE)  # latency does not count, but three rounds of two are 12.8 s
    assert between.settings == BaseKSettings(k=2)
    assert between.candidates[0].total_s == pytest.approx((1 + 2 + 1) * 3.2 + 3 * 0.02)


def test_the_reason_names_links_seconds_and_what_was_beaten() -> None:
    choice = choose_graph(33, 1_000_000)
    assert choice.reason == (
        "auto: base_k k=1, 99 ms to 0.001 of the distance from consensus in 11 rounds for 1.0 MB each over 1gbit/s and "
        "1 ms (assumed); base_k k=3 101 ms, base_k k=2 102 ms, base_k k=4 165 ms"
    )
    assert "assumed" not in choose_graph(33, 1_000_000, Links(Link(1e9, 1e-3))).reason
    table = choice.table().splitlines()
    assert table[2].split()[:3] == ["base_k", "k=1", "11"]
    assert len(table) == 2 + len(choice.candidates)
    slow = Links(Link(1e9, 1e-3), {(0, 1): Link(1e7, 0.05)})
    assert "10mbit/s to 1gbit/s and 1 ms to 50 ms" in choose_graph(8, 1000, slow).reason


def test_only_what_the_algorithm_allows_is_considered() -> None:
    def kinds(**allowed: bool) -> set[str]:
        return {one.settings.kind for one in choose_graph(16, 10**6, WIDE, **allowed).candidates}

    undirected = {"ring", "torus", "hypercube", "complete"}
    assert kinds() == undirected | {"base_k"}
    assert kinds(static=True) == undirected
    assert kinds(directed=True) == undirected | {"base_k", "one_peer_exponential", "exponential"}
    assert choose_graph(101, 10**6, WIDE, static=True, seed=3).settings == ErdosRenyiSettings()
    own_pace = choose_graph(16, 10**6, WIDE, own_pace=True)
    assert own_pace.settings == CompleteSettings()
    assert own_pace.candidates[0].rounds == 13  # 2 ln(1000) 15/16
    assert "in 13 exchanges" in own_pace.reason


def test_links_can_be_given_in_place_of_a_measurement() -> None:
    assert AutoSettings().links() is None
    assert AutoSettings(link="100mbit", latency="20ms").links() == WIDE
    half = AutoSettings(latency="20ms").links()
    assert half is not None
    assert (half.usual.bps, half.usual.latency_s) == (1e9, 0.02)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7])
def test_any_number_of_machines_gets_a_graph(size: int) -> None:
    for static in (True, False):
        for own_pace in (True, False):
            assert choose_graph(size, 1000, static=static, own_pace=own_pace).candidates


def test_ranks_measure_the_same_links() -> None:
    def work(rank: Rank) -> Links | None:
        queue = rank.queue()
        try:
            return probe_links(queue, torch.device("cpu"))
        finally:
            queue.close()

    first, *others = run_ranks(3, work)
    assert first is not None
    assert all(other == first for other in others)
    assert (first.usual.bps.hex()[:5], first.usual.latency_s.hex()[:5]) == ("0x1.0", "0x1.0")  # powers of two
    assert run_ranks(1, work) == [None]
