"""Claim: what a machine sends for a step of gossip does not depend on how many machines there are.

    python benchmarks/gossip_bytes.py [--json FILE]

Runs every method on 4 to 32 simulated machines, by the scripts that real ones run, and counts the payload bytes that
each machine hands to its port, but for those of barriers and ends. All are given in copies of the fp32 model a step
(numbers of 4 bytes each), as the mean over all machines and over STEPS steps; `most` is that of the machine which sends
most, among 32. `32 over 4` is the ratio that the claim is about. Rows of kind `grows` are for contrast: graphs whose
degree grows with n, and a ring all-reduce by its formula, 2 (n-1)/n. Machines that go at their own pace take a step in
0.1 s and wait 5 ms for a message.

Base-2 gives some machines nothing to do in some rounds where n is no power of two, and a matching leaves one alone
where n is odd: the mean is then below one copy. Swaps that chance decides (A2CiD2, one merge) move by their noise.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from runner import Row, arguments, report

from thinwire.comm.gossip.build import build_agent, make_plan
from thinwire.comm.gossip.message import Kind
from thinwire.comm.gossip.port import Script
from thinwire.comm.gossip.replica import VectorReplica
from thinwire.comm.gossip.settings import GossipSettings
from thinwire.comm.gossip.simulated_network import Network
from thinwire.comm.gossip.simulation import Simulation, pause

MACHINES = (4, 6, 8, 12, 16, 25, 32)
STEPS = 60  # several periods, and many draws
NUMEL = 1024
CONTROL = (Kind.END, Kind.BARRIER, Kind.JOIN_ASK)

CONSTANT: Mapping[str, Mapping[str, Any]] = {
    "D-PSGD, ring": {"graph": "ring"},
    "D-PSGD, ring, bf16": {
        "graph": "ring",
        "algorithm": {"kind": "dpsgd", "wire": "bf16", "overlap": True},
    },
    "D-PSGD, base-2": {"graph": "base_k"},
    "D-PSGD, random matching": {"graph": "matching"},
    "gradient tracking, ring": {"graph": "ring", "algorithm": "gradient_tracking"},
    "SlowMo every 20, ring": {"graph": "ring", "algorithm": {"kind": "slowmo", "every": 20}},
    "NoLoCo every 20, pairs": {"graph": "matching", "algorithm": "noloco", "schedule": {"kind": "every", "steps": 20}},
    "SGP, one-peer exponential": {"graph": "one_peer_exponential", "algorithm": "sgp"},
    "CHOCO top 1 %, ring": {"graph": "ring", "algorithm": "choco"},
    "SPARTA 0.5 %, random matching": {"graph": "matching", "algorithm": "sparta"},
    "AD-PSGD, ring": {"graph": "ring", "algorithm": "ad_psgd"},
    "A2CiD2, ring": {"graph": "ring", "algorithm": "acid"},
    "one merge, matching with p = 0.2": {
        "graph": "matching",
        "schedule": {"kind": "single_merge", "probability": 0.2},
    },
}
GROWS: Mapping[str, Mapping[str, Any]] = {
    "SGP, static exponential": {"graph": "exponential", "algorithm": "sgp"},
    "D-PSGD, complete": {"graph": "complete"},
}


def main() -> None:
    parser = arguments(str(__doc__).splitlines()[0])
    parser.set_defaults(device="cpu", threads=1)
    parser.add_argument("--only", help="rows whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for kind, methods in (("constant", CONSTANT), ("grows", GROWS)):
        for name, settings in methods.items():
            if not options.only or options.only in name:
                rows.append(row(name, kind, partial(simulate, given=settings)))
                print(name, flush=True, file=sys.stderr)
    rows.append(row("all-reduce, ring (formula)", "grows", lambda n: [2 * (n - 1) / n]))
    report(str(__doc__).splitlines()[0], rows, device=torch.device("cpu"), path=options.json)


def row(name: str, kind: str, copies: Callable[[int], list[float]]) -> Row:
    """Copies of the model that machines send for a step, by their number."""
    by_count = {n: copies(n) for n in MACHINES}
    means = {n: statistics.fmean(sent) for n, sent in by_count.items()}
    most, few = max(MACHINES), min(MACHINES)
    return {
        "method": name,
        "kind": kind,
        **{f"n={n}": means[n] for n in MACHINES},
        "most": max(by_count[most]),
        f"{most} over {few}": means[most] / means[few],
    }


def simulate(machines: int, *, given: Mapping[str, Any]) -> list[float]:
    """Copies of the model that each machine sends for a step."""
    settings = GossipSettings.model_validate({"probes": 0, **given})
    plan = make_plan(settings, machines, steps=STEPS, numel=NUMEL)
    simulation = Simulation(machines, Network(delay_s=0.005))
    steps = [0] * machines

    def script(rank: int) -> Script[None]:
        start = torch.Generator().manual_seed(0)
        replica = VectorReplica(torch.randn(NUMEL, generator=start), lr=0.1)
        chance = torch.Generator().manual_seed(rank)
        agent = build_agent(plan, replica, simulation.ports[rank])
        while not agent.ended:
            if not agent.in_rounds:
                yield pause(simulation.now_s, 0.1)
            replica.g = 0.1 * torch.randn(NUMEL, generator=chance)
            yield from agent.before_step()
            replica.x -= replica.lr * replica.g
            yield from agent.after_step()
        steps[rank] = agent.step

    simulation.run([script(rank) for rank in range(machines)])
    return [
        sum(count for (_, kind), count in port.sent.items() if kind not in CONTROL) / (4 * NUMEL * steps[port.rank])
        for port in simulation.ports
    ]


if __name__ == "__main__":
    main()
