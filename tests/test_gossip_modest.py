"""MoDeST: who is drawn, what a round computes, machines that do not answer, cuts, and mail that is damaged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from gossip_posts import place_for, run_scripts
from gossip_worlds import Always, Late, ring
from pydantic import ValidationError
from torch import Tensor

from thinwire.comm.gossip.agent import Agent
from thinwire.comm.gossip.algorithm import Parts
from thinwire.comm.gossip.algorithms.modest import ModestSettings
from thinwire.comm.gossip.algorithms.modest_machine import ModestMachine
from thinwire.comm.gossip.algorithms.modest_view import View, decode_view, order_of
from thinwire.comm.gossip.port import Port, Script, Wait
from thinwire.comm.gossip.replica import VectorReplica
from thinwire.comm.gossip.simulation import Links, Simulation, pause
from thinwire.comm.gossip.strands import Strands
from thinwire.comm.gossip.turn import Turn
from thinwire.comm.wire import PayloadError

LR = 0.2


class NoExchanges:
    """Schedule of nothing."""

    def turn(self, step: int) -> Turn:
        return Turn(step, step, None)


class World:
    """Machines that draw f_i(x) = |x - b_i|^2 / 2, each step taking so many seconds.

    Attributes: log, (machine, step) of every step taken, in order.
    """

    def __init__(
        self,
        settings: ModestSettings,
        size: int,
        steps: int,
        *,
        links: Links | None = None,
        step_s: Callable[[int], float] = lambda rank: 0.1,
        cut_every: int = 0,
    ) -> None:
        self.settings, self.steps, self.cut_every = settings, steps, cut_every
        self.step_s = step_s
        self.b = torch.randn(size, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        self.simulation = Simulation(size, links or Late(lambda *_: 0.01))
        self.replicas = [VectorReplica(torch.zeros(4, dtype=torch.float64), LR) for _ in range(size)]
        self.machines: list[ModestMachine] = []
        self.agents: list[Agent] = []
        self.log: list[tuple[int, int]] = []
        self.cuts: list[list[Any]] = [[] for _ in range(size)]
        for port in self.simulation.ports:
            machine, agent = self.new_agent(port.rank, port)
            self.machines.append(machine)
            self.agents.append(agent)

    def new_agent(self, rank: int, port: Port) -> tuple[ModestMachine, Agent]:
        replica, graph = self.replicas[rank], Always(ring(len(self.replicas)))
        machine = self.settings.build(Parts(replica, port, graph, 1.0, 0, self.steps))
        agent = Agent(replica, port, machine, NoExchanges(), steps=self.steps, in_rounds=False, deadline_s=30.0)
        agent.cut_every = self.cut_every
        return machine, agent

    def train(self, rank: int) -> Script[None]:
        agent, replica = self.agents[rank], self.replicas[rank]
        while not agent.ended:
            yield pause(self.simulation.now_s, self.step_s(rank))
            self.log.append((rank, agent.step))
            yield from agent.before_step()
            replica.x = replica.x - LR * (replica.x - self.b[rank])
            yield from agent.after_step()
            if agent.cut_due:
                yield from agent.cut()
                self.cuts[rank].append((agent.state_dict(), replica.x.clone()))

    def run(self, *, dead: tuple[int, ...] = ()) -> None:
        size = len(self.agents)
        self.simulation.run([None if rank in dead else self.train(rank) for rank in range(size)])

    @property
    def ends(self) -> Tensor:
        return torch.stack([replica.x for replica in self.replicas])


def test_every_machine_is_drawn_as_often_as_any_other() -> None:
    n, s, rounds = 20, 4, 4000
    drawn = Counter(rank for round in range(rounds) for rank in order_of(7, round, range(n))[:s])
    p = s / n
    sigma = (rounds * p * (1 - p)) ** 0.5
    assert all(abs(drawn[rank] - rounds * p) < 4 * sigma for rank in range(n))
    assert order_of(7, 3, range(n)) == order_of(7, 3, reversed(range(n)))
    assert order_of(8, 3, range(n)) != order_of(7, 3, range(n))


def test_rounds_are_the_mean_of_what_the_drawn_have_trained_from_the_model_of_the_round() -> None:
    settings = ModestSettings(sample=3, aggregators=2, success=1.0, local_steps=5)
    world = World(settings, 8, 40)
    world.run()
    x = torch.zeros(4, dtype=torch.float64)
    for round in range(8):
        trained = []
        for rank in sorted(order_of(0, round, range(8))[:3]):
            y = x
            for _ in range(5):
                y = y - LR * (y - world.b[rank])
            trained.append(y)
        x = torch.stack(trained).sum(0) / 3
    torch.testing.assert_close(world.ends, x.expand(8, 4), rtol=0, atol=1e-14)
    assert all(agent.step == 40 for agent in world.agents)
    assert bool((world.ends == world.ends[0]).all())


def test_only_those_drawn_train_and_their_steps_are_those_of_the_run() -> None:
    settings = ModestSettings(sample=2, aggregators=1, success=1.0, local_steps=4)
    world = World(settings, 6, 24)
    world.run()
    steps = Counter(step for _, step in world.log)
    drawn = {round: order_of(0, round, range(6))[:2] for round in range(6)}
    for round in range(6):
        for step in range(4 * round + 1, 4 * round + 4):  # at the first step of a round others may stand idle
            took = [rank for rank, at in world.log if at == step]
            assert sorted(took) == sorted(drawn[round])
    assert steps[0] == 6  # all find out by one step whether they are drawn
    assert len(world.log) == 6 + 2 * 23


def test_a_model_is_sent_to_few_however_many_machines_there_are() -> None:
    sent = {}
    for n in (8, 32):
        world = World(ModestSettings(sample=3, aggregators=1, success=1.0, local_steps=2), n, 20)
        world.run()
        total = sum(sum(port.sent_bytes.values()) for port in world.simulation.ports)
        final = (n - 1) * (12 * n + 32)
        rounds = total - final
        sent[n] = rounds / 10 - 3 * 12 * n  # without the views
    assert sent[32] <= sent[8] * 1.3


@pytest.mark.parametrize("aggregators", [1, 2])
def test_eighty_percent_may_fall_silent(aggregators: int) -> None:
    """Nobody is told that they are gone: they just do not answer."""
    settings = ModestSettings(
        sample=4, aggregators=aggregators, success=0.5, local_steps=3, ping_s=1.0, aggregate_s=5.0
    )
    world = World(settings, 20, 60)
    silent = list(np.random.default_rng(5).permutation(20)[:16])

    def fall_silent() -> None:
        for rank in silent:
            world.simulation.kill(int(rank), noticed_after_s=1e6)

    world.simulation.at(2.0, fall_silent)
    world.run()
    alive = [rank for rank in range(20) if rank not in silent]
    ends = world.ends[alive]
    assert all(world.agents[rank].step == 60 and world.agents[rank].ended for rank in alive)
    assert bool((ends == ends[0]).all())
    # They have gone to the middle of those who are left.
    assert float((ends[0] - world.b[alive].mean(0)).norm()) < float(world.b[alive].mean(0).norm())
    assert world.simulation.now_s < 1e6


def test_when_all_of_a_round_die_the_newest_model_goes_on() -> None:
    settings = ModestSettings(sample=2, aggregators=1, success=1.0, local_steps=5, ping_s=1.0, aggregate_s=3.0)
    world = World(settings, 6, 50)
    drawn = set(order_of(0, 2, range(6))[:2])

    def die() -> None:
        for rank in drawn:
            world.simulation.kill(rank)

    world.simulation.at(1.45, die)  # within round 2, which lasts from 1.1 to 1.7
    world.run()
    alive = [rank for rank in range(6) if rank not in drawn]
    assert sum(world.machines[rank].metrics()["rescued"] for rank in alive) >= 1
    assert all(world.agents[rank].ended for rank in alive)
    assert bool((world.ends[alive] == world.ends[alive[0]]).all())


def step_s(slow: float, rank: int) -> float:
    return slow if rank == 3 else 0.1


def test_a_straggler_delays_nobody_and_ends_with_the_same_weights() -> None:
    settings = ModestSettings(sample=4, aggregators=1, success=0.5, local_steps=5, ping_s=20.0)
    times = {}
    for slow in (0.1, 3.0):
        world = World(settings, 8, 60, step_s=partial(step_s, slow))
        world.run()
        times[slow] = world.simulation.now_s
        assert bool((world.ends == world.ends[0]).all())
    assert times[3.0] < 5 * times[0.1] + 6


@pytest.mark.parametrize("cut", [1, 2])
def test_a_run_resumed_from_a_cut_is_the_run_that_went_on(cut: int) -> None:
    settings = ModestSettings(sample=3, aggregators=2, success=1.0, local_steps=4)
    first = World(settings, 7, 48, cut_every=10)
    first.run()
    assert len(first.cuts[0]) > cut
    second = World(settings, 7, 48, cut_every=10)
    for rank in range(7):
        second.agents[rank].load_state_dict(first.cuts[rank][cut - 1][0])
    second.run()
    assert torch.equal(first.ends, second.ends)


def test_over_tcp_it_gives_the_bits_of_the_simulation() -> None:
    settings, graph = ModestSettings(sample=2, aggregators=2, success=1.0, local_steps=3), Always(ring(4))
    b = torch.randn(4, 30, generator=torch.Generator().manual_seed(3))

    def train(port: Port, replica: VectorReplica) -> Script[None]:
        machine = settings.build(Parts(replica, port, graph, 1.0, 0, 18))
        agent = Agent(replica, port, machine, NoExchanges(), steps=18, in_rounds=False, deadline_s=30.0)
        while not agent.ended:
            replica.x = replica.x - 0.1 * (replica.x - b[port.rank])
            yield from agent.after_step()

    def ends(ports: Sequence[Any], run: Callable[[list[Script[None]]], object]) -> Tensor:
        replicas = [VectorReplica(torch.zeros(30)) for _ in ports]
        run([train(port, replica) for port, replica in zip(ports, replicas, strict=True)])
        return torch.stack([replica.x for replica in replicas])

    simulation = Simulation(4)
    with place_for(4) as place:
        posts = place.enter_all()
        over_tcp = ends(posts, lambda scripts: run_scripts(posts, scripts))
    assert torch.equal(over_tcp, ends(simulation.ports, simulation.run))
    assert bool((over_tcp == over_tcp[0]).all())


def test_one_machine_alone_trains_as_if_there_were_no_gossip() -> None:
    world = World(ModestSettings(sample=1, aggregators=1, local_steps=4), 1, 10)
    world.run()
    x = torch.zeros(4, dtype=torch.float64)
    for _ in range(10):
        x = x - LR * (x - world.b[0])
    assert torch.equal(world.ends[0], x)
    assert [step for _, step in world.log] == list(range(10))


def test_views_merge_by_what_is_newer() -> None:
    a, b = View(4), View(4)
    a.saw(1, 9)
    b.saw(2, 60)
    b.leave(3)
    a.merge(b)
    assert a.members(59, 50) == [1, 2]
    assert a.members(50, 50) == [0, 1, 2]
    a.join(3)
    a.merge(b)
    assert a.members(50, 50) == [0, 1, 2, 3]
    copy = decode_view(a.encode(), 4)
    assert (copy.active == a.active).all()
    assert (copy.changes == a.changes).all()


def test_a_machine_that_comes_back_is_drawn_again_and_ends_with_the_others() -> None:
    settings = ModestSettings(sample=2, aggregators=2, success=0.5, local_steps=2, ping_s=1.0, aggregate_s=3.0)
    world = World(settings, 6, 120)

    def come_back() -> None:
        port = world.simulation.revive(4)
        world.replicas[4] = VectorReplica(torch.zeros(4, dtype=torch.float64), LR)
        world.machines[4], world.agents[4] = world.new_agent(4, port)
        world.simulation.start(4, entered())

    def entered() -> Script[None]:
        yield from world.agents[4].enter()
        entries.append(len(world.log))
        yield from world.train(4)

    entries: list[int] = []
    world.simulation.at(1.0, partial(world.simulation.kill, 4))
    world.simulation.at(4.0, come_back)
    world.run()
    later = [step for rank, step in world.log[entries[0] :] if rank == 4]
    assert len(later) > 4
    assert min(later) > 0
    assert bool((world.ends == world.ends[0]).all())


def test_who_leaves_is_drawn_no_more() -> None:
    world = World(ModestSettings(sample=2, aggregators=1, local_steps=2), 6, 80)
    world.simulation.at(0.35, world.machines[4].leave)
    world.run()
    steps = [step for rank, step in world.log if rank == 4]
    assert all(step < 10 for step in steps)
    assert bool((world.ends == world.ends[0]).all())


def test_damaged_mail_is_refused_or_read(mutations: Callable[[Tensor], Iterator[Tensor]]) -> None:
    view = View(5)
    view.saw(2, 7)
    for payload in mutations(view.encode()):
        try:
            decoded = decode_view(payload, 5)
        except PayloadError:
            continue
        assert decoded.active.min() >= -1
        assert decoded.encode().shape == (60,)


@pytest.mark.parametrize(
    ("given", "words"),
    [({"sample": 2, "aggregators": 3}, "aggregators: 3"), ({"success": 0}, "success"), ({"samples": 2}, "Extra")],
)
def test_what_cannot_be_used_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ModestSettings(**given)
    with pytest.raises(ValueError, match=r"method\.algorithm\.sample: 9 of 4 machines"):
        World(ModestSettings(sample=9), 4, 10)


def test_strands_go_on_side_by_side() -> None:
    strands, said = Strands(), list[str]()
    doors = {"a": False, "b": False}

    def wait_for(door: str) -> Script[None]:
        yield Wait(lambda: doors[door], 10.0)
        said.append(door)
        doors["a"] = True

    strands.add(wait_for("a"))
    strands.add(wait_for("b"))
    strands.advance(0.0)
    assert said == []
    assert strands.until == 10.0
    doors["b"] = True
    assert strands.is_ready()
    strands.advance(0.0)
    assert said == ["b", "a"]
    strands.add(wait_for("b"))
    strands.cancel()
    strands.advance(20.0)
    assert said == ["b", "a"]
