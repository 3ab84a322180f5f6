"""The same run on more and more devices of a cluster: weak and strong scaling."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from thinwire.dist.cluster_simulation.disturbances import Disturbances
from thinwire.dist.cluster_simulation.restarts import Recovery
from thinwire.dist.cluster_simulation.run import SimulatedRun, simulate_run
from thinwire.dist.plan.cluster import Cluster
from thinwire.dist.plan.forecasts import Subject
from thinwire.dist.plan.prediction import predict, subject_of

if TYPE_CHECKING:
    from thinwire.dist.config import RunConfig

Scaling: TypeAlias = Literal["weak", "strong"]
"""weak: every device keeps its share of the global batch. strong: the global batch stays, and shares shrink."""


@dataclass(frozen=True)
class ScalingPoint:
    """One number of devices. memory_bytes: of one, by state. efficiency: throughput for each device, over that of the
    fewest devices."""

    run: SimulatedRun
    memory_bytes: dict[str, int]
    fits: bool
    efficiency: float

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            **self.run.record(),
            "memory_bytes": self.memory_bytes,
            "fits_memory": self.fits,
            "efficiency": self.efficiency,
        }


def all_counts(cluster: Cluster) -> list[int]:
    """Whole groups of the level before the last, doubled and doubled, and the whole cluster."""
    counts = [cluster.levels[-2].size if len(cluster.levels) > 1 else 1]
    while 2 * counts[-1] < cluster.size:
        counts.append(2 * counts[-1])
    return list(dict.fromkeys([*counts, cluster.size]))


def config_for(config: RunConfig, cluster: Cluster, ranks: int, scaling: Scaling) -> RunConfig:
    """The run as it would be on so many devices of the cluster for whose whole it was written.

    Raises:
        ValueError: its batch cannot be divided so.
    """
    if scaling == "strong" or ranks == cluster.size:
        config.train.share(ranks)
        return config
    config.train.share(cluster.size)
    batch = config.train.global_batch // cluster.size * ranks
    return config.model_copy(update={"train": config.train.model_copy(update={"global_batch": batch})})


def simulate_scaling(
    config: RunConfig,
    cluster: Cluster,
    counts: Sequence[int],
    disturbances: Disturbances,
    recovery: Recovery,
    *,
    scaling: Scaling,
    simulated: int,
) -> Iterator[ScalingPoint]:
    """Simulate the run on each number of devices, in this order.

    Slow ranks that a smaller cluster has not are left out there.

    Raises:
        ValueError: the levels or the batch cannot be divided so, or see simulate_run().
    """
    subjects: dict[int, Subject] = {}
    first: SimulatedRun | None = None
    for ranks in counts:
        there = cluster.at(ranks)
        run_config = config_for(config, cluster, ranks, scaling)
        micro_batch, _ = run_config.train.share(ranks)
        if micro_batch not in subjects:
            subjects[micro_batch] = subject_of(run_config, ranks)
        subject = dataclasses.replace(subjects[micro_batch], config=run_config)
        prediction = predict(run_config, there, subject)
        slow = {rank: factor for rank, factor in disturbances.slow.items() if rank < ranks or ranks == max(counts)}
        run = simulate_run(
            prediction,
            dataclasses.replace(disturbances, slow=slow),
            recovery,
            numel=sum(parameter.numel for parameter in subject.parameters),
            simulated=simulated,
        )
        first = first or run
        each, base = run.sequences_per_s / run.ranks, first.sequences_per_s / first.ranks
        memory = dict(prediction.memory_bytes)
        yield ScalingPoint(run, memory, sum(memory.values()) <= cluster.device.memory_bytes, each / base)
