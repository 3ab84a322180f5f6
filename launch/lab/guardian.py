"""The process that owns a lab: namespaces, switch, relay and every process on the hosts.

It runs apart from whoever started the lab (that one may hold torch and threads) and ends when that one ends, however
it ends. As the subreaper of all that it starts, it can end every process of the lab, also those that tried to
detach. (Should the guardian itself be killed, the kernel kills what it started, but not what that started in turn.)
Namespaces, interfaces and queues have no names outside and vanish with the last descriptor.

    python -m thinwire.launch.lab.guardian LAB_ID SPEC_JSON CONTROL_FD
"""

from __future__ import annotations

import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from thinwire.launch.lab import processors, syscalls
from thinwire.launch.lab.cluster import Cluster
from thinwire.launch.lab.control import Connection, lab_folder, listen
from thinwire.launch.lab.spec import LabError, LabSpec


@dataclass
class Task:
    """A process on a host, the connection that asked for it, and its control group if it has processors of its own."""

    process: subprocess.Popen[bytes]
    owner: Connection
    group: Path | None


class Guardian:
    """Serves requests until the process that started the lab is gone or says "end"."""

    def __init__(self, folder: Path, spec: LabSpec) -> None:
        self._spec = spec
        self._shares: processors.Shares | None = None
        if spec.cores_per_rank is not None:
            self._shares = processors.Shares(folder, spec.cores_per_rank, spec.world_size)
        self._cluster = Cluster(folder, spec)
        self._tasks: dict[int, Task] = {}
        self._selector = selectors.DefaultSelector()
        self._ending = False
        self._listener = listen(folder)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def run(self, owner: Connection) -> None:
        """Serve `owner`, which ends the lab by hanging up, and all who call at the socket."""
        self._watch_signals()
        # A descriptor of the starter that some child of it kept open must not keep the lab alive: watch the process.
        starter = os.pidfd_open(os.getppid())
        self._selector.register(starter, selectors.EVENT_READ, self._end)
        self._selector.register(owner, selectors.EVENT_READ, lambda: self._serve(owner, lasting=True))
        owner.send({"ready": True})
        while not self._ending:
            for key, _ in self._selector.select():
                key.data()

    def close(self) -> None:
        """Kill whatever runs on the hosts, also what detached itself, and wait until it is gone."""
        self._cluster.close()
        me = psutil.Process()
        while True:
            for process in me.children(recursive=True):
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    pass
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                break
        if self._shares is not None:
            self._shares.close()

    def _watch_signals(self) -> None:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: self._end())
        self._wakeup = (ours, theirs)
        self._selector.register(ours, selectors.EVENT_READ, self._reap)

    def _end(self) -> None:
        self._ending = True

    def _accept(self) -> None:
        connection = Connection(self._listener.accept()[0])
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._serve(connection, lasting=False))

    def _serve(self, connection: Connection, *, lasting: bool) -> None:
        alive = connection.fill()
        while (request := connection.pop()) is not None:
            try:
                answer = self._answer(request, connection)
            except (LabError, ValueError, OSError, subprocess.SubprocessError) as error:
                answer = {"error": str(error)}
            for fd in connection.take_fds():
                os.close(fd)
            try:
                connection.send(answer)
            except OSError:
                alive = False
        if not alive:
            self._hang_up(connection)
            self._ending |= lasting

    def _hang_up(self, connection: Connection) -> None:
        """Whoever asked for processes and went away takes them along."""
        self._selector.unregister(connection)
        connection.close()
        for pid, task in self._tasks.items():
            if task.owner is connection:
                _signal_group(pid, signal.SIGKILL)

    def _answer(self, request: dict[str, Any], connection: Connection) -> dict[str, Any]:
        do = request.pop("do")
        if do == "start":
            return {"pid": self._start(connection, **request)}
        if do == "signal":
            if request["pid"] not in self._tasks:
                return {"sent": False}
            return {"sent": _signal_group(request["pid"], signal.Signals(request["signal"]))}
        if do == "link":
            self._cluster.change_link(**request)
            return {"ok": True}
        if do == "counters":
            return {"counters": [counters.as_dict() for counters in self._cluster.counters()]}
        if do == "describe":
            return self._cluster.describe()
        raise LabError(f"the lab knows no request {do!r}")

    def _start(
        self,
        owner: Connection,
        host: int,
        command: list[str],
        env: dict[str, str],
        folder: str,
        whole_host: bool = False,
    ) -> int:
        """Start `command` on `host`, as one rank or for all of them, with the three descriptors that came along."""
        stdin, stdout, stderr = owner.take_fds()
        namespace = self._cluster.host(host)
        group = None
        if self._shares is not None:
            group = self._shares.make(self._spec.ranks_per_host if whole_host else 1)
        guardian_pid = os.getpid()

        def enter() -> None:
            syscalls.die_with_parent(guardian_pid)
            signal.set_wakeup_fd(-1)
            if group is not None:
                processors.enter(group)
            namespace.enter()
            os.chdir(folder)

        try:
            # preexec_fn is safe in this process, which has one thread.
            process = subprocess.Popen(
                command,
                env=env,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
                preexec_fn=enter,  # noqa: PLW1509
            )
        except FileNotFoundError as error:
            raise LabError(f"cannot start {command[0]!r}: {error.strerror}: {error.filename}") from error
        finally:
            for fd in (stdin, stdout, stderr):
                os.close(fd)
        self._tasks[process.pid] = Task(process, owner, group)
        return process.pid

    def _reap(self) -> None:
        """Collect every child that ended, orphans included, and tell the owners of tasks."""
        try:
            self._wakeup[0].recv(4096)
        except BlockingIOError:
            pass
        for pid in [pid for pid in self._tasks if self._tasks[pid].process.poll() is not None]:
            task = self._tasks.pop(pid)
            if self._shares is not None and task.group is not None:
                self._shares.remove(task.group)
            try:
                task.owner.send({"ended": pid, "code": task.process.returncode})
            except OSError:
                pass
        if self._cluster.relay_ended():
            self._ending = True
        self._reap_orphans()

    def _reap_orphans(self) -> None:
        ours = {*self._tasks, *self._cluster.pids()}
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None or ended.si_pid in ours:
                return  # a task that ended just now: its own SIGCHLD is on the way
            os.waitpid(ended.si_pid, 0)


def _signal_group(pid: int, number: signal.Signals) -> bool:
    """Signal a task and what it started; True if there was anything left to signal."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return False
    return True


def main() -> None:
    """Build the lab that the arguments describe, say so, serve it, and leave nothing."""
    lab_id, spec, control_fd = sys.argv[1:]
    owner = Connection(socket.socket(fileno=int(control_fd)))
    folder = lab_folder(lab_id)
    syscalls.become_subreaper()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the starter, which decides how the ranks end
    guardian = None
    try:
        guardian = Guardian(folder, LabSpec.from_json(spec))
        guardian.run(owner)
    except (LabError, OSError) as error:
        try:
            owner.send({"error": str(error)})
        except OSError:
            pass
    finally:
        if guardian is not None:
            guardian.close()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
