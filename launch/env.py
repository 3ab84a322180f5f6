"""Which launcher started this process, and what place in the job it gave. The only reader of environment variables."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from thinwire.dist.place import Place
from thinwire.launch import slurm

T = TypeVar("T")


class LaunchError(ValueError):
    """The environment describes no place in a job, or two that contradict each other."""


@dataclass(frozen=True)
class Launcher:
    """How one launcher tells a process its place: the names of its variables, and how one starts it."""

    name: str
    title: str
    rank: str
    size: str
    local_rank: str
    local_size: str
    node: str | None
    command: str

    @property
    def is_mpi(self) -> bool:
        return self.name in ("openmpi", "mpich", "mvapich2")


_MPIRUN = "mpirun -n {size} {command}"
_TORCHRUN = "torchrun --nnodes NODES --nproc-per-node RANKS --rdzv-backend c10d --rdzv-endpoint HEAD:29500 {target}"

# In order of precedence: a launcher that can run inside another one comes first.
LAUNCHERS = (
    Launcher("torchrun", "torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", _TORCHRUN),
    Launcher(
        "openmpi",
        "Open MPI's mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        None,
        _MPIRUN,
    ),
    Launcher(
        "mvapich2",
        "MVAPICH2's mpirun",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
        None,
        _MPIRUN,
    ),
    Launcher(
        "mpich",
        "the mpirun of MPICH or Intel MPI",
        "PMI_RANK",
        "PMI_SIZE",
        "MPI_LOCALRANKID",
        "MPI_LOCALNRANKS",
        None,
        _MPIRUN,
    ),
    Launcher(
        "slurm",
        "srun",
        "SLURM_PROCID",
        "SLURM_NTASKS",
        "SLURM_LOCALID",
        "SLURM_STEP_TASKS_PER_NODE",
        "SLURM_NODEID",
        "srun --kill-on-bad-exit --ntasks {size} {command}",
    ),
)


def detect(environ: Mapping[str, str] = os.environ) -> Place:
    """Read this process's place in the job from its launcher's variables; a process without any is a job of its own.

    Knows torchrun, the lab, Open MPI, MPICH (also Intel MPI), MVAPICH2 and Slurm, in this order where one runs inside
    another. MASTER_ADDR and MASTER_PORT, where the launcher does not set them but the user does, replace what would be
    chosen. Under MPI without them this is a collective call: rank 0 tells the others where to meet.

    Raises:
        LaunchError: a variable is missing or malformed, or two launchers contradict each other.
    """
    found = [launcher for launcher in LAUNCHERS if _claims(launcher, environ)]
    if not found:
        _refuse_allocation_without_srun(environ)
        return Place("single", 0, 1, 0, 1, 0, "127.0.0.1", 0, interface=_interface(environ))
    launcher, *outer = found
    rank, size = _rank_and_size(launcher, environ)
    for other in outer:
        _check_agreement(launcher, other, rank, size, environ)
    if launcher.is_mpi:
        return _mpi_place(launcher, rank, size, environ)
    if launcher.name == "slurm":
        return _slurm_place(launcher, rank, size, environ)
    return _torchrun_place(launcher, rank, size, environ)


def _claims(launcher: Launcher, environ: Mapping[str, str]) -> bool:
    if launcher.name == "slurm":
        return slurm.is_step(environ)
    if launcher.name == "mpich" and launcher.local_rank not in environ and slurm.is_step(environ):
        return False  # srun --mpi=pmi2 sets PMI_RANK too, and is Slurm all the same
    return launcher.rank in environ or launcher.size in environ


def _rank_and_size(launcher: Launcher, environ: Mapping[str, str]) -> tuple[int, int]:
    size = _integer(launcher, launcher.size, environ, low=1)
    return _integer(launcher, launcher.rank, environ, high=size - 1), size


def _torchrun_place(launcher: Launcher, rank: int, size: int, environ: Mapping[str, str]) -> Place:
    local_size = _integer(launcher, launcher.local_size, environ, low=1, high=size)
    return Place(
        launcher="lab" if "THINWIRE_LAB" in environ else "torchrun",
        rank=rank,
        world_size=size,
        local_rank=_integer(launcher, launcher.local_rank, environ, high=local_size - 1),
        local_world_size=local_size,
        node_rank=_integer(launcher, "GROUP_RANK", environ) if "GROUP_RANK" in environ else None,
        master_addr=_text(launcher, "MASTER_ADDR", environ),
        master_port=_port(launcher, environ),
        generation=_integer(launcher, "TORCHELASTIC_RESTART_COUNT", {"TORCHELASTIC_RESTART_COUNT": "0", **environ}),
        agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        interface=_interface(environ),
    )


def _mpi_place(launcher: Launcher, rank: int, size: int, environ: Mapping[str, str]) -> Place:
    given = [name for name in ("MASTER_ADDR", "MASTER_PORT") if environ.get(name)]
    if len(given) == 1:
        raise LaunchError(
            f"{given[0]}={environ[given[0]]} is set and the other of MASTER_ADDR and MASTER_PORT is not: "
            "set both, or neither (then MPI distributes an address and a free port)"
        )
    if given:
        local_size = _integer(launcher, launcher.local_size, environ, low=1, high=size)
        local_rank = _integer(launcher, launcher.local_rank, environ, high=local_size - 1)
        addr, port = environ["MASTER_ADDR"], _port(launcher, environ)
        return Place(launcher.name, rank, size, local_rank, local_size, None, addr, port, interface=_interface(environ))
    from thinwire.launch import mpi

    try:
        meeting = mpi.meet()
    except mpi.MpiError as error:
        raise LaunchError(f"{launcher.title} started this process as rank {rank} of {size}, but {error}") from error
    if (meeting.rank, meeting.size) != (rank, size):
        raise LaunchError(
            f"{launcher.title} says rank {rank} of {size} ({launcher.rank}, {launcher.size}), but mpi4py says rank "
            f"{meeting.rank} of {meeting.size}: it has loaded another MPI, {meeting.library}. Start with the mpirun "
            f"that belongs to that library (look in {Path(sys.prefix) / 'bin'}), or install mpi4py beside the MPI "
            "whose mpirun you use"
        )
    return Place(
        launcher=launcher.name,
        rank=rank,
        world_size=size,
        local_rank=meeting.local_rank,
        local_world_size=meeting.local_size,
        node_rank=meeting.node_rank,
        master_addr=meeting.address,
        master_port=meeting.port,
        interface=_interface(environ),
        listener=meeting.listener,
    )


def _slurm_place(launcher: Launcher, rank: int, size: int, environ: Mapping[str, str]) -> Place:
    nodes = _slurm_list(launcher, ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"), environ)
    names = _parsed(slurm.expand_nodelist, nodes, environ)
    counts_name = _slurm_list(launcher, (launcher.local_size, "SLURM_TASKS_PER_NODE"), environ)
    counts = _parsed(slurm.expand_tasks_per_node, counts_name, environ)
    if sum(counts) != size:
        raise LaunchError(
            f"{counts_name}={environ[counts_name]} adds up to {sum(counts)} tasks, but {launcher.size} says {size}: "
            "variables of an outer step or script have leaked in; unset the SLURM_* variables before the inner srun"
        )
    node = _integer(launcher, "SLURM_NODEID", environ, high=len(counts) - 1)
    job = _integer(launcher, "SLURM_JOB_ID", environ)
    step = _integer(launcher, "SLURM_STEP_ID" if "SLURM_STEP_ID" in environ else "SLURM_STEPID", environ)
    local = len(counts) == 1
    return Place(
        launcher="slurm",
        rank=rank,
        world_size=size,
        local_rank=_integer(launcher, launcher.local_rank, environ, high=counts[node] - 1),
        local_world_size=counts[node],
        node_rank=node,
        # On one node no name needs to resolve.
        master_addr=environ.get("MASTER_ADDR") or ("127.0.0.1" if local else names[0]),
        master_port=_port(launcher, environ) if environ.get("MASTER_PORT") else slurm.rendezvous_port(job, step),
        generation=_integer(launcher, "SLURM_RESTART_COUNT", {"SLURM_RESTART_COUNT": "0", **environ}),
        interface=_interface(environ),
    )


def _refuse_allocation_without_srun(environ: Mapping[str, str]) -> None:
    """A plain process inside sbatch or salloc is one process, however many tasks the allocation has."""
    tasks = environ.get("SLURM_NTASKS", "1")
    if "SLURM_JOB_ID" in environ and tasks != "1":
        raise LaunchError(
            f"this is one plain process inside a Slurm allocation for {tasks} tasks (SLURM_NTASKS={tasks}), not one of "
            f"its tasks: start it with `srun --kill-on-bad-exit {_command()}`, or alone on purpose with "
            f"`srun --ntasks 1 {_command()}`"
        )


def _check_agreement(inner: Launcher, outer: Launcher, rank: int, size: int, environ: Mapping[str, str]) -> None:
    """Refuse two launchers that disagree about who this process is, unless one has rightly started the other."""
    if inner.is_mpi and outer.name == "slurm":
        return  # inside an allocation mpirun starts its daemons with srun, whose variables its ranks inherit
    outer_rank, outer_size = _rank_and_size(outer, environ)
    nodes = environ.get("GROUP_WORLD_SIZE") if inner.name == "torchrun" else None
    if outer_size == 1 or (outer_rank, outer_size) == (rank, size) or nodes == str(outer_size):
        return
    raise LaunchError(
        f"two launchers contradict each other: {inner.title} says rank {rank} of {size} ({inner.rank}, {inner.size}), "
        f"{outer.title} says rank {outer_rank} of {outer_size} ({outer.rank}, {outer.size}). Each of the {outer_size} "
        f"processes of {outer.title} is a job of its own this way. Use one launcher: "
        f"`{_corrected(outer, outer_size)}`; or, as torchrun wants one agent on each machine, start "
        f"`{_corrected(LAUNCHERS[0], size)}` once on every machine"
        + (f"; or `unset {inner.rank} {inner.size}` if they are left over from a shell" if not nodes else "")
    )


def _corrected(launcher: Launcher, size: int) -> str:
    return launcher.command.format(size=size, command=_command(), target=_command(for_torchrun=True))


def _command(for_torchrun: bool = False) -> str:
    """What the user started, to be repeated in a corrected command line."""
    program, *arguments = sys.argv or [""]
    name = Path(program).name
    if name in ("thinwire", "__main__.py") or not name:
        words = ["-m", "thinwire", *arguments] if for_torchrun else ["thinwire", *arguments]
    elif name.endswith(".py") and not for_torchrun:
        words = ["python", program, *arguments]
    else:
        words = [program, *arguments]
    return shlex.join(words)


def _interface(environ: Mapping[str, str]) -> str | None:
    return environ.get("GLOO_SOCKET_IFNAME") or None


def _text(launcher: Launcher, name: str, environ: Mapping[str, str]) -> str:
    value = environ.get(name, "").strip()
    if not value:
        others = [n for n in (launcher.rank, launcher.size) if n in environ and n != name]
        said = " and ".join(f"{n}={environ[n]}" for n in others)
        raise LaunchError(
            f"{name} is {'empty' if name in environ else 'not set'}, though {said} says that {launcher.title} started "
            f"this process: start it with `{_corrected(launcher, 2)}`, set {name} too, or unset {' and '.join(others)}"
            " to run alone"
        )
    return value


def _integer(
    launcher: Launcher, name: str, environ: Mapping[str, str], *, low: int = 0, high: int | None = None
) -> int:
    text = _text(launcher, name, environ)
    if text.isascii() and text.isdecimal() and low <= int(text) and (high is None or int(text) <= high):
        return int(text)
    allowed = f"a whole number from {low} on" if high is None else f"a whole number from {low} to {high}"
    raise LaunchError(f"{name}={text}: must be {allowed}; {launcher.title} sets it, so look who has changed it")


def _port(launcher: Launcher, environ: Mapping[str, str]) -> int:
    return _integer(launcher, "MASTER_PORT", environ, low=1, high=65535)


def _slurm_list(launcher: Launcher, names: tuple[str, ...], environ: Mapping[str, str]) -> str:
    name = next((name for name in names if environ.get(name)), names[0])
    _text(launcher, name, environ)
    return name


def _parsed(parse: Callable[[str], T], name: str, environ: Mapping[str, str]) -> T:
    try:
        return parse(environ[name])
    except ValueError as error:
        raise LaunchError(f"{name}={environ[name]}: {error}") from error
