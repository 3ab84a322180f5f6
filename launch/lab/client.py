"""Lab: a slow cluster on this machine, as a context manager."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import thinwire
from thinwire.launch.lab.control import Connection, connect, lab_folder, running_labs
from thinwire.launch.lab.counters import InterfaceCounters
from thinwire.launch.lab.mpi import MPI_ENV, find_mpirun, mpi_command, write_agent
from thinwire.launch.lab.run import Member, Output, Run
from thinwire.launch.lab.spec import LabError, LabSpec, address

_FIRST_PORT = 29500
_END_S = 60.0
_UNCHANGED: Any = object()


class Links:
    """The links of a running lab, one's own or another's: `Links(lab_id)`. Every method raises LabError."""

    def __init__(self, lab_id: str) -> None:
        self.id = lab_id

    def cut(self, host: int) -> None:
        """Black-hole the link of `host`: frames leave and vanish, in both directions, and no interface goes down."""
        self._request({"do": "link", "host": host, "cut": True})

    def restore(self, host: int) -> None:
        """Undo `cut`."""
        self._request({"do": "link", "host": host, "cut": False})

    def slow(self, host: int, rate_bps: float | None = _UNCHANGED, delay_s: float = _UNCHANGED) -> None:
        """Give the link of `host` another rate (bits per second, None: unlimited) or delay (seconds, one way).

        A path between two hosts takes the mean of their delays. A delay can be set in a lab started with one.
        """
        changes = {"rate_bps": rate_bps, "delay_s": delay_s}
        given = {name: value for name, value in changes.items() if value is not _UNCHANGED}
        if not given:
            raise ValueError("slow: give rate_bps, delay_s or both")
        self._request({"do": "link", "host": host, **given})

    def counters(self) -> list[InterfaceCounters]:
        """What the interface of each host has counted since the lab was built."""
        return [InterfaceCounters(**fields) for fields in self._request({"do": "counters"})["counters"]]

    def describe(self) -> dict[str, Any]:
        """The spec of the lab and the present state of its links."""
        return self._request({"do": "describe"})

    def exec(
        self, host: int, command: Sequence[str], *, env: Mapping[str, str] | None = None, timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run one command on `host` and return its output. Raises TimeoutError (the command is then killed)."""
        member = Member(f"host{host}", host, os.environ if env is None else env)
        with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
            run = Run(
                connect(self.id), command, [member], folder=Path.cwd(), output="all", stdout=stdout, stderr=stderr
            )
            with run:
                run.wait(timeout_s)
            stdout.seek(0)
            stderr.seek(0)
            code = run.returncodes[0]
            assert code is not None
            return subprocess.CompletedProcess(list(command), code, stdout.read(), stderr.read())

    def _request(self, message: dict[str, Any]) -> dict[str, Any]:
        connection = connect(self.id)
        try:
            return connection.request(message)
        finally:
            connection.close()


class Lab(Links):
    """Hosts on this machine, one network namespace each, joined by links of a given rate, delay and loss.

    Imports no torch and forks nothing in this process: a guardian process owns the lab, and ends it when this
    process ends in whatever way. Traffic between ranks of one host is not limited. With `cores_per_rank` every process
    that is started computes at a pace of its own, whatever the others do (control groups, which take root's rights).

        with Lab(hosts=4, rate_bps=100e6) as lab:
            code = lab.start(["thinwire", "train", "config.yaml"]).wait()
            print(lab.counters()[0].tx_bytes)

    Arguments as in LabSpec. `open` raises LabError with the reason and the remedy where a machine forbids it.
    """

    def __init__(
        self,
        hosts: int = 4,
        rate_bps: float | None = None,
        delay_s: float = 0.0,
        loss: float = 0.0,
        ranks_per_host: int = 1,
        cores_per_rank: float | None = None,
    ) -> None:
        super().__init__(secrets.token_hex(3))
        self.spec = LabSpec(hosts, rate_bps, delay_s, loss, ranks_per_host, cores_per_rank)
        self._lifeline: Connection | None = None
        self._guardian: subprocess.Popen[bytes] | None = None
        self._runs: list[Run] = []

    def open(self) -> Lab:
        """Build the hosts. Raises LabError."""
        if sys.platform != "linux":
            raise LabError(
                f"the lab needs Linux's network namespaces, which {sys.platform} has not: use a Linux virtual machine"
            )
        running_labs()  # removes the folders of labs that were killed
        lab_folder(self.id).mkdir(mode=0o700)
        ours, theirs = socket.socketpair()
        self._lifeline = Connection(ours)
        module_path = str(Path(thinwire.__file__).resolve().parent.parent)
        python_path = os.pathsep.join(filter(None, [module_path, os.environ.get("PYTHONPATH")]))
        arguments = [self.id, self.spec.to_json(), str(theirs.fileno())]
        try:
            with theirs:
                self._guardian = subprocess.Popen(
                    [sys.executable, "-m", "thinwire.launch.lab.guardian", *arguments],
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, "PYTHONPATH": python_path},
                )
            answer = self._lifeline.receive()
            if answer is None or "error" in answer:
                raise LabError(answer["error"] if answer else "the lab's guardian process died; its error is above")
        except BaseException:
            self.close()
            raise
        return self

    def start(
        self,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        *,
        folder: Path | None = None,
        output: Output = "all",
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
    ) -> Run:
        """Start `command` as every rank of the lab.

        env: the ranks' environment, default that of this process; the rank's place is added to it.
        folder: working directory. stdout, stderr: of rank 0, default this process's own, untouched.
        output: of the other ranks: "all" (line by line to stderr, named), "rank0" (not shown; the last lines are in
        report()), or a folder that gets rank1.log and so on. Raises LabError.
        """
        port = _FIRST_PORT + len(self._runs)
        base = dict(os.environ if env is None else env)
        members = [
            Member(f"rank {rank}", rank // self.spec.ranks_per_host, {**base, **self._place(rank, port)})
            for rank in range(self.spec.world_size)
        ]
        return self._start(command, members, folder=folder, output=output, stdout=stdout, stderr=stderr)

    def start_mpi(
        self,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        *,
        folder: Path | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
    ) -> Run:
        """Start `command` on every host under one real mpirun, which runs on host 0 and is the run's only member.

        Open MPI or MPICH, whichever mpirun is beside this Python or first in PATH. Raises LabError.
        """
        environ = {**(os.environ if env is None else env), **MPI_ENV}
        agent = write_agent(lab_folder(self.id), self.id)
        argv = mpi_command(find_mpirun(environ), command, self.spec, agent, environ)
        members = [Member("mpirun", 0, environ)]
        return self._start(argv, members, folder=folder, output="all", stdout=stdout, stderr=stderr)

    def close(self) -> None:
        """End every process of the lab and remove it. Idempotent."""
        if self._lifeline is None:
            return
        self._lifeline.close()
        self._lifeline = None
        if self._guardian is not None:
            try:
                self._guardian.wait(_END_S)
            except subprocess.TimeoutExpired:
                self._guardian.kill()
                self._guardian.wait()
        shutil.rmtree(lab_folder(self.id), ignore_errors=True)  # only a guardian that was killed leaves it
        for run in self._runs:
            run.close()

    def __enter__(self) -> Lab:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, command: Sequence[str], members: Sequence[Member], *, folder: Path | None, **output: Any) -> Run:
        connection = connect(self.id)
        try:
            run = Run(connection, command, members, folder=folder or Path.cwd(), **output)
        except BaseException:
            connection.close()
            raise
        self._runs.append(run)
        return run

    def _place(self, rank: int, port: int) -> dict[str, str]:
        """The environment that tells a rank its place, read by launch/env.py and by torch.distributed."""
        per_host = self.spec.ranks_per_host
        place: dict[str, str | int] = {
            "THINWIRE_LAB": self.id,
            "RANK": rank,
            "WORLD_SIZE": self.spec.world_size,
            "LOCAL_RANK": rank % per_host,
            "LOCAL_WORLD_SIZE": per_host,
            "GROUP_RANK": rank // per_host,
            "GROUP_WORLD_SIZE": self.spec.hosts,
            "MASTER_ADDR": address(0),
            "MASTER_PORT": port,
        }
        return {name: str(value) for name, value in place.items()}
