"""Push-sum on directed graphs: the mean through lateness, loss, death and return, against matrices in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import pytest
import torch
from gossip_digraphs import digraph, one_peer
from torch import Tensor

from thinwire.comm.errors import OwnWeightsError
from thinwire.comm.gossip.codec import Plain
from thinwire.comm.gossip.message import Kind, Message
from thinwire.comm.gossip.mixing import Mixing
from thinwire.comm.gossip.port import Script
from thinwire.comm.gossip.push_counters import HealingPushMixer
from thinwire.comm.gossip.push_sum import PushMixer
from thinwire.comm.gossip.simulation import Links, Simulation, pause
from thinwire.comm.wire import PayloadError

SIZE = 16  # elements of a vector


class Jitter:
    """Links whose messages take between 0 and `most_s`, and are lost with a probability."""

    def __init__(self, most_s: float, loss: float = 0.0, seed: int = 0) -> None:
        self._most_s = most_s
        self.loss = loss
        self._chance = np.random.default_rng(seed)

    def arrival_s(self, source: int, to: int, payload_bytes: int, now_s: float) -> float | None:
        late, lost = self._chance.random(2)
        return None if lost < self.loss else now_s + self._most_s * float(late)


class World:
    """Machines that mix their vectors, each round after a local step and a pause.

    Attributes: values, z by machine; mixers.
    """

    def __init__(
        self,
        n: int,
        graph: Callable[[int], Mixing],
        links: Links | None = None,
        *,
        heal: bool = False,
        deadline_s: float = 0.3,
    ) -> None:
        draw = torch.Generator().manual_seed(n)
        self.values = list(torch.randn(n, SIZE, generator=draw, dtype=torch.float64))
        self.start = torch.stack(self.values).mean(0)
        self.simulation = Simulation(n, links)
        self._deadline_s, self._heal, self._graph = deadline_s, heal, graph
        self.mixers = [self.mixer(rank) for rank in range(n)]
        self.stepped = torch.zeros(SIZE, dtype=torch.float64)  # sum of m_i times the local steps

    def mixer(self, rank: int) -> PushMixer:
        """A new one."""
        port = self.simulation.ports[rank]
        if self._heal:
            return HealingPushMixer(port, deadline_s=self._deadline_s)
        return PushMixer(port, Plain(), deadline_s=self._deadline_s)

    def script(self, rank: int, rounds: range, pause_s: float = 1.0, step: float = 0.0) -> Script[None]:
        mixer, chance = self.mixers[rank], torch.Generator().manual_seed(rank)
        for round in rounds:
            sent = mixer.begin(round, self._graph(round), self.values[rank])
            if step:  # while parcels are under way
                moved = step * torch.randn(SIZE, generator=chance, dtype=torch.float64)
                self.values[rank] = self.values[rank] + moved
                self.stepped += mixer.mass * moved
            yield pause(self.simulation.now_s, pause_s)
            mixed = yield from mixer.finish()
            self.values[rank] = mixed.onto(self.values[rank] if step else sent)

    def settle(self, rank: int) -> Script[None]:
        yield pause(self.simulation.now_s, 10.0)  # as behind a barrier: nothing is on the wire
        if (late := (yield from self.mixers[rank].settle())) is not None:
            self.values[rank] = late.onto(self.values[rank])

    def run(self, scripts: Iterable[Script[None] | None]) -> None:
        self.simulation.run(list(scripts))

    def mixed(self, rounds: range, **how: float) -> World:
        """Run these rounds, and settle."""
        self.run(self.script(rank, rounds, **how) for rank in range(len(self.values)))
        self.run(self.settle(rank) for rank in range(len(self.values)))
        return self

    def mass(self, ranks: Sequence[int] | None = None) -> float:
        return sum(self.mixers[rank].mass for rank in ranks or range(len(self.values)))

    def numerator(self, ranks: Sequence[int] | None = None) -> Tensor:
        ranks = ranks or range(len(self.values))
        return torch.stack([self.mixers[rank].mass * self.values[rank] for rank in ranks]).sum(0)

    def error(self) -> float:
        """Of the weighted mean, relative to the size of the values."""
        n = len(self.values)
        return float((self.numerator() / n - self.start - self.stepped / n).abs().max() / self.numerator().abs().max())


def test_ratio_of_value_and_mass_finds_the_mean_where_the_value_alone_does_not() -> None:
    graph = digraph(5, seed=1)
    world = World(5, lambda round: graph)
    x = torch.stack(world.values).numpy()
    world.mixed(range(200), pause_s=0.0)
    for value in world.values:
        assert (value - world.start).abs().max() < 1e-12
    assert world.mass() == pytest.approx(5.0, abs=1e-13)
    without_mass = np.linalg.matrix_power(graph.matrix(), 200) @ x
    assert np.abs(without_mass - x.mean(0)).max() > 0.1


@pytest.mark.parametrize("heal", [False, True])
def test_each_round_is_the_matrix(heal: bool) -> None:
    world = World(6, lambda round: digraph(6, seed=round), heal=heal)
    x, m = torch.stack(world.values).numpy(), np.ones(6)
    for round in range(8):
        world.mixed(range(round, round + 1), pause_s=0.0)
        matrix = digraph(6, seed=round).matrix()
        x, m = matrix @ x, matrix @ m
        np.testing.assert_allclose([mixer.mass for mixer in world.mixers], m, rtol=1e-14)
        np.testing.assert_allclose(torch.stack(world.values).numpy(), x / m[:, None], rtol=1e-12, atol=1e-14)


def test_one_peer_exponential_is_exact_for_powers_of_two_and_keeps_every_mass() -> None:
    world = World(8, lambda round: one_peer(8, round)).mixed(range(3))
    assert [mixer.mass for mixer in world.mixers] == [1.0] * 8
    for value in world.values:
        assert (value - world.start).abs().max() < 1e-15
    assert world.simulation.ports[0].sent_messages == 3


@pytest.mark.parametrize("heal", [False, True])
@pytest.mark.parametrize("step", [0.0, 0.3])
def test_late_parcels_and_steps_under_way_leave_the_mean(heal: bool, step: float) -> None:
    world = World(7, lambda round: digraph(7, seed=round % 3), Jitter(4.0), heal=heal).mixed(range(40), step=step)
    assert sum(mixer.metrics()["late"] for mixer in world.mixers) > 40
    assert world.mass() == pytest.approx(7.0, abs=1e-13)
    assert world.error() < 1e-14


def test_a_straggler_delays_nobody_and_keeps_its_share() -> None:
    world = World(6, lambda round: one_peer(6, round), deadline_s=0.25)
    ended: dict[int, float] = {}

    def timed(rank: int) -> Script[None]:
        rounds, pause_s = (range(6), 10.0) if rank == 2 else (range(40), 1.0)
        yield from world.script(rank, rounds, pause_s)
        ended[rank] = world.simulation.now_s

    world.run(timed(rank) for rank in range(6))
    # Three of four rounds have no parcel from it for one of the others: those take 1.25 s, not 10.
    assert max(at for rank, at in ended.items() if rank != 2) <= 40 * 1.25
    world.run(world.settle(rank) for rank in range(6))
    assert world.mass() == pytest.approx(6.0, abs=1e-13)
    assert world.error() < 1e-14


def test_running_sums_heal_what_links_lose() -> None:
    def run(heal: bool) -> World:
        links = Jitter(0.1, loss=0.3)
        world = World(6, lambda round: digraph(6, seed=round % 3), links, heal=heal).mixed(range(30), step=0.1)
        links.loss = 0.0
        return world.mixed(range(30, 33)).mixed(range(33, 110), pause_s=0.0)  # each edge heals in the first three

    healed, torn = run(True), run(False)
    assert healed.mass() == pytest.approx(6.0, abs=1e-12)
    assert healed.error() < 1e-13
    spread = torch.stack(healed.values).std(0).max()
    assert spread < 1e-9
    assert torn.mass() < 2.0  # what was lost stays lost


def test_sums_of_fp32_vectors_lose_nothing_in_their_rounding() -> None:
    graph = digraph(4, seed=0)
    links = Jitter(0.6, loss=0.2)
    world = World(4, lambda round: graph, links, heal=True)
    world.values = [value.float() + 100 for value in world.values]
    before = sum(value.double() for value in world.values)
    world.run(world.script(rank, range(300), 0.0) for rank in range(4))
    # What is neither here nor on the wire: each machine's own rounding to fp32 alone.
    given, seen = ({} for _ in range(2))
    for rank, mixer in enumerate(world.mixers):
        state = mixer.state_dict()
        given.update({(rank, int(to)): entry for to, entry in state["given"].items()})
        seen.update({(int(source), rank): entry for source, entry in state["seen"].items()})
    held = sum(mixer.mass * value.double() for mixer, value in zip(world.mixers, world.values, strict=True))
    wire = sum(given[edge][1] - seen[edge][1] for edge in given)
    assert wire.abs().max() > 1
    assert ((held + wire - before) / before).abs().max() < 1e-6
    links.loss = 0.0
    world.mixed(range(300, 303))  # ends with parcels that come late
    assert world.mass() == pytest.approx(4.0, abs=1e-12)
    assert {value.dtype for value in world.values} == {torch.float32}


@pytest.mark.parametrize("heal", [False, True])
def test_a_dead_machine_costs_its_share_and_a_new_one_takes_its_place(heal: bool) -> None:
    graph = digraph(5, seed=7)
    world = World(5, lambda round: graph, heal=heal)
    world.run(world.script(rank, range(4), 0.0) for rank in range(5))
    alive = [0, 1, 3, 4]
    before, mass = world.numerator(alive), world.mass(alive)
    world.simulation.kill(2)
    world.run(world.script(rank, range(4, 8), 0.0) if rank != 2 else None for rank in range(5))
    assert world.mass(alive) == pytest.approx(mass, abs=1e-14)
    # The new one gets half of what machine 0 has.
    world.simulation.revive(2)
    world.mixers[2] = world.mixer(2)
    world.values[2] = world.values[0].clone()
    world.mixers[0].mass = world.mixers[2].mass = world.mixers[0].mass / 2
    world.mixed(range(8, 150), pause_s=0.0)
    assert world.mass() == pytest.approx(mass, abs=1e-13)
    for value in world.values:
        assert (value - before / mass).abs().max() < 1e-12


def test_sums_begin_anew_with_a_machine_that_is_back_before_anybody_noticed() -> None:
    graph = digraph(3, seed=2)
    world = World(3, lambda round: graph, heal=True)
    world.mixed(range(50), pause_s=0.0)
    value, mass = world.values[1].clone(), world.mixers[1].mass
    world.simulation.kill(1)
    world.simulation.revive(1)
    world.mixers[1] = world.mixer(1)
    world.mixers[1].mass = mass  # as if it had all that the old one had
    world.mixed(range(50, 60), pause_s=0.0)
    assert world.mass() == pytest.approx(3.0, abs=1e-13)
    torch.testing.assert_close(torch.stack(world.values), value.expand(3, SIZE), rtol=0, atol=1e-11)


@pytest.mark.parametrize("heal", [False, True])
def test_a_resumed_run_goes_on_bit_for_bit(heal: bool) -> None:
    def world() -> World:
        return World(4, lambda round: digraph(4, seed=round), heal=heal)

    going_on = world().mixed(range(5))
    resumed = world()
    for old, new in zip(going_on.mixers, resumed.mixers, strict=True):
        new.load_state_dict(old.state_dict())
    resumed.values = [value.clone() for value in going_on.values]
    for each in (going_on, resumed):
        each.mixed(range(5, 10), step=0.1)
    for a, b in zip(going_on.values, resumed.values, strict=True):
        assert torch.equal(a, b)


def test_a_vector_that_is_not_finite_is_not_sent() -> None:
    world = World(3, lambda round: digraph(3, seed=round))
    world.values[1][3] = float("nan")

    def spoilt() -> Script[None]:
        with pytest.raises(OwnWeightsError):
            world.mixers[1].begin(0, digraph(3, seed=0), world.values[1])
        yield pause(0.0, 0.0)

    world.run(spoilt() if rank == 1 else world.script(rank, range(1), 0.0) for rank in range(3))
    assert sum(mixer.metrics()["absent"] for mixer in world.mixers) == len(digraph(3, seed=0).targets(1))
    assert all(world.values[rank].isfinite().all() for rank in (0, 2))
    assert world.simulation.now_s == 0.0  # nobody waited for it


def test_refuses_to_give_everything_away() -> None:
    world = World(2, lambda round: Mixing([{1: 1.0}, {0: 1.0}], symmetric=False))
    with pytest.raises(ValueError, match=r"method\.graph gives away all that machine 0 holds in round 0"):
        world.mixed(range(1))


@pytest.mark.parametrize("heal", [False, True])
def test_damaged_payloads(heal: bool, mutations: Callable[[Tensor], Iterator[Tensor]]) -> None:
    world = World(2, lambda round: one_peer(2, round), heal=heal)
    world.mixers[0].begin(0, one_peer(2, 0), world.values[0])
    payload = world.simulation.ports[0].sent_bytes[1]
    assert payload == world.mixers[0].sent_bytes(one_peer(2, 0), SIZE, 8)[1]
    value, other = torch.zeros(SIZE, dtype=torch.float64), one_peer(2, 0)
    intact = Plain().encode(0, world.values[0])[0]
    refused = 0
    for damaged in mutations(intact):
        world = World(2, lambda round: other, heal=heal)
        world.simulation.ports[1].inbox.put(0, Message(Kind.PUSH, 0, 0.5, payload=damaged))
        world.mixers[1].begin(0, other, value)
        script = world.mixers[1].finish()
        next(script)
        try:
            next(script)
        except PayloadError:
            refused += 1
        except StopIteration:
            assert world.mixers[1].mass == pytest.approx(1.0)
    assert refused > 0
