"""Claim: gossip preserves the mean to 1e-6 relative through overlap, compression, cuts, a death and an entry.

    python benchmarks/gossip_faults.py [--numel 200000] [--rounds 40] [--json FILE]

Eight machines on a ring, each with a port of its own (real TCP connections within this computer), add vectors of their
own to fp32 weights and gossip. What must hold at the end, with the masses m of the machines that live:

    sum_i m_i z_i = sum_i z_i at the start + sum of all that was added, by mass - what a dead machine held.

"error" is the norm of the difference, relative; "left apart" the consensus distance at the end over that at the start.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from runner import Row, arguments, report
from torch import Tensor

from thinwire.comm.compress.compressors.top_k import TopK
from thinwire.comm.gossip.agent import Agent
from thinwire.comm.gossip.algorithm import AlgorithmSettings, Parts
from thinwire.comm.gossip.algorithms.choco import ChocoSettings
from thinwire.comm.gossip.algorithms.dpsgd import DPSGDSettings
from thinwire.comm.gossip.graphs import build_graph
from thinwire.comm.gossip.graphs.regular import RingSettings
from thinwire.comm.gossip.message import Kind
from thinwire.comm.gossip.port import Script, Wait
from thinwire.comm.gossip.post.door import listen
from thinwire.comm.gossip.post.post import Post, drive
from thinwire.comm.gossip.replica import VectorReplica
from thinwire.comm.gossip.schedule import EverySettings, build_schedule
from thinwire.comm.meter import TrafficMeter

SIZE = 8
VICTIM = 3
DEADLINE_S = 60.0


@dataclass
class Fault:
    """cuts: each machine breaks one of its connections every so many rounds; 0 = never. dies: one is killed and another
    enters in its place."""

    algorithm: AlgorithmSettings
    cuts: int = 0
    dies: bool = False


FAULTS = {
    "none": Fault(DPSGDSettings()),
    "overlap": Fault(DPSGDSettings(overlap=True)),
    "bf16 on the wire": Fault(DPSGDSettings(wire="bf16")),
    "CHOCO, top 1 %": Fault(ChocoSettings(compressor=TopK(density=0.01, scope="global"), start="zero")),
    "cuts": Fault(DPSGDSettings(), cuts=2),
    "cuts, overlap": Fault(DPSGDSettings(overlap=True), cuts=2),
    "cuts, CHOCO": Fault(ChocoSettings(compressor=TopK(density=0.01, scope="global"), start="zero"), cuts=2),
    "a death and an entry": Fault(DPSGDSettings(), dies=True),
    "a death and an entry, cuts, overlap": Fault(DPSGDSettings(overlap=True), cuts=2, dies=True),
}


@dataclass
class World:
    """Addresses and listening sockets of all machines, and what they hand in."""

    fault: Fault
    numel: int
    rounds: int
    addresses: list[tuple[str, int]] = field(default_factory=list)
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    errors: list[BaseException] = field(default_factory=list)


@dataclass
class Outcome:
    """Of one machine, in fp64. start: its weights at the beginning. gained: what was added, by mass. held: m z at the
    end. dead: what a machine that died in this place held."""

    start: Tensor
    gained: Tensor
    held: Tensor
    mass: float
    dead: Tensor


def main() -> None:
    parser = arguments(str(__doc__).splitlines()[0])
    parser.add_argument("--numel", type=int, default=200_000, help="weights of a machine")
    parser.add_argument("--rounds", type=int, default=40, help="steps, each with an exchange")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(name, fault, options.numel, options.rounds) for name, fault in FAULTS.items()]
    report(str(__doc__).splitlines()[0], rows, device=torch.device("cpu"), path=options.json)


def measure(name: str, fault: Fault, numel: int, rounds: int) -> Row:
    world = World(fault, numel, rounds)
    listeners = [listen("127.0.0.1", 0) for _ in range(SIZE)]
    world.addresses = [(str(s.getsockname()[0]), int(s.getsockname()[1])) for s in listeners]
    posts = [enter(world, rank, listeners[rank]) for rank in range(SIZE)]
    for post in posts:
        post.wait_for_others(SIZE - 1, DEADLINE_S)
    threads = [threading.Thread(target=attempt, args=(world, partial(live, world, post))) for post in posts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if world.errors:
        raise world.errors[0]
    all_ = list(world.outcomes.values())
    expected = torch.stack([o.start + o.gained - o.dead for o in all_]).sum(0)
    error = torch.stack([o.held for o in all_]).sum(0) - expected
    start, end = torch.stack([o.start for o in all_]), torch.stack([o.held / o.mass for o in all_])
    return {
        "fault": name,
        "error": f"{float(error.norm() / expected.norm()):.1e}",
        "sum of masses": round(sum(o.mass for o in all_), 9),
        "left apart": f"{float((end - end.mean(0)).norm() / (start - start.mean(0)).norm()):.1e}",
    }


def attempt(world: World, work: Callable[[], None]) -> None:
    try:
        work()
    except BaseException as error:
        world.errors.append(error)


def enter(world: World, rank: int, listener: socket.socket | None = None) -> Post:
    sock = listener or listen(*world.addresses[rank])
    meter = TrafficMeter(["self" if other == rank else "world" for other in range(SIZE)])
    return Post(rank, world.addresses, secret=b"benchmark", listener=sock, meter=meter, lost_after_s=DEADLINE_S)


def machine(world: World, post: Post) -> tuple[Agent, VectorReplica]:
    chance = torch.Generator().manual_seed(post.rank)
    replica = VectorReplica(torch.randn(world.numel, generator=chance) + 1.0)
    graph = build_graph(RingSettings(), SIZE, 0)
    algorithm = world.fault.algorithm.build(Parts(replica, post, graph, DEADLINE_S, 0))
    schedule = build_schedule(EverySettings(), graph, world.rounds, 0, None)
    return Agent(replica, post, algorithm, schedule, steps=world.rounds, deadline_s=DEADLINE_S), replica


def live(world: World, post: Post) -> None:
    agent, replica = machine(world, post)
    start, gained = replica.weights().double(), torch.zeros(world.numel, dtype=torch.float64)
    dead = torch.zeros_like(gained)
    if world.fault.dies and post.rank == VICTIM:
        step(world, agent, replica, post, gained, world.rounds // 4)
        drive(agent.algorithm.drain(), post)
        sides = ((post.rank - 1) % SIZE, (post.rank + 1) % SIZE)
        # Both neighbours are in the next round: they have all that this machine has sent.
        drive(wait_for(post, lambda: min(post.newest(side, Kind.VALUE) for side in sides) >= agent.step), post)
        dead = agent.algorithm.mass * replica.weights().double()
        post.close(farewell=False)
        post = enter(world, post.rank)
        post.wait_for_others(SIZE - 1, DEADLINE_S)
        agent, replica = machine(world, post)
        drive(agent.enter(), post)
    step(world, agent, replica, post, gained, world.rounds)
    drive(agent.cut(), post)
    mass = agent.algorithm.mass
    world.outcomes[post.rank] = Outcome(start, gained, mass * replica.weights().double(), mass, dead)
    post.close()


def step(world: World, agent: Agent, replica: VectorReplica, post: Post, gained: Tensor, until: int) -> None:
    donor = (VICTIM + 1) % SIZE
    while agent.step < until:
        if world.fault.dies and post.rank == donor and agent.step == world.rounds // 2 and agent.algorithm.mass == 1.0:
            drive(wait_for(post, lambda: bool(post.waiting(Kind.JOIN_ASK))), post)  # not over before one could enter
        chance = torch.Generator().manual_seed(1000 * agent.step + post.rank)
        before = replica.weights()
        after = before + 0.01 * torch.randn(world.numel, generator=chance)
        replica.set_weights(after)
        gained += agent.algorithm.mass * (after.double() - before.double())
        if world.fault.cuts and agent.step % world.fault.cuts == 0:
            post.hang_up((post.rank + 1) % SIZE)
        drive(agent.after_step(), post)


def wait_for(post: Post, ready: Callable[[], bool]) -> Script[None]:
    yield Wait(ready, post.now() + DEADLINE_S)
    assert ready()


if __name__ == "__main__":
    main()
