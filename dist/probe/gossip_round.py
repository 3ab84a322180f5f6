"""What a round of gossip takes beside sending."""

from __future__ import annotations

import zlib

import torch

from thinwire.comm.gossip.algorithm import Algorithm, Parts
from thinwire.comm.gossip.algorithms.dpsgd import DPSGDSettings
from thinwire.comm.gossip.build import make_plan
from thinwire.comm.gossip.graphs.regular import CompleteSettings
from thinwire.comm.gossip.replica import ModelReplica
from thinwire.comm.gossip.settings import GossipSettings
from thinwire.comm.gossip.simulation import Simulation
from thinwire.dist.plan.cluster import CodecSpeed
from thinwire.dist.probe.clock import Lockstep

_LARGE, _SMALL = 1 << 20, 1 << 12
_CALLS = 3


def measure_round(lockstep: Lockstep) -> CodecSpeed:
    """Seconds of a round with one neighbour, as handling; and of each message more, as decoding. Collective.

    Each rank stands for two machines that exchange without a network, of which it would be one.
    """
    found = ([time(lockstep, numel) for numel in (_LARGE, _SMALL)] for time in (_round_s, _checksums_s, _sum_s))
    (round_s, round_call_s), (checksums_s, checksums_call_s), (sum_s, sum_call_s) = (_line(*pair) for pair in found)
    return CodecSpeed(
        encode_s=0.0,
        decode_s=checksums_s + sum_s,
        decode_call_s=checksums_call_s + sum_call_s,
        handle_s=round_s + checksums_s,
        handle_call_s=round_call_s + checksums_call_s,
    )


def _line(large_s: float, small_s: float) -> tuple[float, float]:
    """Seconds per element, and besides."""
    each = max(0.0, large_s - small_s) / (_LARGE - _SMALL)
    return each, max(0.0, small_s - _SMALL * each)


def _round_s(lockstep: Lockstep, numel: int) -> float:
    simulation = Simulation(2)
    settings = GossipSettings(graph=CompleteSettings(), algorithm=DPSGDSettings())
    plan = make_plan(settings, 2, steps=None, numel=numel)
    machines: list[Algorithm] = []
    for port in simulation.ports:
        replica = ModelReplica([torch.zeros(numel, device=lockstep.device)])
        machines.append(settings.algorithm.build(Parts(replica, port, plan.graph, 1.0, 0)))
    step = 0

    def both() -> None:
        nonlocal step
        simulation.run([machine.after_step(plan.schedule.turn(step)) for machine in machines])
        step += 1

    both()
    return min(lockstep.time_computing(both, _CALLS)) / 2


def _checksums_s(lockstep: Lockstep, numel: int) -> float:
    """A message's checksum at both ends, as a machine has it that sends one and gets one."""
    body = torch.zeros(numel).view(torch.uint8).numpy().data

    def both_ends() -> None:
        zlib.crc32(body)
        zlib.crc32(body)

    return min(lockstep.time_computing(both_ends, _CALLS))


def _sum_s(lockstep: Lockstep, numel: int) -> float:
    """A message's part of the mean."""
    message, total = (torch.zeros(numel, device=lockstep.device) for _ in range(2))
    return min(lockstep.time_computing(lambda: total.add_(message, alpha=0.5), _CALLS))
