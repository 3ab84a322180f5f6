"""How processes talk to a lab: one JSON object per line over a socket in the lab's private folder."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thinwire.launch.lab.spec import LabError

_PREFIX = "thinwire-lab-"
_MAX_FDS = 64


class Connection:
    """Messages, with open descriptors attached to some, in both directions."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = b""
        self.received_fds: list[int] = []

    def fileno(self) -> int:
        """For selectors."""
        return self._sock.fileno()

    def send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Send one message; raises OSError when the other side has gone."""
        raw = json.dumps(message).encode() + b"\n"
        sent = socket.send_fds(self._sock, [raw], list(fds))
        self._sock.sendall(raw[sent:])

    def receive(self) -> dict[str, Any] | None:
        """The next message, waiting for it; None when the other side has gone."""
        while b"\n" not in self._buffer:
            if not self.fill():
                return None
        message: dict[str, Any] = self.pop() or {}
        return message

    def fill(self) -> bool:
        """Read once from the socket; False when the other side has gone."""
        try:
            raw, fds, _, _ = socket.recv_fds(self._sock, 1 << 16, _MAX_FDS)
        except ConnectionError:
            return False
        for fd in fds:
            os.set_inheritable(fd, False)
        self.received_fds += fds
        self._buffer += raw
        return bool(raw)

    def pop(self) -> dict[str, Any] | None:
        """The next message among those already read."""
        line, newline, rest = self._buffer.partition(b"\n")
        if not newline:
            return None
        self._buffer = rest
        message: dict[str, Any] = json.loads(line)
        return message

    def take_fds(self) -> list[int]:
        """The descriptors that came with the messages so far; the caller owns them."""
        fds, self.received_fds = self.received_fds, []
        return fds

    def request(self, message: dict[str, Any], fds: Sequence[int] = ()) -> dict[str, Any]:
        """Send a message and return the answer. Raises LabError with the lab's own words, or when it has gone."""
        try:
            self.send(message, fds)
        except ConnectionError as error:
            raise LabError("the lab has ended") from error
        return self.next_answer()

    def next_answer(self) -> dict[str, Any]:
        """Wait for the next message. Raises LabError as `request` does."""
        answer = self.receive()
        if answer is None:
            raise LabError("the lab has ended")
        if "error" in answer:
            raise LabError(answer["error"])
        return answer

    def close(self) -> None:
        """Hang up, and close descriptors that nobody took."""
        for fd in self.take_fds():
            os.close(fd)
        self._sock.close()


def lab_folder(lab_id: str) -> Path:
    """Where the lab called `lab_id` has its socket."""
    return Path(tempfile.gettempdir()) / f"{_PREFIX}{lab_id}"


def listen(folder: Path) -> socket.socket:
    """The listening end, in `folder`."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with _short_path(folder) as path:
        sock.bind(f"{path}.new")
        sock.listen(64)
        os.rename(f"{path}.new", path)  # a socket that can be seen answers, so one that refuses is stale
    return sock


def connect(lab_id: str) -> Connection:
    """Call the lab `lab_id`. Raises LabError when there is none."""
    folder = lab_folder(lab_id)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _short_path(folder) as path:
            sock.connect(path)
    except OSError as error:
        sock.close()
        running = ", ".join(running_labs()) or "none"
        raise LabError(f"no lab called {lab_id!r} answers ({error.strerror}); running labs: {running}") from error
    return Connection(sock)


def running_labs() -> list[str]:
    """The ids of this user's labs that answer; folders of labs that were killed are removed on the way."""
    alive = []
    for folder in sorted(Path(tempfile.gettempdir()).glob(f"{_PREFIX}*")):
        try:
            if folder.stat().st_uid != os.getuid():
                continue
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            with sock, _short_path(folder) as path:
                sock.connect(path)
            alive.append(folder.name.removeprefix(_PREFIX))
        except ConnectionRefusedError:
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue  # being made or being removed at this moment
    return alive


def the_running_lab() -> str:
    """The id of the only running lab. Raises LabError when there are none or several."""
    labs = running_labs()
    if len(labs) == 1:
        return labs[0]
    if not labs:
        raise LabError(
            "no lab of this user is running; start one with: thinwire lab --hosts 4 --rate 100mbit -- COMMAND"
        )
    raise LabError(f"{len(labs)} labs are running ({', '.join(labs)}): say which with --lab ID")


class _short_path:
    """The socket's path through /proc, because an address longer than 107 bytes is refused by the kernel."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> str:
        self._fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        return f"/proc/self/fd/{self._fd}/control"

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
