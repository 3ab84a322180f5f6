"""A process's place in the job, as its launcher describes it. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Who this process is and where it meets the others.

    launcher: "single", "torchrun", "openmpi", "mpich", "slurm" or "lab".
    rank, world_size, local_rank, local_world_size: as usual; local means on the same host.
    node_rank: index of the host, None where the launcher does not say.
    master_addr, master_port: where rank 0 serves the rendezvous store.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int | None
    master_addr: str
    master_port: int
