"""Flooding: after as many hops as the graph is wide, every rank has every rank's bytes, whatever the graph."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Rank, run_ranks, run_ranks_to_the_end
from torch import Tensor, nn

from thinwire.comm.errors import PeerLostError
from thinwire.comm.onebyte.flood import Flood, FloodSettings
from thinwire.comm.onebyte.graph import distances, neighbours
from thinwire.comm.onebyte.log import Log
from thinwire.comm.onebyte.optimizer import OneByteSPSA
from thinwire.comm.onebyte.replay import replay
from thinwire.comm.onebyte.rounds import Round

PATH_OF_4 = [[0, 1], [1, 2], [2, 3]]


@st.composite
def connected_graphs(draw: st.DrawFn) -> list[list[int]]:
    """A tree, and further edges."""
    size = draw(st.integers(1, 10))
    edges = [(rank, draw(st.integers(0, rank - 1))) for rank in range(1, size)]
    if size > 1:
        ends = st.integers(0, size - 1)
        edges += draw(st.lists(st.tuples(ends, ends).filter(lambda e: e[0] != e[1]), max_size=size))
    return neighbours(edges, size)


def walk(machines: Sequence[Flood], codes: Tensor) -> list[int]:
    """One step of all machines with these codes, (ranks, samples). Returns the rows that each rank has received."""
    for machine, own in zip(machines, codes, strict=True):
        machine.begin(own)
    received = [0] * len(machines)
    for hop in range(machines[0].hops):
        parcels = [machine.send(hop).split(machine.splits(hop)[0]) for machine in machines]
        for rank, machine in enumerate(machines):
            arrived = [parcels[sender][rank] for sender in range(len(machines))]
            assert [len(rows) for rows in arrived] == machine.splits(hop)[1]
            machine.receive(hop, torch.cat(arrived))
            received[rank] += sum(len(rows) for rows in arrived)
    return received


@given(connected_graphs(), st.integers(1, 11) | st.none(), st.booleans(), st.integers(0, 3), st.data())
@settings(max_examples=80, deadline=None)
def test_every_rank_gets_every_rank_s_bytes_once(
    sides: list[list[int]], hops: int | None, redundant: bool, samples: int, data: st.DataObject
) -> None:
    size = len(sides)
    machines = [Flood(rank, sides, samples, hops, redundant=redundant) for rank in range(size)]
    lag = machines[0].lag
    bytes_of_a_round = st.binary(min_size=size * samples, max_size=size * samples)
    begun: list[Tensor] = []
    for _ in range(lag + 3):
        codes = torch.tensor(list(data.draw(bytes_of_a_round)), dtype=torch.uint8).view(size, samples)
        begun.append(codes)
        received = walk(machines, codes)
        if redundant:
            assert all(rows >= size - 1 for rows in received)
        else:
            assert received == [size - 1] * size  # of each round and rank once, so nothing came twice
        if len(begun) > lag:
            for machine in machines:
                assert torch.equal(machine.complete(), begun[-1 - lag])
    for rank, machine in enumerate(machines):
        for hop in range(machine.hops):
            assert all(not rows or peer in sides[rank] for peer, rows in enumerate(machine.splits(hop)[0]))


@pytest.mark.parametrize(
    ("graph", "size", "edges", "diameter"),
    [
        ("ring", 1, 0, 0),
        ("ring", 2, 1, 1),
        ("ring", 64, 64, 32),
        ("mesh", 3, 2, 2),
        ("mesh", 64, 112, 14),
        ("torus", 6, 9, 2),
        ("torus", 64, 128, 8),
        ("hypercube", 64, 192, 6),
        ("exponential", 5, 10, 1),
        ("exponential", 64, 352, 3),  # a number below 64 is a sum of at most three powers of two, or their opposites
    ],
)
def test_the_named_graphs(graph: Any, size: int, edges: int, diameter: int) -> None:
    sides = neighbours(graph, size)
    assert sum(map(len, sides)) == 2 * edges
    assert all(a in sides[b] for a in range(size) for b in sides[a])
    assert max(max(distances(sides, rank)) for rank in range(size)) == diameter


@pytest.mark.parametrize(
    ("graph", "size", "message"),
    [
        ("hypercube", 6, r"method\.exchange\.graph: hypercube needs 2\^k ranks, not 6; take exponential or torus"),
        ([(0, 1), (2, 3)], 4, "no path leads from rank 0 to rank 2"),
        ([(0, 1), (1, 4)], 4, r"edge \[1, 4\] must join two different ranks below 4"),
        ([(0, 1), (1, 1)], 2, r"edge \[1, 1\]"),
    ],
)
def test_what_is_no_graph_is_refused(graph: Any, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        neighbours(graph, size)


def train(rank: Rank, name: str, exchange: Any, rounds: int, log: Any = None) -> tuple[OneByteSPSA, list[bytes]]:
    """A run on a target of this rank's own. Returns its hash after every step until `rounds` are committed."""
    queue = rank.queue(name=name)
    optimizer, weights = build(queue, exchange, log)
    return optimizer, go_on(optimizer, weights, rank.rank, rounds)


def build(queue: Any, exchange: Any, log: Any = None) -> tuple[OneByteSPSA, Tensor]:
    weights = nn.Parameter(torch.arange(24.0).view(4, 6) / 64)
    optimizer = OneByteSPSA([("w", weights)], lr=2**-9, samples=2, log=log, queue=queue, exchange=exchange)
    return optimizer, weights


def go_on(optimizer: OneByteSPSA, weights: Tensor, rank: int, rounds: int) -> list[bytes]:
    hashes = []
    while optimizer.replica.rounds < rounds:
        before = optimizer._fixed._queue.meter.sent_bytes("onebyte")
        optimizer.step(lambda: (weights.detach() - rank / 8).square().sum())
        after = optimizer._fixed._queue.meter.sent_bytes("onebyte")
        sent = {level: after[level] - before.get(level, 0) for level in after}
        assert {level: count for level, count in sent.items() if count} == optimizer.predicted_bytes()
        hashes.append(optimizer.replica.model_hash())
    return hashes


@pytest.mark.parametrize("redundant", [False, True])
@pytest.mark.parametrize(("graph", "size"), [("ring", 5), (PATH_OF_4, 4), ("torus", 6)])
def test_with_all_hops_in_a_step_it_equals_an_all_gather(graph: Any, size: int, redundant: bool) -> None:
    flood = {"kind": "flood", "graph": graph, "redundant": redundant}

    def work(rank: Rank) -> bool:
        return train(rank, "flood", flood, 4)[1] == train(rank, "gather", "all_gather", 4)[1]

    assert run_ranks(size, work) == [True] * size


@pytest.mark.parametrize("hops", [1, 2])
def test_with_fewer_hops_rounds_come_whole_in_order_and_later(tmp_path: Any, hops: int) -> None:
    flood = {"kind": "flood", "graph": PATH_OF_4, "hops": hops}
    lag = 3 // hops - (3 % hops == 0)

    def work(rank: Rank) -> list[bytes]:
        optimizer, hashes = train(rank, "flood", flood, 6, tmp_path / f"{rank.rank}.log")
        assert len(hashes) == 6 + lag
        assert hashes[lag - 1] == hashes[0] != hashes[lag]
        optimizer.remove()
        return hashes

    first, *others = run_ranks(4, work)
    assert all(other == first for other in others)
    logs = [Log.open(tmp_path / f"{rank}.log", read_only=True) for rank in range(4)]
    assert len({log.chain(len(log)) for log in logs}) == 1
    rounds = [record for record in logs[0] if isinstance(record, Round)]
    assert [record.number for record in rounds] == list(range(6))
    assert all([len(c.codes) for c in record.contributions] == [2] * 4 for record in rounds)
    again = replay(logs[0], {"w": torch.arange(24.0).view(4, 6) / 64})
    assert again.model_hash == first[-1]
    for log in logs:
        log.close()


def test_rounds_under_way_are_part_of_the_state() -> None:
    flood = {"kind": "flood", "graph": PATH_OF_4, "hops": 1}

    def work(rank: Rank) -> tuple[list[bytes], list[bytes]]:
        _, whole = train(rank, "whole", flood, 6)
        optimizer, _ = train(rank, "before", flood, 3)
        states = optimizer.state_dict(), optimizer.replica.lattice._cells[0].weights.clone()
        again, weights = build(rank.queue(name="after"), flood)
        weights.data.copy_(states[1].view(4, 6))
        again.load_state_dict(states[0])
        other, _ = build(rank.queue(name="other"), "all_gather")
        with pytest.raises(ValueError, match="another `exchange`"):
            other.load_state_dict(states[0])
        return whole[-3:], go_on(again, weights, rank.rank, 6)

    for whole, parts in run_ranks(4, work):
        assert whole == parts


def test_an_absent_slope_counts_on_all_ranks_in_the_step_that_completes_its_round() -> None:
    def work(rank: Rank) -> list[float]:
        optimizer, weights = build(rank.queue(), {"kind": "flood", "graph": PATH_OF_4, "hops": 1})
        absent = []
        for step in range(5):
            bad = float("nan") if (rank.rank, step) == (1, 1) else 0.0
            optimizer.step(lambda bad=bad: weights.detach().square().sum() + bad)
            absent.append(optimizer.metrics()["absent"])
        assert bool(weights.isfinite().all())
        return absent

    assert run_ranks(4, work) == [[0.0, 0.0, 0.0, 2.0, 0.0]] * 4


def test_other_graphs_and_other_exchanges_are_found_before_the_first_round() -> None:
    def work(rank: Rank) -> None:
        with pytest.raises(ValueError, match="rank 1 and rank 0 do not have the same exchange"):
            build(rank.queue(), {"kind": "flood", "graph": "mesh" if rank.rank == 1 else "ring"})

    run_ranks(3, work)
    with pytest.raises(ValueError, match="fixed job"):
        OneByteSPSA(
            [("w", nn.Parameter(torch.ones(2)))],
            log="never.log",
            join=lambda *_: pytest.fail("joined"),
            exchange=FloodSettings(graph="ring"),
        )


def test_a_lost_rank_ends_the_run_on_all() -> None:
    done = threading.Barrier(4)

    def work(rank: Rank) -> None:
        queue = rank.queue(timeout_s=0.5)
        optimizer, weights = build(queue, {"kind": "flood", "graph": PATH_OF_4, "hops": 1})
        try:
            go_on(optimizer, weights, rank.rank, 1)
            if rank.rank == 0:
                queue.monitor.close()
            else:
                go_on(optimizer, weights, rank.rank, 9)
        finally:
            done.wait(30)

    _, *survivors = run_ranks_to_the_end(4, work)
    for error in survivors:
        assert isinstance(error, PeerLostError)
        assert error.missing_ranks == (0,)
