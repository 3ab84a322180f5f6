"""Machines die and others enter: what is preserved is exactly what those that live hold, by mass."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from gossip_posts import Place, place_for, run_together
from gossip_worlds import Always, ring
from torch import Tensor

from thinwire.comm.errors import PeerLostError
from thinwire.comm.gossip.agent import Agent
from thinwire.comm.gossip.algorithm import Parts
from thinwire.comm.gossip.algorithms.dpsgd import DPSGDSettings
from thinwire.comm.gossip.join import Entry, answer_joins, enter
from thinwire.comm.gossip.message import Kind, Message
from thinwire.comm.gossip.mixing import Mixing
from thinwire.comm.gossip.port import Port, Script, Wait
from thinwire.comm.gossip.post.post import Post, drive
from thinwire.comm.gossip.replica import VectorReplica
from thinwire.comm.gossip.simulation import Simulation
from thinwire.comm.gossip.turn import Turn
from thinwire.comm.wire import PayloadError

NUMEL = 1000


class EveryStep:
    """Schedule: an exchange after every step."""

    def __init__(self, mixing: Mixing) -> None:
        self._mixing = mixing

    def turn(self, step: int) -> Turn:
        return Turn(step, step, self._mixing)


def machine(port: Port, *, overlap: bool, deadline_s: float = 30.0, numel: int = NUMEL) -> tuple[Agent, VectorReplica]:
    values = torch.arange(numel, dtype=torch.float64)
    replica = VectorReplica(values.mul_(port.rank + 1).cos_().mul_(10.0 ** (port.rank - 1)))
    graph = Always(ring(port.size))
    algorithm = DPSGDSettings(overlap=overlap).build(Parts(replica, port, graph, deadline_s, seed=0))
    return Agent(replica, port, algorithm, EveryStep(graph.mixing(0)), steps=40, deadline_s=deadline_s), replica


def share_of(agent: Agent) -> tuple[float, Tensor]:
    """(m, m z) of a machine."""
    mass = agent.algorithm.mass
    return mass, mass * agent.replica.weights()


@pytest.mark.parametrize("overlap", [False, True])
def test_the_mean_by_mass_survives_cuts_a_killed_machine_and_one_that_enters_in_its_place(overlap: bool) -> None:
    """Four machines with sockets. After the death no local steps: sum m z must stay what the three others hold."""
    dead = threading.Event()

    def live(post: Post) -> tuple[Tensor, float, Tensor]:
        agent, replica = machine(post, overlap=overlap)
        before = replica.weights()
        for step in range(5):
            drive(agent.after_step(), post)
            if step == 2:
                post.hang_up((post.rank + 1) % 4)
        while not agent.ended:
            if agent.step % 4 == 0:
                post.hang_up((post.rank + 1) % 4)
            if agent.step == 10 and post.rank == 3 and agent.algorithm.mass == 1.0:  # the first that is asked
                drive(until(post, lambda: bool(post.waiting(Kind.JOIN_ASK))), post)
            drive(agent.after_step(), post)
        drive(agent.cut(), post)
        return before, *share_of(agent)

    def die_and_be_replaced(place: Place, post: Post) -> tuple[Tensor, Tensor, Entry, float, Tensor]:
        agent, replica = machine(post, overlap=overlap)
        before = replica.weights()
        for _ in range(5):
            drive(agent.after_step(), post)
        drive(agent.algorithm.drain(), post)
        # Round 5 of both neighbours: they have all that this machine has sent.
        drive(until(post, lambda: min(post.newest(1, Kind.VALUE), post.newest(3, Kind.VALUE)) >= 5), post)
        left = replica.weights()
        post.close(farewell=False)
        dead.set()
        post = place.enter(2)
        post.wait_for_others(3, 30.0)
        agent, _ = machine(post, overlap=overlap)
        entry = drive(agent.enter(), post)
        while not agent.ended:
            drive(agent.after_step(), post)
        drive(agent.cut(), post)
        return before, left, entry, *share_of(agent)

    # Nobody is lost by silence, however slow this machine is: the dead one is when another comes in its place.
    with place_for(4, lost_after_s=600.0) as place:
        posts = place.enter_all()
        works: list[Callable[[], object]] = [lambda post=post: live(post) for post in posts]  # type: ignore[misc]
        works[2] = lambda: die_and_be_replaced(place, posts[2])
        outcomes = run_together(works)
    assert dead.is_set()
    before, left, entry, mass, moment = outcomes[2]  # type: ignore[misc]
    assert entry.mass == 0.5
    assert entry.donor == 3
    total = sum(outcomes[r][0] for r in (0, 1, 3)) + before - left  # type: ignore[index]
    masses = [outcomes[r][1] for r in (0, 1, 3)] + [mass]  # type: ignore[index]
    moments = sum(outcomes[r][2] for r in (0, 1, 3)) + moment  # type: ignore[index]
    assert sum(masses) == pytest.approx(3.0, rel=1e-12)
    assert 0.5 < mass < 0.9  # half a machine at first, and gossip evens it out
    assert (moments - total).norm() <= 1e-12 * total.norm()


def until(port: Port, ready: Callable[[], bool]) -> Script[None]:
    yield Wait(ready, port.now() + 30.0)
    assert ready(), "not within 30 s"


def test_a_machine_enters_a_simulated_run_too_and_the_sum_by_mass_stays() -> None:
    simulation = Simulation(3)
    agents = [machine(port, overlap=True, deadline_s=1.0)[0] for port in simulation.ports]

    def some_steps(agent: Agent, count: int) -> Script[None]:
        for _ in range(count):
            yield Wait(lambda: False, agent.port.now() + 0.1)
            yield from agent.after_step()

    simulation.run([some_steps(agent, 4) for agent in agents])
    simulation.run([agent.algorithm.drain() for agent in agents])
    simulation.kill(1)
    total = share_of(agents[0])[1] + share_of(agents[2])[1]
    new, _ = machine(simulation.revive(1), overlap=True, deadline_s=1.0)

    def come() -> Script[None]:
        yield Wait(lambda: False, new.port.now() + 0.35)
        entry = yield from new.enter()
        assert entry.donor == 2
        assert new.step >= entry.step
        yield from some_steps(new, 6)

    simulation.run([some_steps(agents[0], 12), come(), some_steps(agents[2], 12)])
    simulation.run([agent.algorithm.drain() for agent in (agents[0], new, agents[2])])
    shares = [share_of(agent) for agent in (agents[0], new, agents[2])]
    assert sum(mass for mass, _ in shares) == pytest.approx(2.0, rel=1e-12)
    assert (sum(moment for _, moment in shares) - total).norm() <= 1e-12 * total.norm()


def test_two_donors_that_both_answer_are_both_taken() -> None:
    simulation = Simulation(3)
    agents = [machine(port, overlap=False)[0] for port in simulation.ports]
    total = sum(share_of(agents[rank])[1] for rank in (1, 2))
    request = torch.frombuffer(bytearray(struct.pack("<QI", NUMEL, 8)), dtype=torch.uint8)

    def newcomer() -> Script[Entry]:
        simulation.ports[0].send(2, Message(Kind.JOIN_ASK, 0, payload=request))  # as if it had not answered in time
        entry = yield from agents[0].enter()
        yield Wait(lambda: bool(simulation.ports[0].waiting(Kind.JOIN_ANSWER)), 1.0)
        yield from answer_joins(simulation.ports[0], agents[0].replica, agents[0].algorithm, step=0, meeting=0)
        return entry

    def donor(rank: int) -> Script[int]:
        yield Wait(lambda: bool(simulation.ports[rank].waiting(Kind.JOIN_ASK)), 1.0)
        agent = agents[rank]
        return (yield from answer_joins(agent.port, agent.replica, agent.algorithm, step=7, meeting=3))

    entry, *given = simulation.run([newcomer(), donor(1), donor(2)])
    assert given == [1, 1]
    assert (entry.step, entry.meeting, entry.mass) == (7, 3, 0.5)
    assert [agent.algorithm.mass for agent in agents] == [1.0, 0.5, 0.5]
    moments = sum(share_of(agent)[1] for agent in agents)
    assert (moments - total).norm() <= 1e-14 * total.norm()


def ask(simulation: Simulation, numel: int, joinable: bool) -> None:
    newcomer, _ = machine(simulation.ports[0], overlap=False, deadline_s=1.0, numel=numel)
    donor, _ = machine(simulation.ports[1], overlap=False)

    def answer() -> Script[int]:
        yield Wait(lambda: bool(donor.port.waiting(Kind.JOIN_ASK)), 1.0)
        args = donor.port, donor.replica, donor.algorithm
        return (yield from answer_joins(*args, step=0, meeting=0, joinable=joinable))

    simulation.run([newcomer.enter(), answer(), None])


def test_machines_that_do_not_fit_are_told_why() -> None:
    with pytest.raises(
        ValueError, match="machine 1 does not let this one enter: its model has 999 elements of 8 bytes"
    ):
        ask(Simulation(3), 999, True)
    with pytest.raises(ValueError, match="keeps sums besides the weights"):
        ask(Simulation(3), NUMEL, False)
    simulation = Simulation(3)
    newcomer, _ = machine(simulation.ports[0], overlap=False, deadline_s=1.0)
    with pytest.raises(PeerLostError, match="is the run under way"):
        simulation.run([newcomer.enter(), None, None])


def test_damaged_requests_and_shares_are_errors(mutations: Callable[[Tensor], Iterator[Tensor]]) -> None:
    simulation = Simulation(2)
    agent, replica = machine(simulation.ports[0], overlap=False, numel=4)
    intact = torch.cat([torch.zeros(8, dtype=torch.uint8), torch.arange(4, dtype=torch.float64).view(torch.uint8)])

    class OneMessage(SimpleNamespace):
        """A port at which one message waits."""

        def waiting(self, kind: Kind) -> list[int]:
            return [1] if self.message is not None and self.message.kind == kind else []

        def peek(self, source: int, kind: Kind) -> Message | None:
            return self.message

        def take(self, source: int, kind: Kind) -> Message:
            message, self.message = self.message, None
            return message

    options = {"rank": 0, "size": 2, "lost": frozenset, "now": lambda: 0.0, "send": lambda *_: None}
    for payload in [*mutations(intact), intact]:
        port = OneMessage(message=Message(Kind.JOIN_ANSWER, 5, 0.25, payload=payload), **options)
        script = enter(port, replica, agent.algorithm, deadline_s=0.0)  # type: ignore[arg-type]
        if len(payload) == len(intact):
            next(script)
            with pytest.raises(StopIteration) as ended:
                next(script)
            assert ended.value.value.step == 5
        else:
            next(script)
            with pytest.raises(PayloadError, match="a share of"):
                next(script)
    for mass in (0.0, -1.0, 1e30):
        port = OneMessage(message=Message(Kind.JOIN_ANSWER, 5, mass, payload=intact), **options)
        script = enter(port, replica, agent.algorithm, deadline_s=0.0)  # type: ignore[arg-type]
        next(script)
        with pytest.raises(PayloadError, match="mass"):
            next(script)
    port = OneMessage(message=Message(Kind.JOIN_ASK, 0, payload=intact), **options)
    with pytest.raises(PayloadError, match="a request to enter"):
        next(answer_joins(port, replica, agent.algorithm, step=0, meeting=0))  # type: ignore[arg-type]
