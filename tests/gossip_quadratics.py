"""Machines of a gossip algorithm that minimise f_i(x) = |x - b_i|^2 / 2, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from thinwire.comm.gossip.algorithm import AlgorithmSettings, Parts
from thinwire.comm.gossip.mixing import Graph
from thinwire.comm.gossip.replica import VectorReplica
from thinwire.comm.gossip.simulation import Links, Simulation
from thinwire.comm.gossip.turn import Turn

DEADLINE_S = 1.0


class Quadratics:
    """A world of machines with SGD.

    Attributes: b, what each machine's objective draws it to; replicas; momenta, of SGD; algorithms; gradients, of the
    last step as the machine itself computed them; alive.
    """

    def __init__(
        self,
        settings: AlgorithmSettings,
        graph: Graph,
        *,
        lr: float = 0.1,
        momentum: float = 0.0,
        links: Links | None = None,
        numel: int = 5,
        sizes: Sequence[int] | None = None,
        start: Sequence[Tensor] | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        n = graph.size
        chance = torch.Generator().manual_seed(1)
        self.b = torch.randn(n, numel, dtype=torch.float64, generator=chance).to(dtype)
        self.settings = settings
        self.graph = graph
        self.lr, self.momentum = lr, momentum
        self.simulation = Simulation(n, links)
        origin = torch.zeros(numel, dtype=dtype)
        self.replicas = [VectorReplica(start[i] if start else origin, lr, sizes) for i in range(n)]
        self.momenta = [origin.clone() for _ in range(n)]
        self.gradients = torch.zeros(n, numel, dtype=dtype)
        self.algorithms: list[Any] = [
            settings.build(Parts(replica, port, graph, DEADLINE_S, 0))
            for replica, port in zip(self.replicas, self.simulation.ports, strict=True)
        ]
        self.alive = list(range(n))
        self.step = 0
        self.predicted = [dict[int, int]() for _ in range(n)]

    @property
    def x(self) -> Tensor:
        """Weights of the machines alive, by rows."""
        return torch.stack([self.replicas[rank].x for rank in self.alive])

    @property
    def mass(self) -> Tensor:
        return torch.tensor([self.algorithms[rank].mass for rank in self.alive], dtype=torch.float64)

    def run(self, steps: int, *, exchange_every: int = 1) -> None:
        """So many steps, the phases of each on all machines one after another."""
        for _ in range(steps):
            talks = (self.step + 1) % exchange_every == 0
            round = self.step // exchange_every
            turn = Turn(self.step, round, self.graph.mixing(round) if talks else None)
            for rank in self.alive:
                self.gradients[rank] = self.replicas[rank].x - self.b[rank]
                self.replicas[rank].g = self.gradients[rank].clone()
                for to, count in self.algorithms[rank].sent_bytes(turn).items():
                    self.predicted[rank][to] = self.predicted[rank].get(to, 0) + count
            self.each(lambda algorithm, turn=turn: algorithm.before_step(turn))
            for rank in self.alive:
                self.momenta[rank] = self.momentum * self.momenta[rank] + self.replicas[rank].g
                self.replicas[rank].x = self.replicas[rank].x - self.lr * self.momenta[rank]
            self.each(lambda algorithm, turn=turn: algorithm.after_step(turn))
            self.step += 1

    def each(self, script: Any) -> None:
        """Run a script of every algorithm whose machine is alive."""
        n = self.graph.size
        self.simulation.run([script(self.algorithms[rank]) if rank in self.alive else None for rank in range(n)])

    def drain(self) -> None:
        """Wait until nothing is on the wire."""
        self.each(lambda algorithm: algorithm.drain())

    def kill(self, rank: int) -> None:
        self.alive.remove(rank)
        self.simulation.kill(rank)

    def enter(self, rank: int, donor: int) -> None:
        """A new machine in the place of a dead one, with the weights and half the mass of another."""
        port = self.simulation.revive(rank)
        self.replicas[rank] = VectorReplica(self.replicas[donor].x, self.lr, self.replicas[donor].sizes)
        parts = Parts(self.replicas[rank], port, self.graph, DEADLINE_S, 0)
        self.algorithms[rank] = self.settings.build(parts)
        share = self.algorithms[donor].mass / 2
        for machine in (rank, donor):
            self.algorithms[machine].hold(share)
        self.alive = sorted([*self.alive, rank])

    def merge(self) -> None:
        """All machines alive take the average."""
        average = (self.mass[:, None] * self.x).sum(0) / self.mass.sum()
        for rank in self.alive:
            self.replicas[rank].set_weights(average)
            self.algorithms[rank].merged()

    def state(self) -> list[Any]:
        """After drain(): of every machine, what a checkpoint has."""
        return [
            (replica.x.clone(), momentum.clone(), algorithm.state_dict())
            for replica, momentum, algorithm in zip(self.replicas, self.momenta, self.algorithms, strict=True)
        ]

    def load(self, state: list[Any], step: int) -> None:
        self.step = step
        for rank, (x, momentum, algorithm) in enumerate(state):
            self.replicas[rank].x = x.clone()
            self.momenta[rank] = momentum.clone()
            self.algorithms[rank].load_state_dict(algorithm)
