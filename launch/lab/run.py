"""The processes of one command on the hosts of a lab: their output, their signals, their end."""

from __future__ import annotations

import os
import selectors
import signal
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from thinwire.launch.lab.control import Connection

Output = str | Path
_DRAIN_S = 1.0
_TAIL_LINES = 20


@dataclass(frozen=True)
class Member:
    """One process to start: what people call it ("rank 3"), its host, its environment."""

    label: str
    host: int
    env: Mapping[str, str]


class Run:
    """A command running on the hosts; made by Lab.start.

    pids: process ids of the ranks, in rank order, as this machine knows them.
    returncodes: exit status of each, None while it runs, negative for a signal (as in subprocess).
    """

    def __init__(
        self,
        connection: Connection,
        command: Sequence[str],
        members: Sequence[Member],
        *,
        folder: Path,
        output: Output,
        stdout: int | IO[Any] | None,
        stderr: int | IO[Any] | None,
    ) -> None:
        self._connection = connection
        self._labels = [member.label for member in members]
        self._lock = threading.Condition()
        self._requests = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._failed_at: float | None = None
        self._first_failure = 0
        self.pids: list[int] = []
        self.returncodes: list[int | None] = [None] * len(members)
        self._streams: list[_Stream] = []
        self._early: list[dict[str, Any]] = []
        try:
            for index, member in enumerate(members):
                ends = [_descriptor(stdout, sys.stdout), _descriptor(stderr, sys.stderr)]
                if index:
                    ends = [self._open_output(member.label, output)] * 2
                try:
                    self.pids.append(self._start_member(member, command, folder, ends))
                finally:
                    if index:
                        os.close(ends[0])
        except BaseException:
            for stream in self._streams:
                stream.close()
            self._selector.close()
            raise
        self._selector.register(connection, selectors.EVENT_READ, self._hear)
        self._thread = threading.Thread(target=self._listen, name="thinwire-lab-run", daemon=True)
        self._thread.start()

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to one rank and to the processes that it started; nothing happens if it has ended."""
        self._send_signal(self.pids[rank], number)

    def signal_all(self, number: int) -> None:
        """Send a signal to every rank that still runs."""
        for pid, code in zip(self.pids, self.returncodes, strict=True):
            if code is None:
                self._send_signal(pid, number)

    def wait(self, timeout_s: float | None = None, grace_s: float = 15.0) -> int:
        """Wait for all ranks and return the exit code of the run: 0, or that of the rank that failed first.

        Once a rank has failed, the others have `grace_s` to fail by themselves, with their own errors, before they are
        ended. Raises TimeoutError after `timeout_s`; the run then goes on.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._lock:
            while None in self.returncodes:
                give_up = None if self._failed_at is None else self._failed_at + grace_s
                now = time.monotonic()
                if give_up is not None and now >= give_up:
                    break
                if deadline is not None and now >= deadline:
                    running = [label for label, code in self._by_label() if code is None]
                    raise TimeoutError(f"{', '.join(running)} still running after {timeout_s} s")
                ends = [moment for moment in (give_up, deadline) if moment is not None]
                self._lock.wait(min(ends) - now if ends else None)
        if None in self.returncodes:
            self.stop(grace_s=5.0)
        self._thread.join()
        return self.exit_code

    def stop(self, grace_s: float = 15.0) -> None:
        """End every rank: SIGTERM (after SIGCONT, for those that were stopped), and SIGKILL after `grace_s`."""
        for number in (signal.SIGTERM, signal.SIGCONT):
            self.signal_all(number)
        with self._lock:
            self._lock.wait_for(lambda: None not in self.returncodes, timeout=grace_s)
        self.signal_all(signal.SIGKILL)
        with self._lock:
            self._lock.wait_for(lambda: None not in self.returncodes, timeout=30)

    @property
    def exit_code(self) -> int:
        """0 when every rank ended with 0, else the shell's code of the rank that failed first."""
        return self._first_failure

    def report(self) -> list[str]:
        """One line for every rank that failed; with output="rank0" also the last lines that it wrote."""
        lines = []
        for index, (label, code) in enumerate(self._by_label()):
            if code:
                cause = f"ended with exit code {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
                lines.append(f"{label} {cause}")
                if index:
                    lines += self._streams[index - 1].tail if self._streams else []
        return lines

    def close(self) -> None:
        """Kill whatever of the run is left."""
        if None in self.returncodes:
            self.stop(grace_s=0)
        self._thread.join()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _by_label(self) -> list[tuple[str, int | None]]:
        return list(zip(self._labels, self.returncodes, strict=True))

    def _start_member(self, member: Member, command: Sequence[str], folder: Path, ends: list[int]) -> int:
        """Have one process started and return its pid; others may end meanwhile, which is kept for later."""
        request = {
            "do": "start",
            "host": member.host,
            "command": list(command),
            "env": dict(member.env),
            "folder": str(folder),
        }
        with open(os.devnull, "rb") as nothing:
            message = self._connection.request(request, [nothing.fileno(), *ends])
        while "ended" in message:
            self._early.append(message)
            message = self._connection.next_answer()
        pid: int = message["pid"]
        return pid

    def _open_output(self, label: str, output: Output) -> int:
        """Where a rank other than the first writes to."""
        if output not in ("all", "rank0"):
            path = Path(output) / f"{label.replace(' ', '')}.log"
            path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        reader, writer = os.pipe()
        stream = _Stream(reader, label, shown=output == "all")
        self._streams.append(stream)
        self._selector.register(reader, selectors.EVENT_READ, lambda: self._pump(stream))
        return writer

    def _listen(self) -> None:
        """The thread: passes output on and hears who has ended, until there is nothing more to come."""
        drained_at: float | None = None
        self._digest([*self._early, *iter(self._connection.pop, None)], alive=True)
        while self._selector.get_map():
            if None not in self.returncodes:
                # A process that a rank left behind may hold its pipe open for ever.
                drained_at = drained_at or time.monotonic() + _DRAIN_S
                if not any(stream.open for stream in self._streams) or time.monotonic() > drained_at:
                    break
            for key, _ in self._selector.select(timeout=None if drained_at is None else 0.05):
                key.data()
        for stream in self._streams:
            stream.close()
        self._selector.close()
        with self._requests:
            self._connection.close()

    def _pump(self, stream: _Stream) -> None:
        if not stream.pump():
            self._selector.unregister(stream.fd)

    def _hear(self) -> None:
        alive = self._connection.fill()
        self._digest(iter(self._connection.pop, None), alive)
        if not alive:
            self._selector.unregister(self._connection)

    def _digest(self, messages: Iterable[dict[str, Any]], alive: bool) -> None:
        with self._lock:
            for message in messages:
                if "ended" in message:
                    self._note(self.pids.index(message["ended"]), message["code"])
            if not alive:
                for index, code in enumerate(self.returncodes):
                    if code is None:  # the lab has ended and has killed them
                        self._note(index, -signal.SIGKILL)
            self._lock.notify_all()

    def _note(self, index: int, code: int) -> None:
        self.returncodes[index] = code
        if code and self._failed_at is None:
            self._failed_at = time.monotonic()
            self._first_failure = code if code > 0 else 128 - code

    def _send_signal(self, pid: int, number: int) -> None:
        with self._requests:
            try:
                self._connection.send({"do": "signal", "pid": pid, "signal": int(number)})
            except OSError:
                pass  # the lab has ended, and the rank with it


class _Stream:
    """Output of one rank: shown line by line with its name, or kept for a report."""

    def __init__(self, fd: int, label: str, *, shown: bool) -> None:
        self.fd = fd
        self.open = True
        self.tail: list[str] = []
        self._prefix = f"[{label}] "
        self._shown = shown
        self._rest = b""

    def pump(self) -> bool:
        """Pass on what is there; False at the end."""
        raw = os.read(self.fd, 1 << 16)
        if not raw:
            self.close()
            return False
        *lines, self._rest = (self._rest + raw).split(b"\n")
        self._emit(lines)
        return True

    def close(self) -> None:
        """Pass on the last, unfinished line."""
        if self.open:
            self.open = False
            self._emit([self._rest] if self._rest else [])
            os.close(self.fd)

    def _emit(self, lines: list[bytes]) -> None:
        texts = [self._prefix + line.decode(errors="replace").rstrip("\r") for line in lines]
        if self._shown and texts:
            sys.stderr.write("\n".join(texts) + "\n")
            sys.stderr.flush()
        elif texts:
            self.tail = (self.tail + texts)[-_TAIL_LINES:]


def _descriptor(target: int | IO[Any] | None, default: IO[Any]) -> int:
    if target is None:
        target = default
    if isinstance(target, int):
        return target
    target.flush()
    return target.fileno()
