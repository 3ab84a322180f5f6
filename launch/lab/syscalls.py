"""The Linux calls that Python 3.10 lacks: namespaces, parent-death signals, capabilities, offloads."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import struct
from functools import cache

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000

_MS_BIND = 4096
_MS_REC = 16384
_MS_PRIVATE = 1 << 18
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_RAISE = 2
_CAP_NET_ADMIN = 12
_CAPABILITY_VERSION_3 = 0x20080522
_SIOCETHTOOL = 0x8946
_ETHTOOL_STSO = 0x1F
_TUNSETIFF = 0x400454CA
_IFF_TAP = 0x0002
_IFF_NO_PI = 0x1000


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(what: str, name: str, *args: object) -> None:
    if getattr(_libc(), name)(*args) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    """Move this process into new namespaces; raises OSError."""
    _call(f"unshare({flags:#x})", "unshare", ctypes.c_int(flags))


def setns(namespace_fd: int) -> None:
    """Enter the namespace behind an open /proc/PID/ns/* descriptor; raises OSError."""
    _call("setns", "setns", ctypes.c_int(namespace_fd), ctypes.c_int(0))


def sethostname(name: str) -> None:
    """Name this UTS namespace; raises OSError."""
    raw = name.encode()
    _call("sethostname", "sethostname", raw, ctypes.c_size_t(len(raw)))


def make_mounts_private() -> None:
    """Keep later mounts of this mount namespace from reaching any other; raises OSError."""
    flags = ctypes.c_ulong(_MS_REC | _MS_PRIVATE)
    _call("mount --make-rprivate /", "mount", b"none", b"/", None, flags, None)


def bind_mount(source: str, target: str) -> None:
    """Show the file `source` at `target` in this mount namespace; raises OSError."""
    flags = ctypes.c_ulong(_MS_BIND)
    _call(f"mount --bind {target}", "mount", source.encode(), target.encode(), None, flags, None)


def die_with_parent(parent_pid: int) -> None:
    """Ask the kernel to SIGKILL this process when its parent ends; `parent_pid` closes the race before the call."""
    _call("prctl(PDEATHSIG)", "prctl", _PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)


def become_subreaper() -> None:
    """Make every orphaned descendant a child of this process, so that none can hide from it."""
    _call("prctl(SUBREAPER)", "prctl", _PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1), 0, 0, 0)


def keep_net_admin_over_exec() -> None:
    """Let the programs that this process executes keep CAP_NET_ADMIN although its uid is not 0 (rootless labs)."""
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    data = ctypes.create_string_buffer(24)
    _call("capget", "capget", header, data)
    words = list(struct.unpack("6I", data.raw))
    words[2] |= 1 << _CAP_NET_ADMIN  # inheritable, low word
    _call("capset", "capset", header, struct.pack("6I", *words))
    args = [ctypes.c_ulong(value) for value in (_PR_CAP_AMBIENT_RAISE, _CAP_NET_ADMIN, 0, 0)]
    _call("prctl(CAP_AMBIENT)", "prctl", _PR_CAP_AMBIENT, *args)


def disable_segmentation_offload(interface: str) -> None:
    """Make the kernel cut TCP segments before `interface` counts them (TSO off); raises OSError."""
    value = ctypes.create_string_buffer(struct.pack("II", _ETHTOOL_STSO, 0))
    request = struct.pack("16sP8x", interface.encode(), ctypes.addressof(value))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        fcntl.ioctl(probe, _SIOCETHTOOL, request)


def open_tap(interface: str) -> int:
    """Create a TAP device in this network namespace and return its non-blocking descriptor; raises OSError."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", interface.encode(), _IFF_TAP | _IFF_NO_PI))
    except OSError:
        os.close(tap)
        raise
    return tap
