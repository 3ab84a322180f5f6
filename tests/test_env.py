"""launch/env.py and launch/slurm.py: the place that each launcher's variables describe, and what is refused."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinwire.dist.place import Place
from thinwire.launch import mpi, slurm
from thinwire.launch.env import LaunchError, detect

Environ = dict[str, str]

# What the launchers really set, recorded from 3 ranks on 2 hosts (2 + 1), as rank 2 sees it.
TORCHRUN: Environ = {
    "RANK": "2",
    "WORLD_SIZE": "3",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RESTART_COUNT": "1",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
LAB: Environ = {
    "THINWIRE_LAB": "a1",
    **{k: v for k, v in TORCHRUN.items() if not k.startswith("TORCHELASTIC")},
}
MEETING_POINT: Environ = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
OPENMPI: Environ = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    "OMPI_COMM_WORLD_NODE_RANK": "0",
    "PMIX_RANK": "2",
}
HYDRA: Environ = {"PMI_RANK": "2", "PMI_SIZE": "3", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"}
MVAPICH: Environ = {
    "MV2_COMM_WORLD_RANK": "2",
    "MV2_COMM_WORLD_SIZE": "3",
    "MV2_COMM_WORLD_LOCAL_RANK": "0",
    "MV2_COMM_WORLD_LOCAL_SIZE": "1",
}
ALLOCATION: Environ = {
    "SLURM_JOB_ID": "4",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "3",
    "SLURM_TASKS_PER_NODE": "2,1",
    "SLURM_NNODES": "2",
}
BATCH: Environ = {**ALLOCATION, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
SRUN: Environ = {
    **ALLOCATION,
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
}


def without(environ: Environ, *names: str) -> Environ:
    return {name: value for name, value in environ.items() if name not in names}


PLACES = {
    "single": ({}, Place("single", 0, 1, 0, 1, 0, "127.0.0.1", 0)),
    "torchrun": (
        TORCHRUN,
        Place("torchrun", 2, 3, 0, 1, 1, "10.0.0.1", 29500, generation=1, agent_store=True),
    ),
    "lab": (LAB, Place("lab", 2, 3, 0, 1, 1, "10.0.0.1", 29500)),
    "openmpi": (OPENMPI | MEETING_POINT, Place("openmpi", 2, 3, 0, 1, None, "10.0.0.1", 29500)),
    "mpich": (HYDRA | MEETING_POINT, Place("mpich", 2, 3, 0, 1, None, "10.0.0.1", 29500)),
    "mvapich2": (MVAPICH | MEETING_POINT, Place("mvapich2", 2, 3, 0, 1, None, "10.0.0.1", 29500)),
    "slurm": (SRUN, Place("slurm", 2, 3, 0, 1, 1, "node1", slurm.rendezvous_port(4, 0))),
    "slurm: requeued": (
        SRUN | {"SLURM_RESTART_COUNT": "2"},
        Place("slurm", 2, 3, 0, 1, 1, "node1", slurm.rendezvous_port(4, 0), generation=2),
    ),
    "slurm: a step of one node, in a job of two": (
        SRUN
        | {"SLURM_STEP_NODELIST": "node2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NTASKS": "2"}
        | {"SLURM_PROCID": "1", "SLURM_NODEID": "0", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "7"},
        Place("slurm", 1, 2, 1, 2, 0, "127.0.0.1", slurm.rendezvous_port(4, 7)),
    ),
    "slurm: older names of the same": (
        without(SRUN, "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_ID") | {"SLURM_STEPID": "0"},
        Place("slurm", 2, 3, 0, 1, 1, "node1", slurm.rendezvous_port(4, 0)),
    ),
    "slurm: a place of the user's choice": (
        SRUN | MEETING_POINT,
        Place("slurm", 2, 3, 0, 1, 1, "10.0.0.1", 29500),
    ),
    "slurm with its own PMI": (
        SRUN | {"PMI_RANK": "2", "PMI_SIZE": "3", "PMI_FD": "11"},
        Place("slurm", 2, 3, 0, 1, 1, "node1", slurm.rendezvous_port(4, 0)),
    ),
    "a batch script for one task": (
        BATCH | {"SLURM_NTASKS": "1"},
        Place("single", 0, 1, 0, 1, 0, "127.0.0.1", 0),
    ),
    "an interface of the user's choice": (
        {"GLOO_SOCKET_IFNAME": "eth7"},
        Place("single", 0, 1, 0, 1, 0, "127.0.0.1", 0, interface="eth7"),
    ),
    "torchrun in a batch script": (
        BATCH | without(TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"),
        Place("torchrun", 2, 3, 0, 1, 1, "10.0.0.1", 29500),
    ),
    "srun starts one torchrun on each node": (
        LAB | SRUN | {"SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_PROCID": "1"},
        Place("lab", 2, 3, 0, 1, 1, "10.0.0.1", 29500),
    ),
    "mpirun -n 1 starts a torchrun": (
        LAB | OPENMPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        Place("lab", 2, 3, 0, 1, 1, "10.0.0.1", 29500),
    ),
    "a script that hands mpirun's numbers on": (
        without(LAB, "GROUP_RANK", "GROUP_WORLD_SIZE") | OPENMPI,
        Place("lab", 2, 3, 0, 1, None, "10.0.0.1", 29500),
    ),
    "mpirun in an allocation inherits the variables of its daemon": (
        HYDRA | MEETING_POINT | SRUN | {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"},
        Place("mpich", 2, 3, 0, 1, None, "10.0.0.1", 29500),
    ),
}


@pytest.mark.parametrize(("environ", "place"), PLACES.values(), ids=PLACES)
def test_place(environ: Environ, place: Place) -> None:
    assert detect(environ) == place


REFUSED = {
    "missing": (without(TORCHRUN, "WORLD_SIZE"), ["WORLD_SIZE is not set", "RANK=2"]),
    "missing rank": (without(TORCHRUN, "RANK"), ["RANK is not set", "WORLD_SIZE=3"]),
    "missing local rank": (without(TORCHRUN, "LOCAL_RANK"), ["LOCAL_RANK is not set", "torchrun --nnodes"]),
    "missing address": (without(LAB, "MASTER_ADDR"), ["MASTER_ADDR is not set"]),
    "empty": (TORCHRUN | {"MASTER_ADDR": " "}, ["MASTER_ADDR is empty"]),
    "no number": (TORCHRUN | {"RANK": "two"}, ["RANK=two", "whole number from 0 to 2"]),
    "negative": (TORCHRUN | {"RANK": "-1"}, ["RANK=-1", "whole number from 0 to 2"]),
    "rank outside of the world": (TORCHRUN | {"RANK": "3"}, ["RANK=3", "whole number from 0 to 2"]),
    "no rank at all": (TORCHRUN | {"WORLD_SIZE": "0"}, ["WORLD_SIZE=0", "from 1 on"]),
    "more local ranks than ranks": (TORCHRUN | {"LOCAL_WORLD_SIZE": "4"}, ["LOCAL_WORLD_SIZE=4", "from 1 to 3"]),
    "local rank outside": (TORCHRUN | {"LOCAL_RANK": "1"}, ["LOCAL_RANK=1", "from 0 to 0"]),
    "no port": (TORCHRUN | {"MASTER_PORT": "65536"}, ["MASTER_PORT=65536", "from 1 to 65535"]),
    "half a meeting point": (OPENMPI | {"MASTER_PORT": "29500"}, ["MASTER_PORT=29500", "both, or neither"]),
    "open mpi, malformed": (OPENMPI | {"OMPI_COMM_WORLD_SIZE": "1e3"}, ["OMPI_COMM_WORLD_SIZE=1e3"]),
    "hydra, missing": (without(HYDRA | MEETING_POINT, "MPI_LOCALRANKID"), ["MPI_LOCALRANKID is not set"]),
    "bad node list": (SRUN | {"SLURM_STEP_NODELIST": "node[1-"}, ["SLURM_STEP_NODELIST=node[1-", "brackets"]),
    "bad task list": (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2,x"}, ["SLURM_STEP_TASKS_PER_NODE=2,x"]),
    "no node list": (without(SRUN, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"), ["SLURM_STEP_NODELIST is not set"]),
    "leaked task list": (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2"}, ["adds up to 2", "SLURM_NTASKS says 3"]),
    "node outside": (SRUN | {"SLURM_NODEID": "2"}, ["SLURM_NODEID=2", "from 0 to 1"]),
    "sbatch without srun": (
        BATCH,
        ["SLURM_NTASKS=3", "`srun --kill-on-bad-exit thinwire train c.yaml`", "srun --ntasks 1 thinwire"],
    ),
    "salloc without srun": (ALLOCATION, ["SLURM_NTASKS=3", "`srun --kill-on-bad-exit thinwire train c.yaml`"]),
    "each rank of mpirun starts a torchrun": (
        TORCHRUN | {"GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"} | OPENMPI | {"OMPI_COMM_WORLD_SIZE": "4"},
        ["rank 2 of 3 (RANK, WORLD_SIZE)", "rank 2 of 4", "`mpirun -n 4 thinwire train c.yaml`", "-m thinwire train"],
    ),
    "each task of srun starts a torchrun": (
        TORCHRUN | {"GROUP_WORLD_SIZE": "1"} | SRUN | {"SLURM_PROCID": "1"},
        ["srun says rank 1 of 3", "`srun --kill-on-bad-exit --ntasks 3 thinwire train c.yaml`"],
    ),
    "variables left over in the shell": (
        {"RANK": "0", "WORLD_SIZE": "1", **OPENMPI},
        ["contradict", "unset RANK WORLD_SIZE"],
    ),
    "one mpirun inside another": (OPENMPI | HYDRA | {"PMI_SIZE": "2", "PMI_RANK": "1"}, ["contradict", "rank 1 of 2"]),
}


@pytest.mark.parametrize(("environ", "said"), REFUSED.values(), ids=REFUSED)
def test_refused(environ: Environ, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/opt/bin/thinwire", "train", "c.yaml"])
    with pytest.raises(LaunchError) as caught:
        detect(environ)
    for text in said:
        assert text in str(caught.value)


def test_corrected_command_repeats_what_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["my train.py", "--lr", "1e-3"])
    with pytest.raises(LaunchError, match=r"`srun --kill-on-bad-exit python 'my train.py' --lr 1e-3`"):
        detect(BATCH)


def test_mpi_without_mpi4py_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    mpi.meet.cache_clear()
    with pytest.raises(LaunchError, match=r"rank 2 of 3, but mpi4py.*pip install mpi4py"):
        detect(OPENMPI)


def test_mpirun_of_another_mpi_than_mpi4py_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = mpi.Meeting(0, 1, 0, 1, 0, "127.0.0.1", 40000, "MPICH Version: 5.0.2")
    monkeypatch.setattr(mpi, "meet", lambda: alone)
    with pytest.raises(
        LaunchError, match=r"rank 2 of 3 .* rank 0 of 1: it has loaded another MPI, MPICH Version: 5.0.2"
    ):
        detect(OPENMPI)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node[01-03,7],gpu-a", ["node01", "node02", "node03", "node7", "gpu-a"]),
        ("a", ["a"]),
        ("a,b", ["a", "b"]),
        ("r[1-2]n[09-10]-ib", ["r1n09-ib", "r1n10-ib", "r2n09-ib", "r2n10-ib"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("10.0.0.[1-2]", ["10.0.0.1", "10.0.0.2"]),
    ],
)
def test_node_list(text: str, names: list[str]) -> None:
    assert slurm.expand_nodelist(text) == names


@pytest.mark.parametrize("text", ["", "a,", "a[1", "a1]", "a[[1]]", "a[]", "a[3-1]", "a[x]", "a[1-99999999]"])
def test_no_node_list(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        slurm.expand_nodelist(text)


@pytest.mark.timeout(10)
def test_node_list_that_would_fill_the_memory() -> None:
    with pytest.raises(ValueError, match="more than 65536"):
        slurm.expand_nodelist("a[1-60000]b[1-60000]")


RANGES = st.tuples(st.integers(0, 10_000), st.integers(0, 30), st.integers(1, 6))
ITEMS = st.tuples(
    st.from_regex(r"[a-z][a-z-]{0,5}", fullmatch=True), st.lists(RANGES, max_size=3), st.sampled_from(["", "-ib"])
)


@given(st.lists(ITEMS, min_size=1, max_size=4))
def test_node_list_counts_out_every_range(items: list[tuple[str, list[tuple[int, int, int]], str]]) -> None:
    texts, names = [], []
    for prefix, ranges, suffix in items:
        numbers = [str(n).zfill(w) for first, more, w in ranges for n in range(first, first + more + 1)]
        texts_of_ranges = [f"{first:0{w}d}-{first + more:0{w}d}" for first, more, w in ranges]
        texts.append(prefix + (f"[{','.join(texts_of_ranges)}]" if ranges else "") + suffix)
        names += [f"{prefix}{number}{suffix}" for number in (numbers or [""])]
    assert slurm.expand_nodelist(",".join(texts)) == names


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(1, 50)), min_size=1, max_size=6))
def test_tasks_per_node(runs: list[tuple[int, int]]) -> None:
    text = ",".join(f"{tasks}(x{count})" if count > 1 else str(tasks) for tasks, count in runs)
    assert slurm.expand_tasks_per_node(text) == [tasks for tasks, count in runs for _ in range(count)]


@pytest.mark.parametrize("text", ["", "2,", "x", "2(3)", "2(x)", "-1", "2(x999999999)"])
def test_no_tasks_per_node(text: str) -> None:
    with pytest.raises(ValueError, match="is not of the form"):
        slurm.expand_tasks_per_node(text)


def test_ports_of_the_steps_of_one_job_differ_and_are_usable() -> None:
    ports = [slurm.rendezvous_port(job, step) for job in (4, 5, 1_234_567) for step in range(40)]
    assert len(set(ports)) == len(ports)
    assert all(1024 < port < 32768 for port in ports)
