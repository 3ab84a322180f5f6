from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from gossip_posts import place_for, run_scripts
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.comm.gossip.barrier import MERGE_STREAM, Agreed, Serving, agree, barrier, decode, encode
from thinwire.comm.gossip.merge import average_all, merge_bytes
from thinwire.comm.gossip.simulation import Simulation, pause
from thinwire.comm.wire import PayloadError

DEADLINE_S = 10.0


@dataclass
class Erratic:
    """Links of random delay, at most `slowest_s`; between two machines none overtakes another."""

    chance: np.random.Generator
    slowest_s: float = 1.0

    def __post_init__(self):
        self.last = {}

    def arrival_s(self, source, to, payload_bytes, now_s):
        at = max(self.last.get((source, to), 0.0), now_s + self.chance.uniform(0.0, self.slowest_s))
        self.last[source, to] = at
        return at


def values(size, numel=70, dtype=torch.float64):
    generator = torch.Generator().manual_seed(size)
    return [torch.randn(numel, generator=generator, dtype=dtype) for _ in range(size)]


def late(port, script, seconds):
    if seconds:
        yield pause(port.now(), seconds)
    return (yield from script)


def merges(world, vectors, masses, number=3, starts=None):
    starts = starts or [0.0] * len(vectors)
    return [
        late(port, average_all(port, x, m, number=number, deadline_s=DEADLINE_S), start)
        for port, x, m, start in zip(world.ports, vectors, masses, starts, strict=True)
    ]


@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_every_machine_gets_the_weighted_mean_and_the_same_bits(size):
    vectors, masses = values(size), [0.25 + 0.5 * i for i in range(size)]
    world = Simulation(size, Erratic(np.random.default_rng(size)))
    merged = world.run(merges(world, vectors, masses))
    expected = sum(m * x for m, x in zip(masses, vectors, strict=True)) / sum(masses)
    for one in merged:
        assert one.members == frozenset(range(size))
        assert one.mass == pytest.approx(sum(masses), abs=1e-15)
        assert torch.equal(one.value, merged[0].value)
        torch.testing.assert_close(one.value, expected, rtol=1e-14, atol=1e-15)


def test_equal_vectors_stay_as_they_are():
    x = values(1, dtype=torch.float32)[0]
    world = Simulation(6)
    assert all(torch.equal(one.value, x) for one in world.run(merges(world, [x.clone() for _ in range(6)], [1.0] * 6)))


@pytest.mark.parametrize("numel", [3, 70, 1000])
def test_bytes_are_two_slices_for_each_other_machine(numel):
    world = Simulation(4)
    world.run(merges(world, values(4, numel), [1.0] * 4))
    agreements = 2 * 3 * 2  # of the two that a merge takes, both passed on to three machines in two bytes
    for rank, port in enumerate(world.ports):
        assert sum(port.sent_bytes.values()) == merge_bytes(numel, 8, rank, 4) + agreements


@given(st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_machines_that_live_take_one_mean_whoever_dies_and_whenever(seed):
    chance = np.random.default_rng(seed)
    size = int(chance.integers(2, 8))
    vectors, masses = values(size), [1.0 + i for i in range(size)]
    world = Simulation(size, Erratic(chance))
    dying = chance.permutation(size)[: int(chance.integers(1, size))].tolist()
    for rank in dying:
        world.at(float(chance.uniform(0.0, 8.0)), lambda rank=rank: world.kill(rank))
    merged = world.run(merges(world, vectors, masses, starts=chance.uniform(0.0, 2.0, size).tolist()))
    alive = set(range(size)) - set(dying)
    first = merged[min(alive)]
    expected = sum(masses[i] * vectors[i] for i in first.members) / sum(masses[i] for i in first.members)
    assert alive <= first.members
    torch.testing.assert_close(first.value, expected, rtol=1e-14, atol=1e-15)
    for rank in alive:
        assert merged[rank].members == first.members
        assert torch.equal(merged[rank].value, first.value)
    assert world.now_s < 8.0 * size  # nobody has waited for the deadline


@pytest.mark.parametrize("slow", [0, 2])
def test_a_machine_later_than_the_deadline_is_left_out_and_keeps_its_own(slow):
    vectors = values(4)
    world = Simulation(4, Erratic(np.random.default_rng(1)))
    starts = [0.0] * 4
    starts[slow] = 5 * DEADLINE_S
    merged = world.run(merges(world, vectors, [1.0] * 4, starts=starts))
    others = [rank for rank in range(4) if rank != slow]
    mean = torch.stack([vectors[rank] for rank in others]).mean(dim=0)
    for rank in others:
        assert merged[rank].members == frozenset(others)
        torch.testing.assert_close(merged[rank].value, mean, rtol=1e-14, atol=1e-15)
    assert merged[slow].members == frozenset(others)
    assert torch.equal(merged[slow].value, vectors[slow])


def test_a_vector_that_is_not_finite_stays_out_and_is_named_everywhere():
    vectors = values(3)
    vectors[1][5] = float("nan")
    world = Simulation(3)
    merged = world.run(merges(world, vectors, [1.0] * 3))
    assert all(one.nonfinite == {1} and one.members == {0, 2} for one in merged)
    assert merged[1].value is vectors[1]
    torch.testing.assert_close(merged[0].value, (vectors[0] + vectors[2]) / 2)


def test_merges_and_barriers_follow_one_another():
    def run(port, x):
        for number in range(4):
            assert (yield from barrier(port, number, deadline_s=DEADLINE_S)) == frozenset(range(3))
            merged = yield from average_all(port, x, 1.0, number=number, deadline_s=DEADLINE_S)
            x = merged.value + port.rank
        return x

    world = Simulation(3, Erratic(np.random.default_rng(4)))
    ends = world.run([run(port, torch.zeros(40, dtype=torch.float64)) for port in world.ports])
    assert [x[0].item() for x in ends] == [3.0, 4.0, 5.0]  # the mean rises by 1 each time


def test_a_machine_that_waits_answers_those_who_ask():
    asked, answers = [], []
    serving = Serving(lambda: bool(asked), lambda: answers.append(asked.pop()))
    world = Simulation(2)

    def slow(port):
        yield pause(port.now(), 1.0)
        asked.append("a swap")
        yield pause(port.now(), 1.0)
        world._wake(0)  # as the message that asks would
        yield pause(port.now(), 1.0)
        return (yield from agree(port, 0, True, deadline_s=DEADLINE_S, serving=Serving()))

    ports = world.ports
    agreed = world.run([agree(ports[0], 0, False, deadline_s=DEADLINE_S, serving=serving), slow(ports[1])])
    assert answers == ["a swap"]
    assert agreed == [Agreed(frozenset({0, 1}), frozenset({1}))] * 2


def test_over_tcp_a_machine_that_leaves_within_a_merge_is_left_out_and_the_bits_are_the_simulation_s():
    vectors = values(4, 200, torch.float32)

    def leave(post):
        yield from agree(post, 5 * 2**16, True, deadline_s=30.0, serving=Serving(), stream=MERGE_STREAM)
        post.close(linger_s=5.0)  # what it has agreed to take part in

    with place_for(4, lost_after_s=600.0) as place:
        posts = place.enter_all()
        scripts = [
            average_all(post, x, 1.0, number=5, deadline_s=30.0) for post, x in zip(posts[1:], vectors[1:], strict=True)
        ]
        _, *merged = run_scripts(posts, [leave(posts[0]), *scripts])
    expected = Simulation(3)
    expected = expected.run(merges(expected, vectors[1:], [1.0] * 3))
    for one in merged:
        assert one.members == {1, 2, 3}
        assert torch.equal(one.value, expected[0].value)


def test_damaged_agreements_are_refused_or_valid(mutations):
    agreed = Agreed(frozenset({0, 3, 9, 10}), frozenset({0, 9}))
    payload = encode(agreed, 11)
    assert decode(payload, 11) == agreed
    for damaged in mutations(payload):
        try:
            found = decode(damaged, 11)
        except PayloadError:
            continue
        assert found.yes <= found.present <= frozenset(range(11))
        assert found.present
