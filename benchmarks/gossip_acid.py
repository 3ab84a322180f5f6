"""Claim: on a ring, A2CiD2 needs several times fewer exchanges than plain gossip to come to the same consensus.

    python benchmarks/gossip_acid.py [--machines 16 32 64] [--seeds 3] [--json FILE]

Nabli, Belilovsky, Oyallon (2023), arXiv 2306.08289. Machines begin with N(0, 1) vectors and only exchange: each turn,
of one virtual second, a machine asks Poisson(1/2) of its two neighbours, so it takes part in one exchange a turn. The
class that trains, of comm/gossip/algorithms/acid.py, runs in the simulation: with the momentum of the paper, and with
none, which is AD-PSGD. Counted are the exchanges of a machine until the squared distance from consensus is
the given part of what it was; and those that it takes in the end, over the second half of the way, to make it smaller
by a factor of e. The latter is what theory speaks of; until a large part there is less to gain, since plain gossip is
fast to remove what differs between neighbours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import mean

import numpy as np
import torch
from runner import Row, arguments, report

from thinwire.comm.gossip.algorithms.acid import NO_MOMENTUM, A2CiD2, Momentum, momentum_for
from thinwire.comm.gossip.codec import Plain
from thinwire.comm.gossip.graphs import build_graph
from thinwire.comm.gossip.graphs.regular import RingSettings
from thinwire.comm.gossip.mixing import Graph
from thinwire.comm.gossip.port import Script
from thinwire.comm.gossip.replica import VectorReplica
from thinwire.comm.gossip.simulation import Simulation, pause
from thinwire.comm.gossip.swaps import Swaps
from thinwire.comm.gossip.turn import Turn

PARTS = (1e-2, 1e-4, 1e-6)
ELEMENTS = 64


@dataclass(frozen=True)
class Course:
    """By turn: exchanges per machine so far, and the squared distance from consensus."""

    exchanges: list[float]
    distances: list[float]

    def until(self, part: float) -> float:
        """Exchanges per machine until the distance is this part of the first."""
        at = next(turn for turn, distance in enumerate(self.distances) if distance <= part * self.distances[0])
        return self.exchanges[at]

    def speed(self) -> float:
        """Decay of log(distance) per exchange of a machine, over the second half of the course of the logarithm."""
        logs = [math.log(distance / self.distances[0]) for distance in self.distances]
        half = next(turn for turn, log in enumerate(logs) if log <= logs[-1] / 2)
        return (logs[half] - logs[-1]) / (self.exchanges[-1] - self.exchanges[half])


def course(graph: Graph, momentum: Momentum, seed: int) -> Course:
    """Let all machines take turns, in an order of their own within each, until the last of PARTS is reached."""
    n = graph.size
    draw = torch.Generator().manual_seed(seed)
    simulation = Simulation(n)
    replicas = [VectorReplica(torch.randn(ELEMENTS, generator=draw, dtype=torch.float64)) for _ in range(n)]
    machines = [
        A2CiD2(
            replica, port, Swaps(port, Plain(), asks=8, deadline_s=1e9), momentum, rate=1.0, seed=seed, deadline_s=1e9
        )
        for replica, port in zip(replicas, simulation.ports, strict=True)
    ]
    phases_s = np.random.default_rng(seed).random(n) * 0.9
    exchanges, distances = [], []

    def look() -> None:
        exchanges.append(sum(machine.metrics()["swaps"] for machine in machines) / n)
        x = torch.stack([replica.x for replica in replicas])
        distances.append(float((x - x.mean(0)).square().sum(1).mean()))

    def turn(rank: int, number: int) -> Script[None]:
        yield pause(simulation.now_s, float(phases_s[rank]))
        yield from machines[rank].after_step(Turn(number, number, graph.mixing(number)))

    look()
    while distances[-1] > PARTS[-1] * distances[0]:
        number = len(distances) - 1
        simulation.run([turn(rank, number) for rank in range(n)])
        look()
    return Course(exchanges, distances)


def _row(n: int, what: str, plain: float, fast: float) -> Row:
    return {"machines": n, "measured": what, "plain": plain, "A2CiD2": fast, "times fewer": plain / fast}


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--machines", type=int, nargs="+", default=[16, 32, 64], help="of the ring")
    parser.add_argument("--seeds", type=int, default=3, help="runs, over which is averaged")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for n in options.machines:
        graph = build_graph(RingSettings(), n, seed=0)
        momentum = momentum_for(graph, rate=1.0)
        plain = [course(graph, NO_MOMENTUM, seed) for seed in range(options.seeds)]
        fast = [course(graph, momentum, seed) for seed in range(options.seeds)]
        for part in PARTS:
            rows.append(
                _row(n, f"exchanges until {part:g}", *(mean(c.until(part) for c in all) for all in (plain, fast)))
            )
        speeds = [mean(c.speed() for c in all) for all in (plain, fast)]
        rows.append(_row(n, "exchanges per factor e, in the end", *(1 / speed for speed in speeds)))
    report(
        "A2CiD2 comes to consensus on a ring with fewer exchanges", rows, device=torch.device("cpu"), path=options.json
    )


if __name__ == "__main__":
    main()
