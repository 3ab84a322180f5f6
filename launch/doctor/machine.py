"""The machine: its GPUs and what joins them, its network, Slurm, and whether it can hold a lab."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
from typing import Any

import psutil

from thinwire.dist.interface import Interface, interface_named, interface_to, loopback_interface
from thinwire.dist.mesh import MeshSettings, build_mesh
from thinwire.dist.place import Place
from thinwire.dist.processors import processor_quota, usable_processors
from thinwire.dist.topology import GpuPlace, list_gpus
from thinwire.launch.doctor.finding import Finding
from thinwire.launch.doctor.import_probe import ProbeError

_FAR_AWAY = "198.51.100.1"  # reserved for documentation (RFC 5737): what routes there is the default route


def check_machine() -> Finding:
    """Processor and memory."""
    memory_gb = psutil.virtual_memory().total / 1e9
    cpus = f"{os.cpu_count()} CPUs"
    usable = min(usable_processors(), processor_quota())
    if usable < (os.cpu_count() or 1):
        cpus += f" ({usable:g} usable by this process)"
    return Finding("machine", "ok", f"{platform.system()} {platform.machine()}, {cpus}, {memory_gb:.0f} GB memory")


def check_gpus(probed: dict[str, Any] | ProbeError, nvml: Any = None) -> Finding:
    """The GPUs, as the driver and as torch see them, and the levels that their links make."""
    places, reason = list_gpus(nvml)
    seen = probed["gpus"] if isinstance(probed, dict) else []
    if not places and not seen:
        lost = "training on GPUs (the CPU is used)"
        return Finding("gpus", "limited", "none", detail=reason, without=lost, remedy="an NVIDIA GPU and its driver")
    names = [place.name for place in places] or seen
    found = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    detail = "; ".join([*_links(places), *sorted({text for place in places for text in place.unanswered})])
    if isinstance(probed, dict) and not seen:
        cpu_build = not probed["cuda"] and not probed["hip"]
        why = "torch is built for the CPU only" if cpu_build else f"torch finds none: {probed['gpu_error'] or 'hidden'}"
        remedy = (
            "install the CUDA build of torch that fits the driver: pytorch.org/get-started"
            if cpu_build
            else "look at CUDA_VISIBLE_DEVICES and at the driver's version (nvidia-smi)"
        )
        return Finding("gpus", "limited", found, True, detail, f"training on these GPUs: {why}", remedy)
    return Finding("gpus", "ok", found, shared=True, detail=detail)


def _links(places: list[GpuPlace]) -> list[str]:
    if not places:
        return []
    mesh = build_mesh(MeshSettings(), rank=0, hosts=["here"] * len(places), gpus=places)
    pair = mesh.level("pair")
    links = sorted({place.nvlinks for place in places})
    counted = f"{'-'.join(map(str, {links[0], links[-1]}))} NVLinks each" if links[-1] else "no NVLink"
    switched = ", through switches" if any(place.nvswitch_links for place in places) else ""
    numa = {place.numa_node for place in places} - {None}
    joined = f"joined in groups of {pair.size} by {pair.joined_by}" if pair.name == "pair" and pair.size > 1 else ""
    return [text for text in (counted + switched, joined, f"{len(numa)} NUMA nodes" if len(numa) > 1 else "") if text]


def check_network(place: Place | None) -> Finding:
    """The interfaces of this host, and the one that gloo will talk through."""
    stats = psutil.net_if_stats()
    listed = [
        f"{name} {entry.address}"
        for name, entries in sorted(psutil.net_if_addrs().items())
        for entry in entries
        if entry.family == socket.AF_INET and name in stats and stats[name].isup
    ]
    detail = "up: " + ", ".join(listed)
    if place is None or place.world_size == 1:
        try:
            route = interface_to(_FAR_AWAY)
        except OSError:
            lost = "jobs on several hosts"
            return Finding("network", "limited", "no default route", False, detail, lost, "connect a network")
        return Finding("network", "ok", f"default route through {route.name} ({route.address})", detail=detail)
    try:
        used = _gloo_interface(place)
    except (OSError, ValueError) as error:
        why = f"this job: no route to the head node {place.master_addr} ({error})"
        remedy = "use a name or address of rank 0's host that this host reaches (MASTER_ADDR, torchrun's endpoint)"
        return Finding("network", "problem", "no route to the head node", False, detail, why, remedy)
    head = f"{place.master_addr}:{place.master_port}"
    return Finding("network", "ok", f"gloo talks through {used.name} ({used.address}), head node {head}", detail=detail)


def _gloo_interface(place: Place) -> Interface:
    if place.interface:
        return interface_named(place.interface)
    if place.local_world_size == place.world_size:
        return loopback_interface()
    head = socket.gethostbyname(place.master_addr)
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == head for entry in entries):
            return Interface(name, head)  # this is the head: the others come in by this address
    return interface_to(place.master_addr)


def check_launcher(place: Place | None, refusal: str) -> Finding:
    """Who started this process, and as which rank."""
    if place is None:
        return Finding("launcher", "problem", "contradictory or incomplete", without="this job", remedy=refusal)
    if place.launcher == "single":
        return Finding("launcher", "ok", "none: this process is alone")
    return Finding("launcher", "ok", f"{place.launcher}, {place.world_size} ranks", shared=True)


def check_slurm() -> Finding:
    """Slurm's srun, and whether a controller answers it."""
    lost = "srun as a launcher (torchrun and mpirun work without)"
    path = shutil.which("srun")
    if path is None:
        return Finding("slurm", "limited", "no srun", without=lost, remedy="log in to a machine of a Slurm cluster")
    try:
        # sinfo answers fast where there is a controller and gives up slowly where there is none.
        done = subprocess.run(
            ["sinfo", "--noheader", "--format=%P %D"], capture_output=True, text=True, timeout=5, check=False
        )
        said, answers = (done.stdout or done.stderr).split("\n"), done.returncode == 0
    except (OSError, subprocess.TimeoutExpired) as error:
        said, answers = [str(error)], False
    if not answers:
        remedy = "log in to a machine of a Slurm cluster, or start slurmctld and slurmd here"
        return Finding("slurm", "limited", "srun, but no controller answers", False, said[0], lost, remedy)
    return Finding("slurm", "ok", "srun, and its controller answers", detail="; ".join(filter(None, said)))


def check_lab() -> Finding:
    """Whether this machine can emulate a slow cluster."""
    from thinwire.launch.lab.why_not import why_not

    if reason := why_not():
        return Finding("lab", "limited", "not possible", without="thinwire lab and its demo", remedy=reason)
    if reason := why_not(delay=True):
        return Finding("lab", "limited", "possible, without delay", without="thinwire lab --delay", remedy=reason)
    return Finding("lab", "ok", "possible, with delay and loss")
