"""One machine is asked to stop: all end after the same step, and nobody waits out a deadline for it."""

from __future__ import annotations

import pytest
import torch
from gossip_worlds import Always, Late, ring

from thinwire.comm.gossip.agent import Agent
from thinwire.comm.gossip.algorithm import Parts
from thinwire.comm.gossip.algorithms.dpsgd import DPSGDSettings
from thinwire.comm.gossip.port import Script, Wait
from thinwire.comm.gossip.replica import VectorReplica
from thinwire.comm.gossip.schedule import EverySettings, build_schedule
from thinwire.comm.gossip.simulation import Simulation


@pytest.mark.parametrize("asked", range(4))
@pytest.mark.parametrize("overlap", [False, True])
def test_all_end_after_the_same_step(asked: int, overlap: bool) -> None:
    simulation = Simulation(4, Late(lambda source, to, count: 0.1 + 0.07 * ((source + 3 * to + count) % 5)))
    graph = Always(ring(4))
    schedule = build_schedule(EverySettings(), graph, None, 0, None)

    def run(rank: int) -> Script[int]:
        port = simulation.ports[rank]
        replica = VectorReplica(torch.full((3,), float(rank), dtype=torch.float64))
        algorithm = DPSGDSettings(overlap=overlap).build(Parts(replica, port, graph, 1000.0, 0))
        agent = Agent(replica, port, algorithm, schedule, deadline_s=1000.0)
        while not agent.ended:
            yield Wait(lambda: False, port.now() + 0.05 * (rank + 1))
            if rank == asked and agent.step == 5:
                agent.stop()
            yield from agent.after_step()
        assert agent.stopped
        return agent.step

    steps = simulation.run([run(rank) for rank in range(4)])
    assert len(set(steps)) == 1
    assert 5 < steps[0] <= 5 + 3 * 4
    assert simulation.now_s < 50.0
