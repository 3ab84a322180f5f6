"""Namespaces without names: each lives only through the descriptors that the lab's guardian holds."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from thinwire.launch.lab import syscalls
from thinwire.launch.lab.spec import LabError

_KINDS = ("mnt", "uts", "net")


@dataclass(frozen=True)
class Namespace:
    """Descriptors of one host's mount, UTS and network namespace, its counters, and its TAP device if it has one."""

    name: str
    fds: tuple[int, ...]
    net_dev_fd: int
    tap_fd: int | None

    @property
    def net_fd(self) -> int:
        """The network namespace."""
        return self.fds[_KINDS.index("net")]

    def enter(self) -> None:
        """Move the calling process in; it must have one thread only. Raises OSError."""
        folder = os.getcwd()
        for fd in self.fds:
            syscalls.setns(fd)
        os.chdir(folder)  # entering a mount namespace moves a process to its root

    def call(self, action: Callable[[], None]) -> None:
        """Run `action` in a forked child inside. Raises LabError with the text of its OSError."""

        def inside() -> list[int]:
            self.enter()
            action()
            return []

        _in_child(inside)

    def net_dev(self) -> str:
        """The present text of /proc/net/dev inside: that descriptor belongs to the namespace, wherever it is read."""
        return os.pread(self.net_dev_fd, 1 << 20, 0).decode()


def create(name: str, hosts_file: str, *, with_tap: bool) -> Namespace:
    """Make the namespaces of a host called `name`, in which /etc/hosts shows `hosts_file`. Raises LabError."""

    def build() -> list[int]:
        syscalls.unshare(syscalls.CLONE_NEWNET | syscalls.CLONE_NEWUTS | syscalls.CLONE_NEWNS)
        syscalls.sethostname(name)
        syscalls.make_mounts_private()
        if os.path.exists("/etc/hosts"):
            syscalls.bind_mount(hosts_file, "/etc/hosts")
        fds = [os.open(f"/proc/self/ns/{kind}", os.O_RDONLY) for kind in _KINDS]
        fds.append(os.open("/proc/self/net/dev", os.O_RDONLY))
        return [*fds, _open_tap()] if with_tap else fds

    fds = _in_child(build)
    tap_fd = fds.pop() if with_tap else None
    *kinds, net_dev_fd = fds
    return Namespace(name, tuple(kinds), net_dev_fd, tap_fd)


def _open_tap() -> int:
    try:
        return syscalls.open_tap("eth0")
    except OSError as error:
        raise OSError(
            f"delay and loss need a TAP device from /dev/net/tun, which cannot be had ({error.strerror}): as root,"
            " run `modprobe tun; chmod 0666 /dev/net/tun`, or run the lab as root; without --delay and --loss no need"
        ) from error


def _in_child(build: Callable[[], list[int]]) -> list[int]:
    """Run `build` in a forked child and return the descriptors that it opened."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            socket.send_fds(theirs, [b"ok"], build())
            status = 0
        except OSError as error:
            theirs.send(f"{error}".encode())
        finally:
            os._exit(status)
    theirs.close()
    with ours:
        message, fds, _, _ = socket.recv_fds(ours, 4096, len(_KINDS) + 2)
    os.waitpid(pid, 0)
    if message != b"ok":
        raise LabError(f"cannot make a host: {message.decode() or 'the set-up process died'}")
    for fd in fds:
        os.set_inheritable(fd, False)
    return fds


def gain_privileges() -> bool:
    """Make sure that this process may create namespaces; True if it had to enter a user namespace for it.

    In the user namespace the uid and gid stay what they are, so that files and `whoami` look as before.
    Raises LabError with the reason and the remedy.
    """
    if _may_unshare():
        return False
    uid, gid = os.geteuid(), os.getegid()
    try:
        syscalls.unshare(syscalls.CLONE_NEWUSER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    except OSError as error:
        raise LabError(f"this process may create no user namespace ({error}); {_remedy()}") from error
    if not _may_unshare():
        raise LabError(f"a user namespace was made, but it may hold no network namespace; {_remedy()}")
    return True


def _may_unshare() -> bool:
    pid = os.fork()
    if pid == 0:
        try:
            syscalls.unshare(syscalls.CLONE_NEWNET | syscalls.CLONE_NEWUTS | syscalls.CLONE_NEWNS)
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


def _remedy() -> str:
    switches = {
        "/proc/sys/user/max_user_namespaces": ("0", "sysctl user.max_user_namespaces=10000"),
        "/proc/sys/kernel/unprivileged_userns_clone": ("0", "sysctl kernel.unprivileged_userns_clone=1"),
        "/proc/sys/kernel/apparmor_restrict_unprivileged_userns": (
            "1",
            "sysctl kernel.apparmor_restrict_unprivileged_userns=0",
        ),
    }
    for path, (forbidding, command) in switches.items():
        if os.path.exists(path) and Path(path).read_text().strip() == forbidding:
            return f"{path} forbids it: as root, run `{command}`, or run the lab itself as root"
    return (
        "run it as root, or in a container started with"
        " --cap-add SYS_ADMIN --cap-add NET_ADMIN --security-opt seccomp=unconfined --security-opt apparmor=unconfined"
    )
