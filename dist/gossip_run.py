"""`method: gossip` of a training run: in a job that a launcher has started, or among machines that find each other."""

from __future__ import annotations

from typing import Literal

from thinwire.comm.gossip.post.machines import MachinesSettings
from thinwire.comm.gossip.settings import GossipSettings
from thinwire.dist.world import World


class GossipRunSettings(GossipSettings):
    """evaluate: what train.eval_every evaluates: own, the model of the machine that writes the metrics, which asks
      nobody; merged, the mean of all machines' weights, for which all must meet. At the end the merged one always is.
    machines: None in a fixed job (torchrun, mpirun, srun or one process): its ranks are the machines. Otherwise each
      machine is started alone, with the same configuration but for machines.rank, and may be killed and come back.
    """

    evaluate: Literal["own", "merged"] = "own"
    machines: MachinesSettings | None = None


def place_among_machines(settings: GossipRunSettings, world: World) -> tuple[int, int]:
    """(this machine's number, how many there are).

    Raises:
        ValueError: a launcher has started several ranks of machines that are each started alone.
    """
    machines = settings.machines
    if machines is None:
        return world.rank, world.size
    if world.size > 1:
        raise ValueError(
            f"method.machines: is given in a job of {world.size} ranks; start each machine alone, or remove it: the "
            "ranks of a fixed job find each other by their launcher"
        )
    return machines.rank, len(machines.machines)
