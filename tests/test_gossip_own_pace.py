"""Pairs that exchange at their own pace: the mean, nobody waits, nothing deadlocks, dead machines, cuts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from gossip_worlds import Always, Late, mixing_of, ring
from torch import Tensor

from thinwire.comm.gossip.agent import Agent
from thinwire.comm.gossip.algorithm import Parts
from thinwire.comm.gossip.algorithms.acid import A2CiD2Settings
from thinwire.comm.gossip.algorithms.ad_psgd import ADPSGDSettings
from thinwire.comm.gossip.algorithms.own_pace import OwnPace
from thinwire.comm.gossip.barrier import barrier
from thinwire.comm.gossip.codec import Plain
from thinwire.comm.gossip.join import answer_joins, enter
from thinwire.comm.gossip.message import Kind, Message
from thinwire.comm.gossip.mixing import Graph
from thinwire.comm.gossip.port import Script
from thinwire.comm.gossip.replica import VectorReplica
from thinwire.comm.gossip.simulation import Links, Simulation, pause
from thinwire.comm.gossip.swaps import Swaps
from thinwire.comm.gossip.turn import Turn
from thinwire.comm.wire import PayloadError

SIZE = 8
KINDS = [ADPSGDSettings(), A2CiD2Settings()]
LATE = Late(lambda source, to, count: 0.1 + 0.7 * (source + 2 * to + count) % 2.3)


class World:
    """Machines that step, each at its own pace, and exchange.

    Args: pace_s, seconds of a machine's step. masses: by machine.
    Attributes: replicas; algorithms; updates, sum of m_i times the steps that machines have taken.
    """

    def __init__(
        self,
        settings: Any,
        graph: Graph,
        links: Links | None = None,
        *,
        pace_s: Callable[[int], float] = lambda rank: 1.0,
        masses: Sequence[float] | None = None,
        deadline_s: float = 100.0,
    ) -> None:
        draw = torch.Generator().manual_seed(1)
        self.graph, self.pace_s = graph, pace_s
        self.simulation = Simulation(graph.size, links)
        self.replicas = [
            VectorReplica(torch.randn(SIZE, generator=draw, dtype=torch.float64)) for _ in range(graph.size)
        ]
        self.updates = torch.zeros(SIZE, dtype=torch.float64)
        self.algorithms: list[OwnPace] = [
            settings.build(Parts(replica, port, graph, deadline_s, seed=3))
            for replica, port in zip(self.replicas, self.simulation.ports, strict=True)
        ]
        if masses is not None:
            for algorithm, mass in zip(self.algorithms, masses, strict=True):
                algorithm.load_state_dict({**algorithm.state_dict(), "mass": mass})
        self.start = self.total()

    def total(self, ranks: Sequence[int] | None = None) -> Tensor:
        """The sum of m x; of A2CiD2, of m (x + y) / 2."""
        total = torch.zeros(SIZE, dtype=torch.float64)
        for rank in ranks if ranks is not None else range(self.graph.size):
            algorithm = self.algorithms[rank]
            value = algorithm.averaged() if hasattr(algorithm, "averaged") else self.replicas[rank].x
            total += algorithm.mass * value
        return total

    def error(self) -> float:
        return float((self.total() - self.start - self.updates).abs().max() / self.start.abs().max())

    def step(self, rank: int, number: int) -> Script[None]:
        algorithm, replica = self.algorithms[rank], self.replicas[rank]
        yield pause(self.simulation.now_s, self.pace_s(rank))
        turn = Turn(number, number, self.graph.mixing(number))
        yield from algorithm.before_step(turn)
        update = 0.1 * torch.randn(
            SIZE, generator=torch.Generator().manual_seed(1000 * rank + number), dtype=torch.float64
        )
        replica.x = replica.x + update
        self.updates += algorithm.mass * update
        yield from algorithm.after_step(turn)

    def steps(self, rank: int, numbers: range, *, drain: bool = True) -> Script[None]:
        for number in numbers:
            yield from self.step(rank, number)
        if drain:
            yield from self.cut(rank, numbers.stop)

    def cut(self, rank: int, number: int) -> Script[None]:
        algorithm = self.algorithms[rank]
        yield from algorithm.drain()
        port = self.simulation.ports[rank]
        yield from barrier(port, number, deadline_s=1000.0, asked=algorithm.asked, serve=algorithm.serve)
        yield from algorithm.drain()

    def run(self, script: Callable[[int], Script[None]]) -> None:
        alive = [port.alive for port in self.simulation.ports]
        self.simulation.run([script(rank) if alive[rank] else None for rank in range(self.graph.size)])


@pytest.mark.parametrize("settings", [*KINDS, ADPSGDSettings(wire="bf16"), A2CiD2Settings(rate=3.0, asks=4)])
@pytest.mark.parametrize("masses", [None, [1.0, 0.5, 0.5, 1.0, 0.25, 2.0]])
def test_the_mean_is_exact_whatever_is_late(settings: Any, masses: Sequence[float] | None) -> None:
    world = World(
        settings, Always(ring(6)), LATE, pace_s=lambda rank: [1.0, 0.3, 1.7, 0.9, 10.0, 1.1][rank], masses=masses
    )
    world.run(lambda rank: world.steps(rank, range(int(40 / world.pace_s(rank)))))
    assert world.error() < 1e-14
    assert sum(algorithm.metrics()["swaps"] for algorithm in world.algorithms) > 100
    assert not any(algorithm.asked() for algorithm in world.algorithms)
    for algorithm, port in zip(world.algorithms, world.simulation.ports, strict=True):
        for to, count in algorithm._swaps.sent_bytes.items():
            assert count == port.sent[to, Kind.SWAP_ASK] + port.sent[to, Kind.SWAP_ANSWER]


def test_two_that_have_not_moved_become_the_same_to_the_bit() -> None:
    world = World(ADPSGDSettings(), Always(mixing_of(2, [(0, 1)], 0.5)), masses=[1.0, 0.3])
    mean = (world.replicas[0].x + 0.3 * world.replicas[1].x) / 1.3
    turn = Turn(0, 0, world.graph.mixing(0))

    def script(rank: int) -> Script[None]:
        if rank == 0:
            yield from world.algorithms[0].after_step(turn)
        yield from world.cut(rank, 1)

    world.run(script)
    assert torch.equal(world.replicas[0].x, world.replicas[1].x)
    torch.testing.assert_close(world.replicas[0].x, mean, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("settings", KINDS)
def test_a_straggler_keeps_nobody_waiting(settings: Any) -> None:
    world = World(settings, Always(ring(5)), pace_s=lambda rank: 10.0 if rank == 2 else 1.0)
    ended: dict[int, float] = {}

    def script(rank: int) -> Script[None]:
        yield from world.steps(rank, range(3 if rank == 2 else 30), drain=False)
        ended[rank] = world.simulation.now_s

    world.run(script)
    assert set(ended.values()) == {30.0}
    swaps = [algorithm.metrics()["swaps"] for algorithm in world.algorithms]
    assert min(swaps[0], swaps[4]) > 15  # those who do not know it
    assert min(swaps[1], swaps[3]) > 10  # its neighbours


def ask(world: World, rank: int, other: int) -> None:
    """Begin an exchange, whatever chance says."""
    world.algorithms[rank]._swaps.ask(other, world.replicas[rank].x)


@pytest.mark.parametrize("settings", KINDS)
@pytest.mark.parametrize("asks", [[(0, 1), (1, 0)], [(0, 1), (1, 2), (2, 3)], [(0, 1), (1, 2), (2, 3), (3, 0)]])
@pytest.mark.parametrize("first", [0, 3])
def test_waiting_for_answers_never_deadlocks(settings: Any, asks: list[tuple[int, int]], first: int) -> None:
    world = World(settings, Always(ring(4)), Late(lambda source, to, count: 0.5))

    def script(rank: int) -> Script[None]:
        for asker, other in asks:
            if asker == rank:
                ask(world, asker, other)
        if rank == first:  # comes to the barrier while the others still wait for its answer
            yield pause(0.0, 7.0)
        yield from world.cut(rank, 1)

    world.run(script)
    assert world.simulation.now_s < 12.0  # and not by a deadline of 100 s
    assert world.error() < 1e-15
    assert sum(algorithm.metrics()["swaps"] for algorithm in world.algorithms) == 2 * len(asks)


@pytest.mark.parametrize("settings", KINDS)
def test_dead_machines_cost_their_share(settings: Any) -> None:
    world = World(settings, Always(ring(4)), Late(lambda source, to, count: 0.5))
    others = [0, 2, 3]
    before = world.total(others)

    def script(rank: int) -> Script[None]:
        if rank == 0:
            ask(world, 0, 1)  # it dies before it answers
        if rank == 1:
            ask(world, 1, 2)  # nobody answers the dead
            yield pause(0.0, 100.0)
        yield pause(world.simulation.now_s, 2.0 if rank == 2 else 1.5)
        yield from world.cut(rank, 1)

    world.simulation.at(0.7, lambda: world.simulation.kill(1))
    world.run(script)
    assert world.simulation.now_s < 10.0
    torch.testing.assert_close(world.total(others), before, rtol=0, atol=1e-15)
    # Those alive go on without it.
    world.run(lambda rank: world.steps(rank, range(20)))
    torch.testing.assert_close(world.total(others), before + world.updates, rtol=0, atol=1e-14)


def test_who_was_asked_and_came_back_as_another_is_asked_again() -> None:
    simulation = Simulation(2)
    swaps = Swaps(simulation.ports[0], Plain(), asks=1, deadline_s=1.0)
    value = torch.ones(SIZE, dtype=torch.float64)
    swaps.ask(1, value)
    simulation.ports[0].inbox.put(1, Message(Kind.SWAP_ANSWER, 7, 1.0))
    assert swaps.take_answer(value) is None  # to an ask of long ago
    assert swaps.can_ask([1]) == []
    simulation.kill(1)
    simulation.revive(1)
    assert swaps.can_ask([1]) == [1]
    assert not swaps.under_way()


def test_overdue_asks_leave_room_for_others_and_still_count() -> None:
    world = World(ADPSGDSettings(asks=1), Always(ring(4)), deadline_s=2.0)
    swaps = world.algorithms[0]._swaps

    def script(rank: int) -> Script[None]:
        if rank == 0:
            ask(world, 0, 1)
            assert swaps.can_ask([1, 3]) == []
            yield pause(0.0, 3.0)
            assert swaps.can_ask([1, 3]) == [3]
            yield from world.algorithms[0].drain()  # ends at its deadline
            assert world.simulation.now_s == 5.0
            assert swaps.under_way()
        yield pause(world.simulation.now_s, 10.0)
        yield from world.cut(rank, 1)

    world.run(script)
    assert world.error() < 1e-15
    assert swaps.made == 1


@pytest.mark.parametrize("settings", KINDS)
def test_a_resumed_run_goes_on_bit_for_bit(settings: Any) -> None:
    def world() -> World:
        return World(settings, Always(ring(5)), Late(lambda *_: 0.25), pace_s=lambda rank: 1.0 + rank / 8)

    going_on, resumed = world(), world()
    going_on.run(lambda rank: going_on.steps(rank, range(10)))
    resumed.simulation.now_s = going_on.simulation.now_s
    for rank, algorithm in enumerate(resumed.algorithms):
        resumed.replicas[rank].x = going_on.replicas[rank].x.clone()
        algorithm.load_state_dict(going_on.algorithms[rank].state_dict())
    for each in (going_on, resumed):
        each.run(lambda rank, each=each: each.steps(rank, range(10, 25)))  # type: ignore[misc]
    for a, b in zip(going_on.replicas, resumed.replicas, strict=True):
        assert torch.equal(a.x, b.x)


@pytest.mark.parametrize("settings", KINDS)
def test_a_run_ends_with_the_first_and_merges_to_the_exact_mean(settings: Any) -> None:
    class Ending:
        def turn(self, step: int) -> Turn:
            return Turn(step, step, world.graph.mixing(step), merge=step == 29)

    world = World(settings, Always(ring(5)), LATE, pace_s=lambda rank: 10.0 if rank == 2 else 1.0)
    steps: dict[int, int] = {}

    def script(rank: int) -> Script[None]:
        agent = Agent(
            world.replicas[rank],
            world.simulation.ports[rank],
            world.algorithms[rank],
            Ending(),
            steps=30,
            in_rounds=False,
        )
        while not agent.ended:
            yield pause(world.simulation.now_s, world.pace_s(rank))
            yield from agent.before_step()
            update = torch.full((SIZE,), 0.1 * rank, dtype=torch.float64)
            world.replicas[rank].x = world.replicas[rank].x + update
            world.updates += update
            yield from agent.after_step()
        steps[rank] = agent.step

    world.run(script)
    assert max(steps.values()) == 30
    assert steps[2] in (3, 4)
    assert world.simulation.now_s < 60.0
    for replica in world.replicas:
        assert torch.equal(replica.x, world.replicas[0].x)
    assert world.error() < 1e-14


def test_a_machine_enters_with_half_the_mass_of_another() -> None:
    world = World(ADPSGDSettings(), Always(ring(4)), Late(lambda *_: 0.3))
    world.run(lambda rank: world.steps(rank, range(5)))
    world.simulation.kill(2)
    others = [0, 1, 3]
    before, world.updates = world.total(others), torch.zeros_like(world.updates)
    port, graph = world.simulation.revive(2), world.graph
    world.replicas[2] = VectorReplica(torch.zeros(SIZE, dtype=torch.float64))
    world.algorithms[2] = ADPSGDSettings().build(Parts(world.replicas[2], port, graph, 100.0, seed=3))

    def script(rank: int) -> Script[None]:
        if rank == 2:
            entry = yield from enter(port, world.replicas[2], world.algorithms[2], deadline_s=50.0)
            assert entry.mass == 0.5
        for number in range(5, 15):
            yield from world.step(rank, number)
            ports = world.simulation.ports
            yield from answer_joins(ports[rank], world.replicas[rank], world.algorithms[rank], step=number, meeting=0)
        yield from world.cut(rank, 15)

    world.run(script)
    assert sum(algorithm.mass for algorithm in world.algorithms) == 3.0
    torch.testing.assert_close(world.total(), before + world.updates, rtol=0, atol=1e-13)


def test_refuses_masses_and_payloads_that_cannot_be(mutations: Callable[[Tensor], Iterator[Tensor]]) -> None:
    simulation = Simulation(2)
    swaps = Swaps(simulation.ports[0], Plain(), asks=1, deadline_s=1.0)
    value = torch.ones(SIZE, dtype=torch.float64)
    payload = Plain().encode(0, value)[0]
    simulation.ports[0].inbox.put(1, Message(Kind.SWAP_ASK, 0, 0.0, payload=payload))
    with pytest.raises(PayloadError, match=r"whose mass is 0.0; it must be above 0"):
        swaps.answer(value)
    for damaged in mutations(payload):
        simulation.ports[0].inbox.put(1, Message(Kind.SWAP_ASK, 0, 1.0, payload=damaged))
        if len(damaged) == len(payload):
            assert swaps.answer(value) is not None
        else:
            with pytest.raises(PayloadError, match="bytes, not"):
                swaps.answer(value)
    assert math.isclose(swaps.mass, 1.0)
