"""DADAO on quadratics: its constants, what it conserves, a speed that is the same on every graph."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from gossip_worlds import Always, Edges, mixing_of
from pydantic import ValidationError
from torch import Tensor

from thinwire.comm.gossip.algorithm import Parts
from thinwire.comm.gossip.algorithms.dadao import DADAO, DADAOSettings, constants_for
from thinwire.comm.gossip.codec import Plain
from thinwire.comm.gossip.port import Script
from thinwire.comm.gossip.replica import VectorReplica
from thinwire.comm.gossip.simulation import Simulation, pause
from thinwire.comm.gossip.swaps import Swaps
from thinwire.comm.gossip.turn import Turn

N, SIZE = 10, 5
L, MU = 10.0, 1.0


def ring(n: int) -> list[tuple[int, int]]:
    return [(i, (i + 1) % n) for i in range(n)]


def star(n: int) -> list[tuple[int, int]]:
    return [(0, i) for i in range(1, n)]


def complete(n: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(n) for j in range(i)]


def graph_of(n: int, edges: Edges) -> Always:
    return Always(mixing_of(n, edges, 1 / n))


class World:
    """f_i(x) = (x - c_i)' A_i (x - c_i) / 2, the eigenvalues of A_i from mu to L, in bases drawn at random."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        bases = [torch.linalg.qr(torch.randn(SIZE, SIZE, generator=draw, dtype=torch.float64)).Q for _ in range(N)]
        spectrum = torch.linspace(MU, L, SIZE, dtype=torch.float64)
        self.a = torch.stack([q @ torch.diag(spectrum) @ q.T for q in bases])
        self.c = torch.randn(N, SIZE, generator=draw, dtype=torch.float64)
        self.best = torch.linalg.solve(self.a.sum(0), torch.einsum("nij,nj->i", self.a, self.c))
        self.simulation = Simulation(N)
        self.replicas = [VectorReplica(torch.randn(SIZE, generator=draw, dtype=torch.float64)) for _ in range(N)]

    def gradient(self, rank: int, x: Tensor) -> Tensor:
        return self.a[rank] @ (x - self.c[rank])

    def error(self) -> float:
        return sum(float((replica.x - self.best).square().sum()) for replica in self.replicas)


@pytest.mark.parametrize(
    ("n", "edges", "exchanges"),
    [(10, ring(10), 15.3500), (8, ring(8), 9.7774), (8, star(8), 7.0), (8, complete(8), 7 / math.sqrt(2))],
)
def test_exchanges_per_unit_of_time(n: int, edges: Sequence[tuple[int, int]], exchanges: float) -> None:
    constants = constants_for(graph_of(n, edges), L, MU)
    assert constants.rate * n / 2 == pytest.approx(exchanges, abs=5e-5)
    kappa = math.sqrt(0.05)
    assert constants.theta == pytest.approx(1 / (2 * kappa))
    assert constants.gamma_t == pytest.approx(1 / (4 * math.sqrt(5)))


@pytest.mark.parametrize("edges", [ring(N), star(N)])
def test_speed_does_not_depend_on_the_graph(edges: Sequence[tuple[int, int]]) -> None:
    world, graph = World(), graph_of(N, edges)
    constants = constants_for(graph, L, MU)
    machines = [
        DADAO(
            replica,
            port,
            Swaps(port, Plain(), asks=64, deadline_s=1e6),
            constants,
            seed=1,
            deadline_s=1e6,
            clock=port.now,
        )
        for replica, port in zip(world.replicas, world.simulation.ports, strict=True)
    ]
    errors = []
    for until in (30.0, 120.0):  # all stand at one time in between
        world.simulation.run(
            [
                machine.live(
                    lambda x, rank=rank: world.gradient(rank, x),
                    graph.mixing(0).sources(rank),
                    until,  # type: ignore[misc]
                )
                for rank, machine in enumerate(machines)
            ]
        )
        errors.append(world.error())
        states = [machine.state_dict()["state"] for machine in machines]
        for row in (4, 5):  # sum z = sum z~ = 0
            assert sum(state[row] for state in states).abs().max() < 1e-11  # type: ignore[union-attr]
    assert math.log(errors[0] / errors[1]) / 90 == pytest.approx(0.043, rel=0.2)
    made = sum(machine.metrics()["swaps"] for machine in machines) / 2
    assert made == pytest.approx(constants.rate * N / 2 * 120, rel=0.1)


class Trained(World):
    """The same, as an Algorithm beside an optimizer, whose machines do not stand at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = graph_of(N, ring(N))
        settings = DADAOSettings(smoothness=L, strong_convexity=MU)
        self.machines = [
            settings.build(Parts(replica, port, self.graph, 100.0, seed=1))
            for replica, port in zip(self.replicas, self.simulation.ports, strict=True)
        ]

    def train(self, steps: range) -> None:
        def script(rank: int) -> Script[None]:
            machine, replica = self.machines[rank], self.replicas[rank]
            for step in steps:
                yield pause(self.simulation.now_s, 1.0 + rank / 64)
                replica.g = self.gradient(rank, replica.x)
                turn = Turn(step, step, self.graph.mixing(step))
                yield from machine.before_step(turn)
                replica.x = replica.x - 100 * replica.g  # whatever the optimizer does
                yield from machine.after_step(turn)
            yield from machine.drain()
            yield pause(self.simulation.now_s, 10.0)
            yield from machine.drain()

        self.simulation.run([script(rank) for rank in range(N)])


def test_as_an_algorithm_it_finds_the_minimum_and_resumes_bit_for_bit() -> None:
    going_on, resumed = Trained(), Trained()
    before = going_on.error()
    going_on.train(range(40))
    assert sum(machine.conserved() for machine in going_on.machines).abs().max() < 1e-11  # type: ignore[union-attr]
    resumed.simulation.now_s = going_on.simulation.now_s
    for rank, machine in enumerate(resumed.machines):
        resumed.replicas[rank].x = going_on.replicas[rank].x.clone()
        machine.load_state_dict(going_on.machines[rank].state_dict())
    for world in (going_on, resumed):
        world.train(range(40, 70))
        assert world.error() < before * math.exp(-0.03 * 70)
    for a, b in zip(going_on.replicas, resumed.replicas, strict=True):
        assert torch.equal(a.x, b.x)


def test_refuses_what_no_function_is() -> None:
    with pytest.raises(ValidationError, match="smoothness: 1 with strong_convexity: 2; no function is less smooth"):
        DADAOSettings(smoothness=1.0, strong_convexity=2.0)
