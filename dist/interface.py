"""The network interface that this process talks through: the one that routes to the others. Imports no torch."""

from __future__ import annotations

import socket
from dataclasses import dataclass

import psutil

_ANY_PORT = 9  # connecting a datagram socket sends nothing; the port only has to be one


@dataclass(frozen=True)
class Interface:
    """A network interface of this host and one of its addresses."""

    name: str
    address: str


def interface_to(address: str) -> Interface:
    """The interface through which the kernel sends to `address`, a name or a number.

    Raises:
        OSError: the name does not resolve, or there is no route.
    """
    family, _, _, _, target = socket.getaddrinfo(address, _ANY_PORT, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        local = _without_scope(probe.getsockname()[0])
    for name, entries in psutil.net_if_addrs().items():
        if any(_without_scope(entry.address) == local for entry in entries):
            return Interface(name, local)
    raise OSError(f"no network interface has the address {local}, which the route to {address} starts from")


def loopback_interface() -> Interface:
    """The interface of 127.0.0.1: lo on Linux, lo0 on macOS."""
    return interface_to("127.0.0.1")


def interface_named(name: str) -> Interface:
    """The interface of that name, with its first IPv4 address (IPv6 where it has no other).

    Raises:
        ValueError: this host has none of that name, or it has no address.
    """
    interfaces = psutil.net_if_addrs()
    addresses = [e for e in interfaces.get(name, []) if e.family in (socket.AF_INET, socket.AF_INET6)]
    if not addresses:
        why = "has no IP address" if name in interfaces else "does not exist"
        raise ValueError(
            f"world.interface: {name!r} {why} on {socket.gethostname()}, which has {', '.join(sorted(interfaces))}; "
            "name one of these, or write auto to take the one that routes to the head node"
        )
    chosen = min(addresses, key=lambda e: (e.family != socket.AF_INET, e.address.startswith("fe80")))
    return Interface(name, _without_scope(chosen.address))


def check_interface_name(name: str) -> str:
    """Return the name, or refuse what is no name of a single interface.

    Raises:
        ValueError: NCCL's notation for several interfaces, or an empty name.
    """
    if not name or any(character in name for character in "^=, "):
        raise ValueError(
            f"{name!r} is no single interface: NCCL's notation for excluded, exact or several interfaces "
            "(^lo,docker0 or =eth0 or eth0,eth1) means nothing to gloo, which needs one name such as eth0; "
            "write auto to take the one that routes to the head node"
        )
    return name


def _without_scope(address: str) -> str:
    return address.split("%", 1)[0]  # fe80::1%eth0
