"""World: this process's place in the job, with everything that communication needs set up."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import TracebackType
from typing import Annotated, Literal

import torch
import torch.distributed as dist
from pydantic import AfterValidator, Field
from torch.distributed import ProcessGroup

from thinwire.comm.errors import CommError
from thinwire.comm.liveness import PeerMonitor
from thinwire.comm.meter import TrafficMeter
from thinwire.comm.queue import CommQueue
from thinwire.comm.settings import Settings
from thinwire.comm.verdict import Verdict
from thinwire.dist.host import Host, distinct_names, this_host
from thinwire.dist.interface import (
    Interface,
    check_interface_name,
    interface_named,
    interface_to,
    loopback_interface,
)
from thinwire.dist.mesh import Mesh, MeshSettings, build_mesh
from thinwire.dist.place import Place
from thinwire.dist.rendezvous import check_in, open_store
from thinwire.dist.topology import GpuPlace, local_gpu

_MAX_REASON = 2000  # characters that fit into one datagram


class WorldSettings(Settings):
    """Deadlines, network interface, device and CPU threads of every rank.

    timeout_s: deadline of every operation, in seconds.
    rendezvous_timeout_s: how long the ranks wait for each other at the start, in seconds.
    interface: network interface for gloo; auto is the one that routes to the head node.
    device: auto is cuda where there is a GPU.
    threads: CPU threads of one rank's operators; auto is the machine's CPUs divided by the ranks on it, those in other
      containers or emulated hosts included. Neither OMP_NUM_THREADS nor a CPU mask changes it: the number of threads
      changes the last bits of sums.
    """

    timeout_s: float = Field(default=60.0, gt=0)
    rendezvous_timeout_s: float = Field(default=300.0, gt=0)
    interface: Annotated[str, AfterValidator(check_interface_name)] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"


@dataclass
class World:
    """One rank's view of the job. A context manager: leaving it well closes it, leaving it by an exception hurries.

    hosts: a name for every rank's host, equal exactly where the hosts are.
    interface: what gloo talks through on this host.
    group: all ranks; for set-up and control only, gradients go through the queue.
    queue: communication in submission order, on a process group of its own over all ranks.
    """

    place: Place
    settings: WorldSettings
    rank: int
    size: int
    local_rank: int
    host: str
    hosts: tuple[str, ...]
    interface: Interface
    device: torch.device
    backend: str
    store: dist.Store
    group: ProcessGroup
    mesh: Mesh
    meter: TrafficMeter
    monitor: PeerMonitor
    queue: CommQueue

    def describe(self) -> str:
        """Two lines for the start of a run: who is here, over what they talk, and the levels."""
        return (
            f"rank {self.rank} of {self.size} on {self.host}, launcher: {self.place.launcher}; {self.backend} over "
            f"{self.interface.name} ({self.interface.address}); {self.device}, {torch.get_num_threads()} CPU threads\n"
            + self.mesh.describe()
        )

    def close(self, *, together: bool = True) -> None:
        """Leave the job together with all other ranks. Collective.

        Args:
            together: False: without waiting for the others, some of which are known to be gone.
        Raises:
            PeerLostError, PeerLateError, PeerFailedError: another rank did not come to the end.
        """
        try:
            if together and self.size > 1 and self.monitor.verdict is None:
                here = torch.zeros(1, device=self.device)
                self.queue.submit("world/close", lambda channel: channel.all_gather_same(here)).wait()
        finally:
            self._tear_down()

    def __enter__(self) -> World:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        # The others cannot be waited for: they may be what went wrong. If not, they learn why this rank leaves.
        if not isinstance(error, CommError):
            why = f"rank {self.rank} on {self.host}: {type(error).__name__}: {error}"
            self.monitor.announce(Verdict("failed", "leave", (self.rank,), why[:_MAX_REASON]))
        self._tear_down()

    def _tear_down(self) -> None:
        self.queue.close()
        self.monitor.close()
        # Modules with hooks and meshes hold groups in cycles; a group that outlives this ends the process by an abort.
        gc.collect()
        dist.destroy_process_group()
        _tell_gloo(self.place.interface)


def join(place: Place, settings: WorldSettings, mesh: MeshSettings) -> World:
    """Meet the other ranks and set up devices, threads, process groups, mesh, meter and queue. Collective.

    Raises:
        RendezvousError: the ranks did not find each other; names the address, the port and who is missing.
        ValueError: a setting asks for what this host does not have.
    """
    if dist.is_initialized():
        raise ValueError(
            "torch.distributed is initialised already: call thinwire.init() before anything else that does it; DDP, "
            "FSDP2, accelerate and Lightning then use the process group that is there"
        )
    device = _pick_device(settings, place)
    store = open_store(place, settings.rendezvous_timeout_s)
    gpu = local_gpu(device)
    record = {"host": asdict(this_host()), "gpu": gpu.to_json() if gpu else None}
    records = check_in(store, place, record, settings.rendezvous_timeout_s)
    machines = [Host(**entry["host"]) for entry in records]
    hosts = distinct_names(machines)
    torch.set_num_threads(_pick_threads(settings, machines, place.rank))
    gpus = [GpuPlace.from_json(entry["gpu"]) if entry["gpu"] else None for entry in records]
    _check_one_rank_per_gpu(hosts, gpus)
    used = _pick_interface(settings, place, hosts, store)
    _tell_gloo(used.name)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("group", store),
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(seconds=settings.timeout_s),
    )
    group = dist.group.WORLD
    # The queue keeps the deadline itself; its group's own only ends what nobody waits for any more.
    private = dist.new_group(timeout=timedelta(seconds=2 * settings.timeout_s))
    assert group is not None
    assert isinstance(private, ProcessGroup)
    levels = build_mesh(mesh, rank=place.rank, hosts=hosts, gpus=gpus)
    meter = TrafficMeter(levels.level_of_peer())
    monitor = PeerMonitor.meet(store, place.rank, place.world_size, used.address, settings.timeout_s)
    return World(
        place=place,
        settings=settings,
        rank=place.rank,
        size=place.world_size,
        local_rank=place.local_rank,
        host=hosts[place.rank],
        hosts=hosts,
        interface=used,
        device=device,
        backend=backend,
        store=store,
        group=group,
        mesh=levels,
        meter=meter,
        monitor=monitor,
        queue=CommQueue(private, meter=meter, monitor=monitor, timeout_s=settings.timeout_s),
    )


def _tell_gloo(name: str | None) -> None:
    """Name the interface by the one means that reaches every gloo group, also those that others make later."""
    if name is None:
        os.environ.pop("GLOO_SOCKET_IFNAME", None)
    else:
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _pick_device(settings: WorldSettings, place: Place) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if settings.device == "cpu" or (settings.device == "auto" and count == 0):
        return torch.device("cpu")
    if count == 0:
        raise ValueError("world.device: cuda, but torch finds no GPU on this host; `thinwire doctor` tells why")
    index = 0 if count == 1 else place.local_rank  # some launchers show each rank only its own GPU
    if index >= count:
        raise ValueError(
            f"world.device: {settings.device}, but local rank {place.local_rank} of {place.local_world_size} has no "
            f"GPU: torch finds {count} on this host; start fewer ranks on it, or set world.device to cpu"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def _check_one_rank_per_gpu(hosts: Sequence[str], gpus: Sequence[GpuPlace | None]) -> None:
    """NCCL refuses two ranks on one GPU, in other words. It happens when two launchers share a host."""
    first: dict[tuple[str, str], int] = {}
    for rank, (host, gpu) in enumerate(zip(hosts, gpus, strict=True)):
        if gpu is None:
            continue
        other = first.setdefault((host, gpu.uuid), rank)
        if other != rank:
            raise ValueError(
                f"world.device: ranks {other} and {rank} on {host} have the same GPU, {gpu.name} at {gpu.pci}: give "
                "each launcher on one host other GPUs with CUDA_VISIBLE_DEVICES, or set world.device to cpu"
            )


def _pick_threads(settings: WorldSettings, hosts: Sequence[Host], rank: int) -> int:
    if settings.threads != "auto":
        return settings.threads
    sharing = sum(host.boot_id == hosts[rank].boot_id for host in hosts)
    return max(1, (os.cpu_count() or 1) // sharing)


def _pick_interface(settings: WorldSettings, place: Place, hosts: Sequence[str], store: dist.Store) -> Interface:
    """What gloo talks through. Collective: the head node cannot tell from its own address, so it asks another host."""
    asked = settings.interface
    if place.interface is not None:
        check_interface_name(place.interface)
        if asked not in ("auto", place.interface):
            raise ValueError(
                f"world.interface: {asked}, but the environment says GLOO_SOCKET_IFNAME={place.interface}; drop one"
            )
        asked = place.interface
    away = [rank for rank, host in enumerate(hosts) if host != hosts[0]]
    if asked != "auto":
        used = interface_named(asked)
    elif not away:
        used = loopback_interface()
    elif place.rank in away:
        used = interface_to(place.master_addr)
    else:
        used = interface_to(store.get(f"address/{away[0]}").decode())
    store.set(f"address/{place.rank}", used.address)
    return used
