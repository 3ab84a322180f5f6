"""A process's place in the job, as its launcher describes it. Imports no torch."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Place:
    """Who this process is and where it meets the others.

    launcher: "single", "torchrun", "openmpi", "mpich", "mvapich2", "slurm" or "lab".
    rank, world_size, local_rank, local_world_size: as usual; local means on the same host.
    node_rank: index of the host, None where the launcher does not say.
    master_addr, master_port: where rank 0 serves the rendezvous store.
    generation: how often the launcher has restarted the job, so that no rank reads what an earlier attempt stored.
    agent_store: the launcher itself serves a store at the master's address, so rank 0 must not.
    interface: the network interface that the launcher's environment asks gloo to use, None where it does not.
    listener: rank 0's socket, already bound to master_port, where the launcher left the choice of the port to it.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int | None
    master_addr: str
    master_port: int
    generation: int = 0
    agent_store: bool = False
    interface: str | None = None
    listener: socket.socket | None = field(default=None, compare=False, repr=False)
