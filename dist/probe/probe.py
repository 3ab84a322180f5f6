"""All measurements of a probe, within a time, put together as a Cluster."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import torch

from thinwire.comm.forecast import Seat
from thinwire.comm.two_shot import TwoShotMean
from thinwire.dist.host import this_host
from thinwire.dist.plan.cluster import Cluster, ComputeSpeed, Device, LinkLevel, Measured
from thinwire.dist.plan.forecasts import Subject, forecast_run
from thinwire.dist.plan.prediction import subject_of
from thinwire.dist.probe.clock import Lockstep
from thinwire.dist.probe.codecs import EVERY, measure_codecs
from thinwire.dist.probe.collectives import fit, sweep
from thinwire.dist.probe.compute import measure_compute, measure_flops
from thinwire.dist.probe.directions import measure_directions
from thinwire.dist.probe.pairs import measure_pairs
from thinwire.dist.probe.processor import busy_s_per_byte
from thinwire.dist.probe.records import CollectiveTime
from thinwire.dist.processors import cpu_group, processor_quota, usable_processors
from thinwire.dist.task import build_task
from thinwire.dist.world import World

if TYPE_CHECKING:
    from thinwire.dist.config import RunConfig

# What part of the time each measurement gets, flops twice; the compressors take what they take.
_PAIRS, _SWEEP, _PROCESSOR, _FLOPS, _COMPUTE = 0.18, 0.36, 0.1, 0.06, 0.24
_AVERAGES = 8  # that fit into the time of the processor, at least
_LEAST_UTILISATION, _UNKNOWN_UTILISATION = 1e-6, 0.4


@dataclass(frozen=True)
class Probe:
    """What was found. seconds: that it took, by measurement. remarks: what could not be measured, one sentence each."""

    cluster: Cluster
    seconds: dict[str, float]
    remarks: tuple[str, ...] = ()


def run_probe(world: World, config: RunConfig | None, seconds: float) -> Probe:
    """Measure links, collectives, compressors and, with a run's configuration, its computing. Collective.

    Args:
        seconds: for all of it, without the reading of the run's data.
    Raises:
        ValueError: a world of one, or a configuration that does not fit this world.
    """
    if world.size == 1:
        raise ValueError(
            "one rank alone has no link to measure: start the probe on every host as the run would be, as in "
            "`thinwire lab --hosts 4 --rate 100mbit -- thinwire probe CONFIG`, or under torchrun, mpirun or srun"
        )
    cores_per_rank = _cores_per_rank(Lockstep(world.queue, world.device))
    lockstep = Lockstep(world.queue, world.device, cores_per_rank)
    clock = _Clock(lockstep)
    task = None if config is None else build_task(config, world.device)
    clock.lap("data")
    first_flops = measure_flops(lockstep, _FLOPS * seconds)
    clock.lap("matrix products")
    pairs = measure_pairs(lockstep, world.hosts, _PAIRS * seconds)
    clock.lap("pairs")
    names = [(level.name, level.size) for level in world.mesh.levels]
    sweeps = [sweep(lockstep, name, sorted(world.mesh.group(name)), _SWEEP * seconds / len(names)) for name, _ in names]
    levels = _levels(world, sweeps)
    clock.lap("collectives")
    reduces = [time for time in sweeps[-1] if time.operation == "all_reduce"]
    short = [time.size_bytes for time in reduces if time.median_s < _PROCESSOR * seconds / _AVERAGES]
    size_bytes = max(short, default=reduces[0].size_bytes)
    sent = sum(TwoShotMean(torch.float32).sent_bytes(size_bytes // 4, world.rank, world.size).values())
    busy_s = busy_s_per_byte(lockstep, size_bytes, sent, _PROCESSOR * seconds)
    clock.lap("processor")
    computes: tuple[ComputeSpeed, ...] = ()
    remarks: list[str] = []
    wanted = dict.fromkeys(EVERY)
    subject = None
    if config is not None and task is not None:
        computes = (measure_compute(lockstep, config, task, _COMPUTE * seconds),)
        subject = subject_of(config, world.size)
        wanted |= dict.fromkeys(_codecs_of(subject, world))
    clock.lap("compute")
    codecs = measure_codecs(lockstep, wanted)
    unknown = [codec for codec in wanted if codec not in codecs]
    remarks += [f"{codec} cannot be measured by itself; a plan takes no time for it" for codec in unknown]
    sweep_speed = measure_directions(lockstep)
    clock.lap("codecs")
    last_flops = measure_flops(lockstep, _FLOPS * seconds)
    clock.lap("matrix products")
    flops, drift = (first_flops + last_flops) / 2, last_flops / first_flops - 1
    hosts = tuple(world.hosts[rank] for rank in world.mesh.order)
    measured = Measured(
        hosts=hosts,
        cores_per_rank=cores_per_rank,
        drift=drift,
        cpu_s_per_byte=busy_s,
        sweep=sweep_speed,
        codecs=codecs,
        computes=computes,
        pairs=pairs,
        collectives=tuple(time for times in sweeps for time in times),
    )
    remarks += measured.remarks
    cluster = Cluster(
        name=f"probe of {_some(list(dict.fromkeys(hosts)))}",
        levels=levels,
        device=Device(
            name=_device_name(world),
            memory_bytes=_memory_bytes(world, lockstep),
            peak_flops=flops,
            utilisation=_utilisation(subject, computes[0], flops) if subject else _UNKNOWN_UTILISATION,
        ),
        measured=measured,
    )
    return Probe(cluster, clock.laps, tuple(remarks))


class _Clock:
    """Seconds of each measurement, of the slowest rank."""

    def __init__(self, lockstep: Lockstep) -> None:
        self.laps: dict[str, float] = {}
        self._lockstep = lockstep
        self._last = lockstep.now()

    def lap(self, name: str) -> None:
        here = self._lockstep.now()
        self.laps[name] = self.laps.get(name, 0.0) + self._lockstep.slowest(here - self._last)
        self._last = here


def _levels(world: World, sweeps: Sequence[Sequence[CollectiveTime]]) -> tuple[LinkLevel, ...]:
    """Each level's link: as fast as its all-reduces say, with as many ranks on it as a group of the level before."""
    mean, found, before = TwoShotMean(torch.float32), [], 1
    for level, times in zip(world.mesh.levels, sweeps, strict=True):
        # Of a group's ranks, those of the level before are joined by faster links.
        across = 1 - (before - 1) / (level.size - 1)
        size = level.size

        def sent_bytes(size_bytes: int, size: int = size, across: float = across) -> int:
            return round(across * sum(mean.sent_bytes(size_bytes // 4, 0, size).values()))

        link = fit(times, sent_bytes)
        reduces = [time for time in times if time.operation == "all_reduce"]
        found.append(
            LinkLevel(
                name=level.name,
                size=size,
                link_bps=link.bps * before,
                latency_s=link.latency_s,
                ranks_per_link=before,
                shots=tuple((sent_bytes(time.size_bytes) / 2, time.median_s / 2) for time in reduces),
            )
        )
        before = size
    return tuple(found)


def _codecs_of(subject: Subject, world: World) -> list[str]:
    """Labels of what the run encodes with."""
    levels = tuple((level.name, level.size) for level in world.mesh.levels)
    seat = Seat(world.rank, tuple(world.mesh.level_of_peer()), levels)
    forecast = forecast_run(subject, seat)
    return [coding.codec for exchange in forecast.exchanges for coding in exchange.coding]


def _utilisation(subject: Subject, speed: ComputeSpeed, flops: float) -> float:
    """The share of the matrix products' speed that the run's forward and backward pass have got."""
    trace = subject.trace
    done = trace.forward_flops + (trace.backward_flops if speed.backward_s else 0)
    reached = done / max(speed.forward_s + speed.backward_s, 1e-9)
    return min(1.0, max(_LEAST_UTILISATION, reached / flops))


def _some(names: list[str]) -> str:
    """All of a few, the first and the last of many."""
    return ", ".join(names) if len(names) <= 4 else f"{names[0]} to {names[-1]} ({len(names)} hosts)"


def _device_name(world: World) -> str:
    if world.device.type == "cuda":
        return torch.cuda.get_device_name(world.device)
    return f"CPU, {torch.get_num_threads()} threads"


def _memory_bytes(world: World, lockstep: Lockstep) -> float:
    """Of the rank that has least; those of one host share its memory."""
    if world.device.type == "cuda":
        own = float(torch.cuda.get_device_properties(world.device).total_memory)
    else:
        own = psutil.virtual_memory().total / _sharing(lockstep)
    return min(row[0] for row in lockstep.share([own]))


def _cores_per_rank(lockstep: Lockstep) -> float:
    """What the machine has for each of its ranks; a quota is shared by the ranks of one control group."""
    group = zlib.crc32(f"{this_host()} {cpu_group()}".encode())
    quota = processor_quota() / _alike(lockstep, group)
    own = min((os.cpu_count() or 1) / _sharing(lockstep), usable_processors(), quota)
    return min(row[0] for row in lockstep.share([own]))


def _sharing(lockstep: Lockstep) -> int:
    """Ranks on this rank's machine, those in other containers and on other emulated hosts included."""
    return _alike(lockstep, zlib.crc32(this_host().boot_id.encode()))


def _alike(lockstep: Lockstep, digest: int) -> int:
    """Ranks that give the same."""
    return sum(row[0] == digest for row in lockstep.share([float(digest)]))
